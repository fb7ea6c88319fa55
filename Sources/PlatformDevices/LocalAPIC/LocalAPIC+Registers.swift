import Accelerator
import DeviceModel
import Synchronization

extension LocalAPIC {
  // MARK: The register page (xAPIC mode)

  /// Reads up to 4 bytes inside a register at an offset of the page; all ones where they pass its end.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    guard offset < 0x400, offset & 15 + UInt64(clamping: size) <= 4 else { return ~0 }
    return UInt64(read(register: UInt16(offset) & ~15)) >> ((offset & 3) * 8)
  }

  /// Writes a whole register; others are lost (SDM vol. 3, 11.4.1.2).
  public func write(offset: UInt64, size: Int, value: UInt64) {
    guard offset < 0x400, offset & 15 == 0, size == 4 else { return }
    write(register: UInt16(offset), value: UInt32(truncatingIfNeeded: value))
  }

  /// A register of the page; a reserved one reads 0 and is an error.
  public func read(register offset: UInt16) -> UInt32 {
    switch offset {
    case APICRegister.currentCount: return timer.currentCount
    case APICRegister.endOfInterrupt, APICRegister.arbitrationPriority: return 0
    default:
      guard Self.exists(offset) else {
        report(APICError.illegalRegister)
        return 0
      }
      return registers[offset]
    }
  }

  /// Writes a register of the page; a read-only one keeps its value, a reserved one is an error.
  public func write(register offset: UInt16, value: UInt32) {
    switch offset {
    case APICRegister.id: registers[offset] = value & 0xff00_0000
    case APICRegister.taskPriority: setTaskPriority(value)
    case APICRegister.endOfInterrupt: endOfInterrupt()
    case APICRegister.logicalDestination: registers[offset] = value & 0xff00_0000
    case APICRegister.destinationFormat: registers[offset] = value | 0x0fff_ffff
    case APICRegister.spuriousVector: setSpuriousVector(value)
    case APICRegister.errorStatus: registers[offset] = errors.exchange(0, ordering: .relaxed)
    case APICRegister.commandHigh: registers[offset] = isX2APIC ? value : value & 0xff00_0000
    case APICRegister.command: send(low: value)
    case APICRegister.localVectors where offset & 15 == 0: setLocalVector(offset, value)
    case APICRegister.initialCount: timer.setInitialCount(value)
    case APICRegister.divide: timer.setDivide(value & 0xb)
    default: if !Self.exists(offset) { report(APICError.illegalRegister) }
    }
  }

  private static func exists(_ offset: UInt16) -> Bool {
    switch offset & ~15 {
    case APICRegister.id, APICRegister.version, APICRegister.taskPriority...APICRegister.endOfInterrupt,
      APICRegister.logicalDestination...APICRegister.errorStatus, APICRegister.command...APICRegister.currentCount,
      APICRegister.divide:
      offset & 15 == 0
    default: false
    }
  }

  private func setSpuriousVector(_ value: UInt32) {
    registers[APICRegister.spuriousVector] = value & SpuriousVector.writable
    guard value & SpuriousVector.enabled == 0 else { return }
    // SDM vol. 3, 11.4.7.2: a local APIC that software disables masks its local vectors, and they stay so.
    for offset in stride(from: APICRegister.timer, through: APICRegister.error, by: 16) {
      setLocalVector(offset, registers[offset])
    }
    refresh()
  }

  private func setLocalVector(_ offset: UInt16, _ value: UInt32) {
    var value = value & LocalVector.writable(offset)
    if !isSoftwareEnabled { value |= LocalVector.masked }
    if offset == APICRegister.timer { timer.setLocalVector(value) } else { registers[offset] = value }
    if offset == APICRegister.lint0 { refresh() }
  }

  // MARK: Interrupts to others

  /// Sends what the interrupt command register says (SDM vol. 3, 11.6.1), its low half being written with `low`.
  private func send(low: UInt32) {
    // The delivery status is always idle: messages arrive at once.
    registers[APICRegister.command] = low & ~(1 << 12)
    let high = registers[APICRegister.commandHigh]
    guard let mode = DeliveryMode(rawValue: UInt8(low >> 8 & 7)) else { return }
    let isLevel = low & 1 << 15 != 0
    // INIT level de-assert set arbitration ids on processors of old.
    if mode == .initialize, isLevel, low & 1 << 14 == 0 { return }
    let vector = UInt8(truncatingIfNeeded: low)
    if mode == .fixed || mode == .lowestPriority, vector < 16 {
      report(APICError.sendIllegalVector)
      return
    }
    let destination: LocalAPICBus.Destination =
      switch low >> 18 & 3 {
      case 0 where low & 1 << 11 == 0: .physical(isX2APIC ? high : high >> 24)
      case 0: .logical(isX2APIC ? high : high >> 24)
      case 1: .itself
      case 2: .all
      default: .others
      }
    bus.send(
      mode, vector: vector, isLevel: isLevel, to: destination, isWide: isX2APIC, from: self)
  }

  // MARK: Model-specific registers

  /// IA32_APIC_BASE, IA32_TSC_DEADLINE and, in x2APIC mode, the register whose MSR it is; nil means #GP.
  public func readMSR(_ index: UInt32) -> UInt64? {
    switch index {
    case APICModelSpecific.base: return base.load(ordering: .relaxed)
    case APICModelSpecific.deadline: return features.contains(.timestampDeadline) ? timer.deadline : nil
    case APICModelSpecific.first...APICModelSpecific.last:
      let offset = Self.offset(index)
      switch offset {
      case APICRegister.command:
        guard isX2APIC else { return nil }
        return UInt64(registers[offset]) | UInt64(registers[APICRegister.commandHigh]) << 32
      case APICRegister.endOfInterrupt, APICRegister.arbitrationPriority, APICRegister.destinationFormat,
        APICRegister.commandHigh:
        return nil
      default:
        guard isX2APIC, Self.exists(offset) else { return nil }
        return UInt64(read(register: offset))
      }
    default: return nil
    }
  }

  /// Writes what `readMSR` reads; false means #GP: a bit that is reserved, a register that is read-only or not there, a
  /// change of mode that the architecture forbids.
  public func writeMSR(_ index: UInt32, value: UInt64) -> Bool {
    switch index {
    case APICModelSpecific.base: return setBase(value)
    case APICModelSpecific.deadline:
      guard features.contains(.timestampDeadline) else { return false }
      timer.setDeadline(value)
      return true
    case APICModelSpecific.first...APICModelSpecific.last:
      let offset = Self.offset(index)
      guard isX2APIC, let mask = Self.x2APICMask(offset), value & ~mask == 0 else { return false }
      let low = UInt32(truncatingIfNeeded: value)
      switch offset {
      case APICRegister.command:
        registers[APICRegister.commandHigh] = UInt32(truncatingIfNeeded: value >> 32)
        send(low: low)
      case APICRegister.selfInterrupt: send(low: low | 1 << 18)
      default: write(register: offset, value: low)
      }
      return true
    default: return false
    }
  }

  private static func offset(_ index: UInt32) -> UInt16 { UInt16(index - APICModelSpecific.first) << 4 }

  /// The bits that software may set of a register in x2APIC mode (SDM vol. 3, 11.12.1.2 and 11.12.9); nil where it may not write.
  private static func x2APICMask(_ offset: UInt16) -> UInt64? {
    switch offset {
    case APICRegister.endOfInterrupt, APICRegister.errorStatus: 0
    case APICRegister.taskPriority, APICRegister.selfInterrupt: 0xff
    case APICRegister.spuriousVector: UInt64(SpuriousVector.writable)
    // Destination; shorthand, trigger, level, delivery status (ignored), destination and delivery mode, vector.
    case APICRegister.command: 0xffff_ffff_000c_dfff
    // The delivery status, and the remote IRR of the pins, are read-only and ignored.
    case APICRegister.lint0, APICRegister.lint1: UInt64(LocalVector.writable(offset)) | 0x5000
    case APICRegister.localVectors where offset & 15 == 0: UInt64(LocalVector.writable(offset)) | 0x1000
    case APICRegister.initialCount: 0xffff_ffff
    case APICRegister.divide: 0xb
    default: nil
    }
  }

  /// SDM vol. 3, 11.12.5: from disabled to xAPIC, from there to x2APIC, from either to disabled, and no other way.
  private func setBase(_ value: UInt64) -> Bool {
    let old = base.load(ordering: .relaxed)
    let modes = APICBase.enabled | APICBase.extended
    guard isPossible(base: value) else { return false }
    guard value & modes != old & modes else {
      base.store(value, ordering: .relaxed)
      return true
    }
    switch (old & modes, value & modes) {
    case (0, modes), (modes, APICBase.enabled): return false
    case (0, _), (_, 0):
      base.store(value, ordering: .sequentiallyConsistent)
      resetRegisters()
    default:
      base.store(value, ordering: .sequentiallyConsistent)
      registers[APICRegister.id] = UInt32(index)
      registers[APICRegister.logicalDestination] = Self.x2APICLogicalID(index)
      registers[APICRegister.commandHigh] = 0
    }
    return true
  }

  /// Whether a base has no reserved bit and one of the modes that this local APIC has.
  func isPossible(base: UInt64) -> Bool {
    let modes = features.contains(.x2APIC) ? APICBase.enabled | APICBase.extended : APICBase.enabled
    return base & ~(modes | APICBase.isBootProcessor | Self.pageMask) == 0 && base & modes != APICBase.extended
  }

  /// The page's address: up to the 52 bits of a physical address.
  private static let pageMask: UInt64 = 0x000f_ffff_ffff_f000

  /// SDM vol. 3, 11.12.10.2: the cluster in the high half, one bit of sixteen in the low one.
  static func x2APICLogicalID(_ index: Int) -> UInt32 { (UInt32(index) >> 4) << 16 | 1 << (UInt32(index) & 15) }
}
