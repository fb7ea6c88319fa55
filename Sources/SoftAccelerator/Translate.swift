import CSoftCPU
import X86

/// From instructions to blocks of operations.
extension Processor {
  /// Decodes a block; nil where its first instruction must be executed the slow way: it leaves the page, or is none.
  func makeBlock(_ host: UInt, ip: UInt64, mode: UInt8) -> UnsafeMutablePointer<Block>? {
    if !blocks.hasRoom { forgetAllCode() }
    guard watchCode(page: host & ~0xfff), let mode = CodeMode(rawValue: mode) else { return nil }
    // A copy: the guest may change the bytes while they are decoded; it then also says that they are stale.
    let room = Int(0x1000 - host & 0xfff)
    let count = min(room, Block.limit * 8)
    let page = UnsafeRawPointer(bitPattern: host).unsafelyUnwrapped
    scratch.copyMemory(from: page, byteCount: count)
    let draft = draftOperations
    var number = 0
    var operations = 0
    var position = 0
    var isOpen = true
    while isOpen, number < Block.limit, position < count {
      let bytes = UnsafeRawBufferPointer(start: scratch + position, count: min(count - position, 15))
      guard let instruction = try? Instruction(decoding: bytes, mode: mode) else { break }
      let here = ip &+ UInt64(position)
      if number > 0, isHostBreakpoint(here) { break }
      var operation = translate(instruction, at: here)
      operation?.distance = UInt16(position)
      operation?.number = UInt8(number)
      operation?.length = instruction.length
      position += Int(instruction.length)
      number += 1
      if let operation {
        isOpen = !operation.code.endsBlock
        draft[operations] = operation
        operations += 1
      }
    }
    guard number > 0 else { return nil }
    if isOpen {
      draft[operations] = FastOperation(
        code: .next, distance: UInt16(position), number: UInt8(number), address: ip &+ UInt64(position))
      operations += 1
    }
    silenceFlags(draft, count: operations)
    let ops = blocks.allocate(FastOperation.self, count: operations)
    ops.initialize(from: draft, count: operations)
    let block = blocks.allocate(Block.self, count: 1)
    block.initialize(
      to: Block(
        ip: ip, context: 0, ops: ops, count: Int64(number), next: nil, taken: nil, host: host, size: UInt16(position),
        mode: mode.rawValue, sameBucket: nil, samePage: nil))
    blocks.insert(block)
    return block
  }

  /// Chooses the forms that set no flags where others set all of them before anything can look.
  private func silenceFlags(_ operations: UnsafeMutablePointer<FastOperation>, count: Int) {
    var isDead = false
    for index in (0..<count).reversed() {
      let code = operations[index].code
      if isDead, let silent = code.silent { operations[index].code = silent }
      isDead = code.setsFlags || isDead && operations[index].code.ignoresFlags
    }
  }

  /// The operation of an instruction; nil for one that does nothing.
  private func translate(_ i: Instruction, at ip: UInt64) -> FastOperation? {
    if i.mode == .code64, !i.prefixes.contains(.lock), features.has(i.operation.feature) {
      switch i.operation.mnemonic {
      case .nop, .endbr64, .endbr32, .lfence, .mfence, .sfence, .prefetchnta, .prefetcht0, .prefetcht1, .prefetcht2:
        return nil
      default: break
      }
      if let fast = fastOperation(i, next: ip &+ UInt64(i.length)) { return fast }
      if i.isX87OrVector {
        if let fast = fastVectorOperation(i, next: ip &+ UInt64(i.length)) { return fast }
        return FastOperation(code: .vector, address: store(i))
      }
    }
    return FastOperation(code: i.staysInBlock ? .generic : .genericEnd, address: store(i))
  }

  /// Keeps an instruction for as long as its block; returns its address.
  private func store(_ i: Instruction) -> UInt64 {
    let stored = blocks.allocate(Instruction.self, count: 1)
    stored.initialize(to: i)
    return UInt64(UInt(bitPattern: stored))
  }
}

extension OperationCode {
  /// Whether no operation follows in the block.
  var endsBlock: Bool { rawValue >= OperationCode.next.rawValue }
}

extension Instruction {
  /// Whether the next instruction can follow at once: this one neither branches nor changes how code is executed.
  fileprivate var staysInBlock: Bool {
    switch operation.mnemonic {
    case .jmp, .call, .ret, .retf, .jo, .jno, .jb, .jae, .je, .jne, .jbe, .ja, .js, .jns, .jp, .jnp, .jl, .jge, .jle,
      .jg, .loop, .loope, .loopne, .jcxz, .jecxz, .jrcxz, .int, .int1, .int3, .into, .iret, .ud0, .ud1, .ud2, .popf,
      .sti, .cli, .in, .out, .ins, .outs:
      return false
    case .mov, .push, .pop:
      return operands[0].register.class.isOrdinary && operands[1].register.class.isOrdinary
    case .les, .lds, .lss, .lfs, .lgs: return false
    case .cpuid, .rdtsc, .fxsave, .fxrstor, .fxsave64, .fxrstor64, .ldmxcsr, .stmxcsr, .rdfsbase, .rdgsbase, .verr,
      .verw, .lar, .lsl, .sgdt, .sidt, .smsw, .str, .sldt, .clflush, .clflushopt, .clwb, .rdtscp, .rdpid:
      return true
    default:
      return !operation.isSystem
    }
  }
}

extension Operation {
  /// Whether the instruction comes from the system part of the table: those may change anything.
  fileprivate var isSystem: Bool {
    if isPrivileged { return true }
    switch mnemonic {
    case .syscall, .sysret, .sysretq, .sysenter, .sysexit, .sysexitq, .swapgs, .wrfsbase, .wrgsbase, .stac, .clac,
      .xsetbv, .wrpkru, .hlt, .mwait, .mwaitx, .vmcall, .vmmcall, .xrstor, .xrstor64, .xrstors, .xrstors64, .arpl:
      return true
    default: return false
    }
  }
}

extension Register.Class {
  /// General registers, and no register at all.
  fileprivate var isOrdinary: Bool { rawValue <= Register.Class.general64.rawValue || self == .none }
}
