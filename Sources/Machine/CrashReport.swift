import Accelerator
import GuestMemory
import X86

/// What a kernel developer wants to see when the guest cannot go on: taken on the vCPU's thread, where it stopped.
public struct CrashReport: Sendable {
  /// Why the guest cannot go on.
  public enum Reason: Sendable {
    case tripleFault
    case emulationFailure(InstructionBytes)
    case memoryFault(GuestPhysicalAddress)
    case entryFailure(UInt64)
    case internalError(subcode: UInt32, data: UInt64)
    case reportedByGuest
    case denied(String)
    case unexpectedExit(String)

    /// The name in JSON reports.
    public var name: String {
      switch self {
      case .tripleFault: "triple-fault"
      case .emulationFailure: "emulation-failure"
      case .memoryFault: "memory-fault"
      case .entryFailure: "entry-failure"
      case .internalError: "internal-error"
      case .reportedByGuest: "reported-by-guest"
      case .denied: "denied"
      case .unexpectedExit: "unexpected-exit"
      }
    }
  }

  /// Why the guest cannot go on.
  public let reason: Reason
  /// Which vCPU met it.
  public let vcpu: Int
  /// Its general registers; zero where the accelerator no longer gives them.
  public let general: GeneralRegisters
  /// Its system registers.
  public let system: SystemRegisters
  /// The instruction at RIP in Intel syntax, where its bytes could be read and decoded.
  public let instruction: String?
  /// The whole report, line by line, the headline first.
  public let lines: [String]

  init(reason: Reason, vcpu: any VirtualCPU, memory: GuestMemory) {
    self.reason = reason
    self.vcpu = vcpu.index
    general = (try? vcpu.readRegisters()) ?? GeneralRegisters()
    system = (try? vcpu.readSystemRegisters()) ?? SystemRegisters()
    let writer = CrashReportWriter(
      reason: reason, vcpu: vcpu.index, general: general, system: system, memory: memory)
    instruction = writer.instructions(limit: 1).first?.text
    lines = writer.lines()
  }
}

/// Turns a stopped vCPU into text.
private struct CrashReportWriter {
  let reason: CrashReport.Reason
  let vcpu: Int
  let general: GeneralRegisters
  let system: SystemRegisters
  let memory: GuestMemory

  func lines() -> [String] {
    var lines = MachineMessage.crash(reason, vcpu: vcpu).lines
    lines.append("RIP \(hex(UInt64(system.cs.selector), 4)):\(hex(general.rip)) (linear \(hex(rip))), \(modeName)")
    let instructions = instructions(limit: 4)
    if instructions.isEmpty { lines.append("  no bytes can be read at RIP") }
    for (index, instruction) in instructions.enumerated() {
      let bytes = instruction.bytes.map { hex(UInt64($0), 2) }.joined(separator: " ")
      let padding = String(repeating: " ", count: max(1, 32 - bytes.count))
      lines.append("  \(index == 0 ? "=>" : "  ") \(hex(instruction.address)): \(bytes)\(padding)\(instruction.text)")
    }
    lines += registers()
    lines += pageWalk()
    lines += stack()
    return lines
  }

  // MARK: Code

  private var rip: UInt64 {
    mode == .code64 ? general.rip : (system.cs.base &+ general.rip) & (isProtected ? 0xffff_ffff : 0xf_ffff_ffff)
  }
  private var isProtected: Bool { system.cr0 & 1 != 0 }

  private var mode: CodeMode {
    if system.efer & 1 << 10 != 0, system.cs.attributes & 1 << 9 != 0 { return .code64 }
    return system.cs.attributes & 1 << 10 != 0 ? .code32 : .code16
  }

  private var modeName: String {
    let ring = system.ss.attributes >> 5 & 3
    guard isProtected else { return "real mode" }
    switch mode {
    case .code64: return "long mode, ring \(ring)"
    case .code32: return "\(system.efer & 1 << 10 != 0 ? "compatibility" : "protected") mode, 32-bit, ring \(ring)"
    case .code16: return "protected mode, 16-bit, ring \(ring)"
    }
  }

  func instructions(limit: Int) -> [(address: UInt64, bytes: [UInt8], text: String)] {
    var result: [(address: UInt64, bytes: [UInt8], text: String)] = []
    var address = rip
    while result.count < limit {
      var bytes = read(linear: address, count: Instruction.maximumLength)
      if bytes.isEmpty, result.isEmpty, case .emulationFailure(let known) = reason { bytes = known.array }
      guard !bytes.isEmpty else { break }
      do throws(DecodeError) {
        let buffer = bytes
        let decoded = try decode(buffer)
        result.append((address, Array(bytes.prefix(Int(decoded.length))), decoded.text(at: address)))
        address &+= UInt64(decoded.length)
      } catch {
        result.append((address, bytes, "(\(error))"))
        break
      }
    }
    return result
  }

  private func decode(_ bytes: [UInt8]) throws(DecodeError) -> Instruction {
    try bytes.withUnsafeBytes { buffer in
      Result { () throws(DecodeError) in try Instruction(decoding: buffer, mode: mode) }
    }.get()
  }

  // MARK: Registers

  private func registers() -> [String] {
    let names = ["RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8 ", "R9 "] + (10...15).map { "R\($0)" }
    let values = GeneralRegisters.fields.prefix(16).map { general[keyPath: $0] }
    var lines = stride(from: 0, to: 16, by: 4).map { row in
      (row..<row + 4).map { "\(names[$0]) \(hex(values[$0]))" }.joined(separator: "  ")
    }
    lines.append("RFLAGS \(hex(general.rflags, 8)) [\(RFLAGS(rawValue: general.rflags))]")
    lines.append("CR0 \(hex(system.cr0, 8)) [\(paging.cr0)]")
    lines.append("CR2 \(hex(system.cr2))  CR3 \(hex(system.cr3))  CR8 \(hex(system.cr8, 1))")
    lines.append("CR4 \(hex(system.cr4, 8)) [\(paging.cr4)]")
    lines.append("EFER \(hex(system.efer, 4)) [\(paging.efer)]  APIC base \(hex(system.apicBase, 9))")
    for (name, segment) in [
      ("CS", system.cs), ("SS", system.ss), ("DS", system.ds), ("ES", system.es), ("FS", system.fs), ("GS", system.gs),
      ("TR", system.tr), ("LDT", system.ldt),
    ] {
      lines.append(
        "\(name.count == 2 ? name + " " : name) \(hex(UInt64(segment.selector), 4)) base \(hex(segment.base)) "
          + "limit \(hex(UInt64(segment.limit), 8)) \(describe(segment))")
    }
    lines.append("GDTR base \(hex(system.gdt.base)) limit \(hex(UInt64(system.gdt.limit), 4))")
    lines.append("IDTR base \(hex(system.idt.base)) limit \(hex(UInt64(system.idt.limit), 4))")
    return lines
  }

  private func describe(_ segment: SegmentRegister) -> String {
    let attributes = segment.attributes
    guard attributes & 1 << 7 != 0, attributes & 1 << 12 == 0 else { return "unusable" }
    let ring = "ring \(attributes >> 5 & 3)"
    guard attributes & 1 << 4 != 0 else { return "system type \(attributes & 15), \(ring)" }
    let width = attributes & 1 << 9 != 0 ? "64" : attributes & 1 << 10 != 0 ? "32" : "16"
    let kind = attributes & 8 != 0 ? "code" : "data"
    let access =
      attributes & 8 != 0 ? (attributes & 2 != 0 ? "RX" : "X") : (attributes & 2 != 0 ? "RW" : "R")
    return "\(kind)\(width) \(access), \(ring)"
  }

  // MARK: Memory

  private func stack() -> [String] {
    let width = mode == .code64 ? 8 : mode == .code32 ? 4 : 2
    let base = mode == .code64 ? 0 : system.ss.base
    var lines = ["stack:"]
    for row in 0..<8 {
      let address = base &+ general.rsp &+ UInt64(row * 2 * width)
      let values = (0..<2).map { column -> String in
        let bytes = read(linear: address &+ UInt64(column * width), count: width)
        guard bytes.count == width else { return "unreadable" }
        return hex(bytes.reversed().reduce(0) { $0 << 8 | UInt64($1) }, width * 2)
      }
      lines.append("  \(hex(address)): \(values.joined(separator: " "))")
      if values == ["unreadable", "unreadable"] { break }
    }
    return lines
  }

  /// Bytes at a linear address, fewer than `count` where the mapping ends.
  private func read(linear: UInt64, count: Int) -> [UInt8] {
    var bytes: [UInt8] = []
    while bytes.count < count {
      let address = linear &+ UInt64(bytes.count)
      let run = min(count - bytes.count, Int(0x1000 - address & 0xfff))
      guard let physical = translate(address), let more = try? memory.bytes(physical, count: run) else { break }
      bytes += more
    }
    return bytes
  }

  private var paging: Paging {
    Paging(
      cr0: CR0(rawValue: system.cr0), cr3: system.cr3, cr4: CR4(rawValue: system.cr4),
      efer: EFER(rawValue: system.efer))
  }

  private func readEntry(_ address: UInt64, size: Int) -> UInt64? {
    let address = GuestPhysicalAddress(address)
    return size == 4 ? (try? memory.read(address, as: UInt32.self)).map(UInt64.init) : try? memory.read(address)
  }

  private func translate(_ linear: UInt64) -> GuestPhysicalAddress? {
    (try? paging.translate(linear, read: readEntry)).map { GuestPhysicalAddress($0.physicalAddress) }
  }

  private func pageWalk() -> [String] {
    guard paging.mode != .none else { return ["page walk of RIP: paging is off"] }
    var lines = ["page walk of RIP \(hex(rip)):"]
    do throws(PageWalkFault) {
      let page = try paging.translate(rip, .fetch, read: readEntry) { step in
        lines.append("  level \(step.level) at \(hex(step.entryAddress)): \(hex(step.entry.rawValue)) [\(step.entry)]")
      }
      lines.append("  guest-physical \(hex(page.physicalAddress)), page of \(page.pageSize >> 10) KiB")
    } catch {
      lines.append("  \(error)")
    }
    return lines
  }
}

/// Hexadecimal without a prefix, at least `digits` long, as debuggers print registers.
private func hex(_ value: UInt64, _ digits: Int = 16) -> String {
  let text = String(value, radix: 16)
  return String(repeating: "0", count: max(0, digits - text.count)) + text
}
