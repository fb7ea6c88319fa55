"""The native units of the software CPU: from the rows of the opcode table, Sources/CSoftCPU/NativeUnits.generated.S.

A unit is a routine that loads operands from memory, executes the very instruction on the host and stores the result:
  uint64_t unit(void *rdi, const void *rsi, const void *rdx, const void *rcx, uint64_t r8, uint64_t r9)
Vector units store to rdi and take vectors from rsi, rdx and rcx; a general register or flags come back in rax, a
general register as source is r8. x87 units work on an FXSAVE image at rdi, and on memory at rdx. An instruction with
an immediate has a copy for each value that matters, at a fixed stride.
"""

import re

# Flags of a unit, as soft_unit in CSoftCPU.h names them.
MXCSR, RAX, STATUS, UNALIGNED, WIDE, AVX2, STRING, GENERAL = (1 << bit for bit in range(8))
FLAG_NAMES = ["mxcsr", "rax", "status", "unaligned", "wide", "avx2", "string", "general"]

# Moves, which need no unit: what they do is loads, stores and copies.
MOVES = set(
    "movups movupd movaps movapd movss movsd movlps movlpd movhps movhpd movhlps movlhps movd movq movdqa movdqu movntps "
    "movntpd movntdq movntq lddqu movntdqa movq2dq movdq2q maskmovq maskmovdqu maskmovps maskmovpd pmaskmovd pmaskmovq "
    "emms zeroupper zeroall".split())
# x87 instructions on the control and status words and on the whole state, which are no arithmetic.
X87_CONTROL = set(
    "fwait fldenv fldcw fnstenv fnstcw frstor fnsave fnstsw fneni fndisi fnclex fninit fnsetpm".split())
# How many values of an immediate differ, by the mnemonic without its v: (128 bits, 256 bits); others have 256.
VARIANTS = {
    "blendps": (16, 256), "blendpd": (4, 16), "shufpd": (4, 16), "roundps": (16, 16), "roundpd": (16, 16),
    "roundss": (16, 16), "roundsd": (16, 16), "mpsadbw": (8, 64), "pblendd": (16, 256), "permilpd": (4, 16),
    "cvtps2ph": (8, 8), "extractf128": (2, 2), "extracti128": (2, 2), "insertf128": (2, 2), "inserti128": (2, 2),
    "pextrb": (16, 16), "pextrw": (8, 8), "pextrd": (4, 4), "pextrq": (2, 2), "pinsrb": (16, 16), "pinsrw": (8, 8),
    "pinsrd": (4, 4), "pinsrq": (2, 2), "extractps": (4, 4), "sha1rnds4": (4, 4), "dppd": (256, 0),
    "pcmpestrm": (128, 0), "pcmpestri": (128, 0), "pcmpistrm": (128, 0), "pcmpistri": (128, 0),
}
FLOATING = re.compile(
    r"(add|sub|mul|div|min|max|sqrt|u?comi|hadd|hsub|addsub|round|dp)[ps][sd]|cmp[ps][sd]|fn?m(add|sub).*|cvt.*")
GENERAL_DESTINATION = set("movmskps movmskpd pmovmskb cvtss2si cvtsd2si cvttss2si cvttsd2si".split())
STATUS_RESULT = set("comiss comisd ucomiss ucomisd ptest testps testpd".split())
UNALIGNED_NAMES = set("pcmpestrm pcmpestri pcmpistrm pcmpistri".split())
# Integer instructions whose 256-bit form is AVX's or that AVX2 has only at that width.
AVX_INTEGER = set("permilps permilpd perm2f128 ptest".split())
STRING_OPCODES = {"pcmpestrm": 0x60, "pcmpestri": 0x61, "pcmpistrm": 0x62, "pcmpistri": 0x63}


class Unit:
    """One routine: the instructions of a variant, with {i} for the immediate, and how many variants there are."""

    def __init__(self, lines, variants=1):
        self.lines, self.variants = lines, variants
        self.label = None


def is_vector(operand):
    return operand[0] in "VWUPQNHL" or operand == "XMM0" or (operand[0] == "M" and len(operand) > 1)


def is_general(operand):
    return operand[0] in "GER"


def width(operand, length):
    """The register name's first letter for an operand of a unit of `length` bits: m, x or y."""
    if operand[0] in "PQN":
        return "m"
    return "y" if operand[1:] == "qq" or (operand[1:] == "x" and length == 256) else "x"


def register(kind, number):
    return f"mm{number}" if kind == "m" else f"{kind}mm{number}"


def move(kind, vex):
    return "movq" if kind == "m" else "vmovups" if vex else "movups"


def variants_of(name, vex, length):
    if re.fullmatch(r"cmp[ps][sd]", name):
        return 32 if vex else 8
    return VARIANTS.get(name, (256, 256))[length == 256]


def string_unit(row, name):
    """PCMPxSTRx: rax and rdx come in r8 and r9; flags and, in the upper half, ECX in rax; the mask goes to rdi."""
    code = f".byte 0x66, 0x48, 0x0f, 0x3a, {STRING_OPCODES[name]:#x}, 0xc1, {{i}}"
    if name.startswith("pcmpi"):
        code = code.replace("0x48, ", "")
    lines = ["movups xmm0, [rsi]", "movups xmm1, [rdx]", "mov rax, r8", "mov rdx, r9", code]
    lines += ["movups [rdi], xmm0"] if name.endswith("m") else []
    return Unit(lines + ["pushfq", "pop rax", "shl rcx, 32", "or rax, rcx", "ret"], 128)


def vector_unit(row, name, length):
    """The unit of a row of sse.txt or avx.txt for vectors of `length` bits."""
    vex = row.map > 3
    operands = [operand for operand in row.operands if operand != "Ib"]
    general = [operand for operand in operands if is_general(operand)]
    has_destination = is_vector(operands[0]) and name not in STATUS_RESULT
    sources = [operand for operand in operands if is_vector(operand)]
    if vex and has_destination:
        sources = sources[1:]
    lines, names, after = [], {}, []
    pointers = ["rsi", "rdx", "rcx"] if len(sources) > 1 else ["rsi" if general and has_destination else "rdx"]
    text = []
    # With an implicit XMM0 the others move up by one; a VEX destination comes before the sources.
    number = 1 if "XMM0" in sources or (vex and has_destination) else 0
    for operand, pointer in zip(sources, pointers):
        kind = width(operand, length)
        if operand[0] == "M":
            pointer_size = {"d": "dword", "q": "qword", "dq": "xmmword"}[operand[1:]]
            text.append(f"{pointer_size} ptr [{pointer}]")
            continue
        current = register(kind, 0 if operand == "XMM0" else number)
        number += operand != "XMM0"
        lines.append(f"{move(kind, vex)} {current}, [{pointer}]")
        text.append(current)
    if vex and has_destination:
        kind = width(operands[0], length)
        text.insert(0, register(kind, 0))
        if row.feature == "FMA":
            lines.append(f"{move(kind, vex)} {text[0]}, [rcx]")
    destination = text[0] if has_destination else None
    variants = variants_of(name, vex, length) if "Ib" in row.operands else 1
    immediate = ["{i}"] if "Ib" in row.operands else []
    if general and has_destination:
        # A source in r8: a dword, or a qword where the name or REX.W says so.
        if general[0][1] == "y":
            choices = [["r8d"], ["r8"]]
        else:
            choices = [["r8" if general[0][1] == "q" else "r8d"]]
    elif general:
        choices = [["eax"], ["rax"]] if general[0][1] == "y" and name.startswith("cvt") else [
            ["rax" if general[0][1] == "q" else "eax"]]
    else:
        choices = [[]]
    mmx = any(width(operand, length) == "m" for operand in operands if is_vector(operand))
    end = []
    if name in STATUS_RESULT:
        end += ["pushfq", "pop rax"]
    if has_destination:
        end.append(f"{move(width(operands[0], length), vex)} [rdi], {destination}")
    end += ["emms"] if mmx else []
    end += ["vzeroupper"] if vex else []
    bodies = []
    for choice in choices:
        if general and not has_destination:
            arguments = choice + text
        else:
            arguments = text[:1] + text[1:] + choice
        bodies.append(lines + [f"{row.mnemonic} {', '.join(arguments + immediate)}"] + end + ["ret"])
    if len(bodies) == 2:
        # Both at one stride: the shorter one is filled up.
        return Unit(bodies, 2)
    return Unit(bodies[0], variants)


def extract_to_memory(row, name):
    """PEXTRx and EXTRACTPS with a memory destination compute like those with a register."""
    return name in ("pextrb", "pextrw", "pextrd", "pextrq", "extractps") and row.operands[0][0] in "MER"


def vector_flags(row, name, has_256):
    flags = 0
    if FLOATING.fullmatch(name):
        flags |= MXCSR
    if name in STRING_OPCODES:
        flags |= STRING | UNALIGNED
    if name in STATUS_RESULT:
        flags |= STATUS
    if name in GENERAL_DESTINATION or extract_to_memory(row, name) or (name == "pextrw"):
        flags |= RAX
    if any(operand in ("Ey", "Gy") for operand in row.operands) and name.startswith("cvt"):
        flags |= WIDE
    if name.startswith("cvtsi2") or name.startswith("pinsr"):
        flags |= GENERAL
    is_integer = (name.startswith("p") or name == "mpsadbw") and name not in AVX_INTEGER
    if row.map > 3 and has_256 and is_integer and row.feature == "AVX":
        flags |= AVX2
    return flags


def with_operands(row, operands):
    """The same row with other operands, for its unit alone."""
    class Copy:
        pass
    copy = Copy()
    copy.__dict__.update(row.__dict__)
    copy.operands = operands
    return copy


def unit_row(row, name):
    """The row that the unit is made of: memory forms compute like register forms."""
    operands = list(row.operands)
    if extract_to_memory(row, name):
        operands[0] = "Rq" if name == "pextrq" else "Rd"
    if name.startswith("pinsr"):
        source = len(operands) - 2
        operands[source] = "Rq" if name == "pinsrq" else "Rd"
    return with_operands(row, operands)


def x87_unit(row):
    """Loads the image, executes, saves the image; the host's own state is the one after FNINIT, as the ABI has it."""
    reg, conditional = row.conditions.get("reg"), row.mnemonic.startswith("fcmov")
    comparing = re.fullmatch(r"fu?comip?", row.mnemonic)
    base = next(iter(reg)) << 3
    variants = 1
    if row.conditions.get("mod") == {1}:
        if "rm" in row.conditions:
            code = f"{0xc0 | base | next(iter(row.conditions['rm'])):#x}"
        else:
            code, variants = f"{0xc0 | base:#x} + {{i}}", 8
    else:
        code = f"{base | 2:#x}"
    lines = ["fxrstor64 [rdi]"]
    lines += ["push r8", "popfq"] if conditional or comparing else []
    lines += [f".byte {row.opcode:#x}, {code}"]
    lines += ["pushfq", "pop rax"] if comparing else []
    lines += ["fxsave64 [rdi]", "fninit", "ret"]
    if row.mnemonic == "fstp" and row.operands == ["STi"]:
        # D9 D8, unlike its aliases, takes an empty register without a stack fault: the last eight of sixteen.
        first = [line.replace("{i}", "(i & 7)").replace(f"{row.opcode:#x},", "0xdd - 4 * (i >> 3),") for line in lines]
        return Unit(first, 16), 0
    return Unit(lines, variants), STATUS if comparing else 0


def generate(operations):
    """The lines of the assembly file, from the opcode table's operations: name -> (number, row)."""
    entries, units = {}, []

    def add(unit, number, suffix):
        unit.label = f"u{number}_{suffix}"
        units.append(unit)
        return unit

    legacy = {}
    for number, row in operations.values():
        kind = row.where.split(":")[0]
        if kind == "x87.txt" and row.mnemonic not in X87_CONTROL:
            unit, flags = x87_unit(row)
            entries[number] = (row, [add(unit, number, "x87"), None], flags)
        if kind == "sse.txt" and row.mnemonic not in MOVES:
            name = row.mnemonic
            unit = string_unit(row, name) if name in STRING_OPCODES else vector_unit(unit_row(row, name), name, 128)
            entries[number] = (row, [add(unit, number, 128), None], vector_flags(row, name, False))
            legacy.setdefault((row.map + 3, row.opcode, name, tuple(sorted(row.conditions.get("prefix", ())))), unit)
        if kind == "avx.txt" and row.mnemonic[1:] not in MOVES and "gather" not in row.mnemonic:
            name = row.mnemonic[1:]
            lengths = row.conditions.get("l", {0, 1})
            pair = [None, None]
            if 0 in lengths:
                known = legacy.get((row.map, row.opcode, name, tuple(row.conditions["prefix"])))
                if known is None or name.startswith("cmp"):
                    known = add(vector_unit(unit_row(row, name), name, 128), number, 128)
                pair[0] = known
            has_scalar = row.operands[0][1:] in ("d", "q") or name.startswith(("cvts", "cvttss", "cvttsd")) or (
                name in STATUS_RESULT and name.endswith(("ss", "sd")))
            if 1 in lengths:
                # Scalar instructions ignore VEX.L.
                pair[1] = pair[0] if has_scalar else add(vector_unit(unit_row(row, name), name, 256), number, 256)
            entries[number] = (row, pair, vector_flags(row, name, 1 in lengths))

    lines = ["// Generated by scripts/generate-opcodes from scripts/opcodes; do not edit.",
             "// CSoftCPU.h says how the units are called, scripts/native_units.py how they are made.",
             ".intel_syntax noprefix", ".text", ".p2align 4", "units:"]
    for unit in units:
        lines.append(f"{unit.label}:")
        if unit.lines and isinstance(unit.lines[0], list):
            for body in unit.lines:
                lines += ["1: " + "; ".join(body), ".skip 32 - (. - 1b), 0xcc"]
        elif unit.variants == 1:
            lines.append("; ".join(unit.lines))
        else:
            body = "; ".join(unit.lines).replace("{i}", "i")
            lines += [".set i, 0", f".rept {unit.variants}", body, ".set i, i + 1", ".endr"]
        lines.append(f"{unit.label}_end:")
    lines += ["", ".section .rodata", ".p2align 4", ".globl soft_units", ".type soft_units, @object", "soft_units:"]
    for number in range(max(operations.values(), key=lambda value: value[0])[0] + 1):
        if number not in entries:
            lines.append(".zero 16")
            continue
        row, pair, flags = entries[number]
        offsets = ", ".join(f"{unit.label} - soft_units" if unit else "0" for unit in pair)
        strides = ", ".join(
            f"({unit.label}_end - {unit.label}) / {unit.variants}" if unit else "0" for unit in pair)
        masks = ", ".join(str(unit.variants - 1) if unit else "0" for unit in pair)
        lines.append(f".long {offsets}; .short {strides}; .byte {masks}; .short {flags}  // {row.mnemonic}")
    lines += [".size soft_units, . - soft_units", ".section .note.GNU-stack, \"\", @progbits"]
    return lines
