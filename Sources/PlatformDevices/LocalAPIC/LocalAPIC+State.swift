import DeviceModel
import StateTree
import Synchronization

extension LocalAPIC {
  /// Bytes of the register page that `page` gives and `load` takes: KVM's `struct kvm_lapic_state`.
  public static let pageSize = 1024

  // MARK: Reset

  /// The state after power-on (SDM vol. 3, 11.4.7.1).
  public func reset() {
    base.store(Self.resetBase(index), ordering: .relaxed)
    events.store(0, ordering: .relaxed)
    resetRegisters()
  }

  /// What INIT leaves: the APIC base and the xAPIC's id stay (SDM vol. 3, 11.4.7.3).
  public func initialize() {
    let id = registers[APICRegister.id]
    resetRegisters()
    registers[APICRegister.id] = id
  }

  func resetRegisters() {
    for offset in stride(from: UInt16(0), to: 0x400, by: 16) { registers[offset] = 0 }
    errors.store(0, ordering: .relaxed)
    registers[APICRegister.id] = isX2APIC ? UInt32(index) : UInt32(truncatingIfNeeded: index & 0xff) << 24
    registers[APICRegister.version] = Self.version
    registers[APICRegister.destinationFormat] = 0xffff_ffff
    registers[APICRegister.spuriousVector] = 0xff
    if isX2APIC { registers[APICRegister.logicalDestination] = Self.x2APICLogicalID(index) }
    for offset in stride(from: APICRegister.timer, through: APICRegister.error, by: 16) {
      registers[offset] = LocalVector.masked
    }
    // A PC's firmware leaves the boot processor in virtual wire mode; there is none here that runs before the guest.
    if index == 0 { registers[APICRegister.lint0] = UInt32(DeliveryMode.external.rawValue) << 8 }
    timer.restore(LocalAPICTimer.State())
    updatePriority()
  }

  // MARK: Saved state

  /// Version 1: the base, the register words, errors and messages that wait, and the timer.
  public func save() -> StateNode {
    let timer = timer.saved
    return StateNode(name, version: 1) { writer in
      writer.write(base.load(ordering: .relaxed))
      for offset in stride(from: UInt16(0), to: 0x400, by: 16) { writer.write(registers[offset]) }
      writer.write(errors.load(ordering: .relaxed))
      writer.write(events.load(ordering: .relaxed))
      writer.write(timer.expiry != nil)
      writer.write(timer.expiry ?? 0)
      writer.write(timer.deadline)
    }
  }

  /// Puts a saved state back; guest time, and the time-stamp counter where there is a deadline, are put back first.
  public func restore(_ node: StateNode) throws(StateError) {
    let saved = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      let base = try reader.read(UInt64.self)
      guard isPossible(base: base) else { throw reader.invalid("APIC base", base) }
      var words: [UInt32] = []
      for _ in 0..<APICRegister.count { words.append(try reader.read()) }
      let errors = try reader.read(UInt32.self)
      let events = try reader.read(UInt32.self)
      let hasExpiry = try reader.read(Bool.self)
      let expiry = try reader.read(UInt64.self)
      let deadline = try reader.read(UInt64.self)
      return (
        base: base, words: words, errors: errors, events: events,
        timer: LocalAPICTimer.State(expiry: hasExpiry ? expiry : nil, deadline: deadline)
      )
    }
    base.store(saved.base, ordering: .relaxed)
    errors.store(saved.errors, ordering: .relaxed)
    events.store(saved.events, ordering: .relaxed)
    load(saved.words)
    timer.restore(saved.timer)
    updatePriority()
  }

  /// Puts register words in place, whatever they are, as far as a guest could have put them there.
  private func load(_ words: [UInt32]) {
    for (index, word) in words.enumerated() { registers[UInt16(index) << 4] = word }
    registers[APICRegister.version] = Self.version
    if isX2APIC {
      registers[APICRegister.id] = UInt32(index)
      registers[APICRegister.logicalDestination] = Self.x2APICLogicalID(index)
    } else {
      registers[APICRegister.id] &= 0xff00_0000
      registers[APICRegister.logicalDestination] &= 0xff00_0000
    }
    registers[APICRegister.destinationFormat] |= 0x0fff_ffff
    registers[APICRegister.taskPriority] &= 0xff
    registers[APICRegister.spuriousVector] &= SpuriousVector.writable
    registers[APICRegister.divide] &= 0xb
    for offset in stride(from: APICRegister.timer, through: APICRegister.error, by: 16) {
      registers[offset] &= LocalVector.writable(offset)
    }
    for register in [APICRegister.requests, APICRegister.inService] { registers[register] &= 0xffff_0000 }
  }

  // MARK: Between engines

  /// The register page as KVM_GET_LAPIC gives it: little-endian words, 16 bytes apart, the id in bits 24-31 in either mode.
  public var page: [UInt8] {
    var bytes = [UInt8](repeating: 0, count: Self.pageSize)
    for offset in stride(from: UInt16(0), to: 0x400, by: 16) {
      var word = registers[offset]
      if offset == APICRegister.currentCount { word = timer.currentCount }
      if offset == APICRegister.id, isX2APIC { word <<= 24 }
      for byte in 0..<4 { bytes[Int(offset) + byte] = UInt8(truncatingIfNeeded: word >> UInt32(byte * 8)) }
    }
    return bytes
  }

  /// IA32_APIC_BASE and IA32_TSC_DEADLINE, which a page does not hold, are in a vCPU's state apart.
  public var modelSpecific: (base: UInt64, deadline: UInt64) { (base.load(ordering: .relaxed), timer.deadline) }

  /// Takes over from an engine that had the local APIC itself; throws where the base or the page's size cannot be.
  public func load(page: [UInt8], base newBase: UInt64, deadline: UInt64) throws(StateError) {
    guard page.count == Self.pageSize else {
      throw .invalid(node: name, field: "page size", value: UInt64(page.count))
    }
    guard isPossible(base: newBase) else {
      throw .invalid(node: name, field: "APIC base", value: newBase)
    }
    base.store(newBase, ordering: .relaxed)
    let words = stride(from: 0, to: Self.pageSize, by: 16).map { offset in
      (0..<4).reduce(UInt32(0)) { $0 | UInt32(page[offset + $1]) << UInt32($1 * 8) }
    }
    load(words)
    errors.store(0, ordering: .relaxed)
    events.store(0, ordering: .relaxed)
    timer.restore(count: words[Int(APICRegister.currentCount) / 16], deadline: deadline)
    updatePriority()
  }
}
