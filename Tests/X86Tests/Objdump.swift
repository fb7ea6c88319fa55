import Foundation
import X86

/// GNU objdump as the oracle of the decoder and disassembler: it disassembles many byte sequences in one run.
struct Objdump {
  /// An instruction as objdump or the code under test sees it; length 0 for a bad one.
  struct Line: Equatable {
    var length: Int
    var text: String
  }

  /// Each sequence has a slot of its own, so that a long or bad instruction ends inside it.
  static let slotSize = 32
  /// As many slots as 64 KiB hold: 16-bit branch targets stay comparable.
  static let slotsPerRun = 0x10000 / slotSize

  static var isInstalled: Bool { FileManager.default.isExecutableFile(atPath: path) }
  private static let path = "/usr/bin/objdump"

  /// What objdump makes of the beginning of each of at most `slotsPerRun` sequences of at most 15 bytes, sequence n
  /// being at address n * slotSize.
  static func disassemble(_ sequences: ArraySlice<[UInt8]>, mode: CodeMode) throws -> [Line] {
    // DS prefixes and a NOP: one line of output, wherever in them the instruction before ends.
    let padding = [UInt8](repeating: 0x3e, count: slotSize - 1) + [0x90]
    var image: [UInt8] = []
    for bytes in sequences { image += bytes + padding[bytes.count...] }
    let name = "x86-\(ProcessInfo.processInfo.processIdentifier)-\(UInt64.random(in: 0 ... .max))"
    let file = FileManager.default.temporaryDirectory.appendingPathComponent(name)
    defer { try? FileManager.default.removeItem(at: file) }
    try Data(image).write(to: file)

    let process = Process()
    let output = Pipe()
    let machine =
      switch mode {
      case .code16: "i8086"
      case .code32: "i386"
      case .code64: "i386:x86-64"
      }
    process.executableURL = URL(fileURLWithPath: path)
    // AMD's and Intel's processors differ in near branches with a 66 prefix; the decoder follows Intel's.
    process.arguments = [
      "-D", "-z", "-b", "binary", "-m", machine, "-M", "intel,intel64", "--insn-width=16", file.path,
    ]
    process.standardOutput = output
    try process.run()
    let text = [UInt8](output.fileHandleForReading.readDataToEndOfFile())
    process.waitUntilExit()
    return parse(text, count: sequences.count)
  }

  /// Lines are "  address:\tbytes\ttext"; some bad instructions have no text.
  private static func parse(_ text: [UInt8], count: Int) -> [Line] {
    var lines = [Line](repeating: Line(length: 0, text: "no output"), count: count)
    for line in text.split(separator: UInt8(ascii: "\n")) {
      guard let colon = line.firstIndex(of: UInt8(ascii: ":")), line.endIndex > colon + 2, line[colon + 1] == 9,
        line[colon - 1] == UInt8(ascii: "0"),
        let address = Int(String(decoding: line[..<colon].drop { $0 == 32 }, as: UTF8.self), radix: 16),
        address % slotSize == 0, address / slotSize < count
      else { continue }
      let columns = line[(colon + 2)...].split(separator: 9)
      let length = columns[0].split(separator: 32).count
      let text = columns.count > 1 ? String(decoding: columns[1], as: UTF8.self) : "(bad)"
      lines[address / slotSize] = Line(length: length, text: text)
    }
    return lines
  }

  private static let prefixes: Set<Substring> = [
    "data16", "data32", "addr32", "addr16", "cs", "ds", "es", "ss", "fs", "gs", "lock", "rep", "repz", "repnz", "bnd",
    "notrack", "xacquire", "xrelease",
  ]

  /// Whether objdump shows nothing but prefixes: it gives up on REX before another prefix, where a CPU ignores it.
  static func isPrefixesOnly(_ text: String) -> Bool {
    text.split(separator: " ").allSatisfy { prefixes.contains($0) || $0.hasPrefix("rex") }
  }

  private static let stemsWithSuffix = [
    "sysret", "sysexit", "sgdt", "sidt", "lgdt", "lidt", "call", "jmp", "fldenv", "fnstenv", "frstor", "fnsave",
    "pcmpestrm", "pcmpestri", "vpcmpestrm", "vpcmpestri",
  ]

  /// The predicates of CMPPS and its like (SDM volume 2, table 3-1 and the page of VCMPPS), in order.
  private static let predicates = [
    "eq", "lt", "le", "unord", "neq", "nlt", "nle", "ord", "eq_uq", "nge", "ngt", "false", "neq_oq", "ge", "gt", "true",
    "eq_os", "lt_oq", "le_oq", "unord_s", "neq_us", "nlt_uq", "nle_uq", "ord_s", "eq_us", "nge_uq", "ngt_uq",
    "false_os", "neq_os", "ge_oq", "gt_oq", "true_us",
  ]
  private static let products = ["lqlq": "0", "hqlq": "1", "lqhq": "10", "hqhq": "11"]

  private static func pseudoOperation(_ name: Substring) -> (String, String)? {
    let vex = name.hasPrefix("v") ? "v" : ""
    let bare = name.dropFirst(vex.count)
    if bare.hasPrefix("pclmul"), let immediate = products[String(bare.dropFirst(6).prefix(4))] {
      return (vex + "pclmulqdq", immediate)
    }
    guard bare.hasPrefix("cmp"), let predicate = predicates.firstIndex(of: String(bare.dropFirst(3).dropLast(2)))
    else { return nil }
    return (vex + "cmp" + bare.suffix(2), String(predicate, radix: 16))
  }

  /// An instruction's text without what the two disassemblers are known to write differently. In order:
  /// - prefixes, which objdump lists even where they mean nothing, and branch hints;
  /// - DS and SS overrides, which only objdump shows where they are the default segment;
  /// - the widths of 128-bit integers (OWORD), and of far pointers with REX.W (80 bits by the SDM);
  /// - size suffixes that the operands make redundant or that only exist on paper;
  /// - branch targets above 64 KiB, where objdump does not cut EIP to 16 bits;
  /// - XCHG of eAX with itself, which is NOP; targets relative to EIP, which objdump shows with 64 bits;
  /// - names that stand for a name and its immediate (CMPEQPS, PCLMULLQLQDQ), and LDDQU, which objdump gives no size.
  static func normalised(_ text: String) -> String {
    var words = text.split(separator: " ")
    while words.count > 1, let first = words.first, prefixes.contains(first) || first.hasPrefix("rex") {
      words.removeFirst()
    }
    guard var name = words.first else { return text }
    for hint in [",pn", ",pt"] where name.hasSuffix(hint) { name.removeLast(3) }
    for stem in stemsWithSuffix where name.dropLast() == stem && "wdq".contains(name.suffix(1)) { name.removeLast() }
    var rest = words.dropFirst().joined(separator: " ")
    if let base = ["fneni", "fndisi", "fnsetpm"].first(where: name.hasPrefix) { return base }
    if let (base, immediate) = pseudoOperation(name) {
      let operands = rest.prefix { $0 != "#" }
      let comment = rest[operands.endIndex...]
      rest = operands.trimmingSuffix(" ") + ",0x" + immediate + (comment.isEmpty ? "" : " " + comment)
      return base + " " + rest
    }
    if name.hasSuffix("lddqu") {
      rest = rest.replacingOccurrences(of: "[XY]MMWORD PTR ", with: "", options: .regularExpression)
    }
    if rest.contains("[eip"), let comment = rest.firstIndex(of: "#") { rest = rest[..<comment].trimmingSuffix(" ") }
    rest = rest.replacingOccurrences(of: "ds:[", with: "[").replacingOccurrences(of: "ss:[", with: "[")
    rest = rest.replacingOccurrences(of: "OWORD", with: "XMMWORD").replacingOccurrences(of: "XMMXMM", with: "XMM")
    if ["call", "jmp", "lss", "lfs", "lgs"].contains(name) {
      rest = rest.replacingOccurrences(of: "TBYTE", with: "FWORD")
    }
    if name.hasPrefix("j") || name.hasPrefix("loop") || name == "call", rest.hasPrefix("0x"),
      let target = UInt64(rest.dropFirst(2), radix: 16)
    {
      rest = "0x" + String(target & 0xffff, radix: 16)
    }
    if name == "xchg", rest == "ax,ax" || rest == "eax,eax" { return "nop" }
    return rest.isEmpty ? String(name) : name + " " + rest
  }
}

extension Substring {
  fileprivate func trimmingSuffix(_ character: Character) -> String {
    var text = self
    while text.last == character { text.removeLast() }
    return String(text)
  }
}
