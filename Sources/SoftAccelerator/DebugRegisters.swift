import CSoftCPU
import X86

/// Breakpoint registers, single-stepping and #DB (SDM vol. 3, chapter 18).
extension Processor {
  // MARK: MOV to and from debug registers

  /// Executes MOV with a debug register.
  func moveDebug(_ i: Instruction) throws(Interruption) {
    let isWrite = i.operands[0].register.class == .debug
    var number = Int(i.operands[isWrite ? 0 : 1].register.index)
    guard number < 8 else { throw .invalidOpcode }
    if number == 4 || number == 5 {
      guard cpu.pointee.cr4 & CR4.de.rawValue == 0 else { throw .invalidOpcode }
      number += 2
    }
    if cpu.pointee.dr.7 & DR7.gd.rawValue != 0 {
      pendingDebug |= DR6.bd.rawValue
      throw .exception(.debug)
    }
    guard isWrite else { return write(i.operands[0].register, soft_debug(cpu)[number]) }
    let value = read(i.operands[1].register)
    switch number {
    case 6:
      guard value >> 32 == 0 else { throw .generalProtection }
      cpu.pointee.dr.6 = Self.debugStatus(value)
    case 7:
      guard value >> 32 == 0 else { throw .generalProtection }
      cpu.pointee.dr.7 = Self.debugControl(value)
    default:
      soft_debug(cpu)[number] = value
    }
    updateDebug()
  }

  /// DR6 with the bits that are fixed.
  static func debugStatus(_ value: UInt64) -> UInt64 { value & 0xe00f | DR6.alwaysSet.rawValue }

  /// DR7 with the bits that are fixed.
  static func debugControl(_ value: UInt64) -> UInt64 { value & 0xffff_23ff | DR7.alwaysSet.rawValue }

  // MARK: Breakpoints

  private enum Kind: UInt64 {
    case execute = 0
    case write = 1
    case port = 2
    case access = 3
  }

  /// What breakpoint `number` watches; nil where it is off.
  private func breakpoint(_ number: UInt64) -> Kind? {
    guard cpu.pointee.dr.7 >> (number &* 2) & 3 != 0 else { return nil }
    let kind = Kind(rawValue: cpu.pointee.dr.7 >> (16 &+ number &* 4) & 3) ?? .execute
    return kind == .port && cpu.pointee.cr4 & CR4.de.rawValue == 0 ? nil : kind
  }

  /// How many bytes breakpoint `number` watches.
  private func length(_ number: UInt64) -> UInt64 {
    switch cpu.pointee.dr.7 >> (18 &+ number &* 4) & 3 {
    case 0: 1
    case 1: 2
    case 2: 8
    default: 4
    }
  }

  /// Derives what must be watched from DR7 and CR4.DE.
  func updateDebug() {
    watchesData = !hostDebug.data.isEmpty
    watchesPorts = false
    watchesCode = false
    for number in 0..<4 as Range<UInt64> {
      switch breakpoint(number) {
      case .execute: watchesCode = true
      case .write, .access: watchesData = true
      case .port: watchesPorts = true
      case nil: break
      }
    }
    updateContext()
  }

  /// Whether instructions must be executed one by one: for single steps, RF or breakpoints.
  var isDebugged: Bool {
    watchesCode || watchesData || watchesPorts
      || cpu.pointee.other_flags & RFLAGS([.tf, .rf]).rawValue != 0
  }

  /// Records the data breakpoints that an access meets.
  func noteDataAccess(_ linear: UInt64, count: Int, isWrite: Bool) {
    noteForHost(linear, count: count, isWrite: isWrite)
    for number in 0..<4 as Range<UInt64> {
      guard let kind = breakpoint(number), kind == .access || kind == .write && isWrite else { continue }
      note(number, linear, UInt64(count))
    }
  }

  /// Records the port breakpoints that an access meets.
  func notePortAccess(_ port: UInt16, size: UInt8) {
    for number in 0..<4 as Range<UInt64> where breakpoint(number) == .port {
      note(number, UInt64(port), UInt64(size))
    }
  }

  private func note(_ number: UInt64, _ address: UInt64, _ count: UInt64) {
    let length = self.length(number)
    let start = soft_debug(cpu)[Int(number)] & ~(length &- 1)
    // Either begins within the other.
    if address &- start < length || start &- address < count { pendingDebug |= 1 << number }
  }

  /// #DB where a breakpoint is on the instruction at RIP and RF does not hold it off.
  func checkCodeBreakpoints() throws(Interruption) {
    // A load of SS holds breakpoints off, too.
    guard watchesCode, cpu.pointee.other_flags & RFLAGS.rf.rawValue == 0, cpu.pointee.interrupt_shadow & 2 == 0 else {
      return
    }
    let address = codeAddress(cpu.pointee.rip)
    var met: UInt64 = 0
    for number in 0..<4 as Range<UInt64>
    where breakpoint(number) == .execute && soft_debug(cpu)[Int(number)] == address {
      met |= 1 << number
    }
    if met != 0 {
      pendingDebug |= met
      throw .exception(.debug)
    }
  }

  /// The end of an instruction that began with `flags` in RFLAGS, in the shadow `shadow`: a single-step trap falls due,
  /// RF has done its work.
  func finishDebugging(_ i: Instruction, flags: UInt64, shadow: UInt8) {
    switch i.operation.mnemonic {
    // They clear TF on the way to their handler, and are not stepped; or see to the trap themselves.
    case .int, .int3, .int1, .syscall, .sysret, .sysretq: break
    case .into where overflow: break
    default:
      // The trap of a load of SS is lost, not late: what follows makes its own.
      let isHeldOff = cpu.pointee.interrupt_shadow & ~shadow & 2 != 0
      if flags & RFLAGS.tf.rawValue != 0, !isHeldOff { pendingDebug |= DR6.bs.rawValue }
    }
    // IRET has loaded RF afresh.
    if flags & RFLAGS.rf.rawValue != 0, i.operation.mnemonic != .iret {
      cpu.pointee.other_flags &= ~RFLAGS.rf.rawValue
    }
  }

  /// Moves what a #DB is about into DR6. The breakpoints' bits are this exception's; the others stay until the program
  /// clears them. Its handler may use the debug registers.
  func recordDebugException() {
    cpu.pointee.dr.6 = cpu.pointee.dr.6 & ~15 | pendingDebug
    pendingDebug = 0
    cpu.pointee.dr.7 &= ~DR7.gd.rawValue
  }
}
