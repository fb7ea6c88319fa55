import Accelerator
import CLinux
import Glibc
import GuestMemory
import Host
import StateTree
import Synchronization

/// One KVM virtual machine: slots, interrupt controllers, routes, doorbells, dirty pages.
public final class KVMVirtualMachine: VirtualMachine {
  /// RAM behind the slots.
  public let memory: GuestMemory
  /// Where the interrupt controllers live.
  public let interrupts: InterruptControllerModel

  let accelerator: KVMAccelerator
  let descriptor: FileDescriptor
  /// Whether the host tells an exception's payload (CR2, DR6) and a pending triple fault in a vCPU's events.
  let hasExceptionPayloads: Bool
  let hasTripleFaultEvents: Bool
  private let slots = Mutex<[UInt32: MemorySlot]>([:])
  let views = Condition(Views())
  let viewsExist = Atomic(false)
  /// Whether there are views, and ever were: from then on vCPUs pass the gate.
  @inline(__always)
  var hasViews: Bool { viewsExist.load(ordering: .relaxed) }
  let gate = KVMGate()
  private let members = Mutex<[Member]>([])
  private let doorbells = Mutex<[(doorbell: Doorbell, descriptor: Int32)]>([])
  /// The table of slots that lookups use, replaced as a whole.
  private let table = Mutex<[MemorySlot]>([])

  private struct Member {
    weak var vcpu: KVMVirtualCPU?
  }
  private let rings = Mutex<[DirtyRing]>([])

  /// Below the boot ROM, where no RAM and no device is: VMX needs three pages for a task-state segment, one for an identity map.
  private static let identityMapAddress: UInt64 = 0xfeff_c000
  private static let taskStateAddress: Int = 0xfeff_d000

  /// Whether it is the machine of a view, whose slots nobody looks up.
  private let isShell: Bool

  init(
    accelerator: KVMAccelerator, memory: GuestMemory, interrupts: InterruptControllerModel, isShell: Bool = false
  ) throws(AcceleratorError) {
    self.isShell = isShell
    self.accelerator = accelerator
    self.memory = memory
    self.interrupts = interrupts
    let machine = FileDescriptor(
      owning: try kvmCall("KVM_CREATE_VM", accelerator.device.rawValue, CLINUX_KVM_CREATE_VM))
    var identity = Self.identityMapAddress
    try kvmCall("KVM_SET_IDENTITY_MAP_ADDR", machine.rawValue, CLINUX_KVM_SET_IDENTITY_MAP_ADDR, with: &identity)
    _ = try kvmCall(
      "KVM_SET_TSS_ADDR", machine.rawValue, CLINUX_KVM_SET_TSS_ADDR,
      UnsafeMutableRawPointer(bitPattern: Self.taskStateAddress))
    let number = machine.rawValue
    // Optional: they make exits carry the failing instruction and pending events complete.
    _ = try Self.enableWhereKnown(KVM_CAP_EXIT_ON_EMULATION_FAILURE, on: number, accelerator)
    hasExceptionPayloads = try Self.enableWhereKnown(KVM_CAP_EXCEPTION_PAYLOAD, on: number, accelerator)
    hasTripleFaultEvents = try Self.enableWhereKnown(KVM_CAP_X86_TRIPLE_FAULT_EVENT, on: number, accelerator)
    if let entries = accelerator.dirtyRingEntries {
      guard accelerator.extensionValue(KVM_CAP_DIRTY_LOG_RING) > 0 else {
        throw .unsupported(engine: "kvm", what: "the dirty ring (KVM_CAP_DIRTY_LOG_RING)")
      }
      try Self.enable(KVM_CAP_DIRTY_LOG_RING, UInt64(entries * MemoryLayout<kvm_dirty_gfn>.stride), on: number)
    }
    switch interrupts {
    case .inKernel:
      guard accelerator.capabilities.contains(.inKernelInterrupts) else {
        throw .unsupported(engine: "kvm", what: "in-kernel interrupt controllers")
      }
      _ = try kvmCall("KVM_CREATE_IRQCHIP", machine.rawValue, CLINUX_KVM_CREATE_IRQCHIP)
      var timer = kvm_pit_config()
      timer.flags = UInt32(KVM_PIT_SPEAKER_DUMMY)
      try kvmCall("KVM_CREATE_PIT2", machine.rawValue, CLINUX_KVM_CREATE_PIT2, with: &timer)
    case .split:
      guard accelerator.capabilities.contains(.splitInterrupts) else {
        throw .unsupported(engine: "kvm", what: "the split interrupt controller")
      }
      try Self.enable(KVM_CAP_SPLIT_IRQCHIP, 24, on: number)
    case .userSpace:
      if accelerator.capabilities.contains(.controllerRegisters) {
        try Self.takeControllerRegisters(on: machine.rawValue)
      }
    }
    descriptor = machine
    if interrupts == .inKernel { try setInterruptRoutes(InterruptRoute.legacy) }
  }

  private static func enableWhereKnown(
    _ capability: Int32, on machine: Int32, _ accelerator: KVMAccelerator
  ) throws(AcceleratorError) -> Bool {
    guard accelerator.extensionValue(capability) > 0 else { return false }
    try enable(capability, 1, on: machine)
    return true
  }

  static func enable(
    _ capability: Int32, _ argument: UInt64, on machine: Int32
  ) throws(AcceleratorError) {
    var request = kvm_enable_cap()
    request.cap = UInt32(capability)
    request.args.0 = argument
    try kvmCall("KVM_ENABLE_CAP", machine, CLINUX_KVM_ENABLE_CAP, with: &request)
  }

  /// The vCPUs.
  var vcpus: [KVMVirtualCPU] { members.withLock { $0.compactMap(\.vcpu) } }
  /// The slots.
  var slotTable: [MemorySlot] { table.withLock { $0 } }
  /// The doorbells, for views still to come.
  var attachedDoorbells: [(doorbell: Doorbell, descriptor: Int32)] { doorbells.withLock { $0 } }

  /// Shows lookups the slots as they are.
  private func publishTable() {
    if isShell { return }
    let now = slots.withLock { Array($0.values) }
    table.withLock { $0 = now }
  }

  /// The slot with an address.
  func slot(containing address: GuestPhysicalAddress) -> MemorySlot? {
    table.withLock { table in table.first { $0.range.contains(address) } }
  }

  /// Adds or replaces a slot. KVM cannot resize one or change its access, so a changed slot is removed first.
  public func setMemorySlot(_ slot: MemorySlot) throws(AcceleratorError) {
    guard hasViews else { return try setSlot(slot) }
    try gate.whileClosed(vcpus) { () throws(AcceleratorError) in
      try setSlot(slot)
      try updateViews(removed: slot.number, set: slot)
    }
  }

  private func setSlot(_ slot: MemorySlot) throws(AcceleratorError) {
    defer { publishTable() }
    // Beyond its limit KVM may take the number's upper half for an address space.
    let limit = Int(accelerator.extensionValue(KVM_CAP_NR_MEMSLOTS))
    guard slot.number < limit else { throw .slotNumber(slot.number, limit: limit) }
    guard (slot.range.start.rawValue | slot.range.size | UInt64(UInt(bitPattern: slot.hostBase))) & 0xfff == 0,
      slot.range.size > 0
    else { throw .badSlot(number: slot.number, range: slot.range) }
    try slots.withLock { slots throws(AcceleratorError) in
      guard let old = slots[slot.number],
        old.range != slot.range || old.hostBase != slot.hostBase || old.access != slot.access
      else {
        try place(slot)
        slots[slot.number] = slot
        return
      }
      try displace(old)
      do throws(AcceleratorError) {
        try place(slot)
        slots[slot.number] = slot
      } catch {
        try place(old)
        throw error
      }
    }
  }

  private func place(_ slot: MemorySlot) throws(AcceleratorError) {
    var flags: UInt32 = 0
    if slot.access == .readExecute { flags |= CLINUX_KVM_MEM_READONLY }
    if slot.logsDirtyPages { flags |= CLINUX_KVM_MEM_LOG_DIRTY_PAGES }
    var region = kvm_userspace_memory_region(
      slot: slot.number, flags: flags, guest_phys_addr: slot.range.start.rawValue, memory_size: slot.range.size,
      userspace_addr: UInt64(UInt(bitPattern: slot.hostBase)))
    try kvmCall("KVM_SET_USER_MEMORY_REGION", descriptor.rawValue, CLINUX_KVM_SET_USER_MEMORY_REGION, with: &region)
  }

  private func displace(_ slot: MemorySlot) throws(AcceleratorError) {
    var region = kvm_userspace_memory_region(
      slot: slot.number, flags: 0, guest_phys_addr: slot.range.start.rawValue, memory_size: 0, userspace_addr: 0)
    try kvmCall("KVM_SET_USER_MEMORY_REGION", descriptor.rawValue, CLINUX_KVM_SET_USER_MEMORY_REGION, with: &region)
  }

  /// Removes a slot; unknown numbers are ignored.
  public func removeMemorySlot(_ number: UInt32) throws(AcceleratorError) {
    guard hasViews else { return try removeSlot(number) }
    try gate.whileClosed(vcpus) { () throws(AcceleratorError) in
      try removeSlot(number)
      try updateViews(removed: number, set: nil)
    }
  }

  private func removeSlot(_ number: UInt32) throws(AcceleratorError) {
    defer { publishTable() }
    try slots.withLock { slots throws(AcceleratorError) in
      guard let slot = slots[number] else { return }
      try displace(slot)
      slots[number] = nil
    }
  }

  /// A vCPU, in the state after reset.
  public func makeVCPU(index: Int, cpuid: [CPUIDLeaf]) throws(AcceleratorError) -> any VirtualCPU {
    let vcpu = try KVMVirtualCPU(machine: self, index: index, cpuid: cpuid)
    members.withLock { $0.append(Member(vcpu: vcpu)) }
    if let entries = accelerator.dirtyRingEntries {
      let ring = try DirtyRing(vcpu: vcpu.face.descriptor, entries: entries)
      rings.withLock { $0.append(ring) }
    }
    return vcpu
  }

  /// Drives a GSI (`KVM_IRQ_LINE`).
  public func setInterruptLine(_ gsi: UInt32, level: Bool) throws(AcceleratorError) {
    var request = kvm_irq_level()
    request.irq = gsi
    request.level = level ? 1 : 0
    try kvmCall("KVM_IRQ_LINE", descriptor.rawValue, CLINUX_KVM_IRQ_LINE, with: &request)
  }

  /// Sends a message-signalled interrupt (`KVM_SIGNAL_MSI`); one that no LAPIC takes is lost, as on the bus.
  public func signalMSI(address: UInt64, data: UInt32) throws(AcceleratorError) {
    var message = kvm_msi()
    message.address_lo = UInt32(truncatingIfNeeded: address)
    message.address_hi = UInt32(truncatingIfNeeded: address >> 32)
    message.data = data
    do {
      try kvmCall("KVM_SIGNAL_MSI", descriptor.rawValue, CLINUX_KVM_SIGNAL_MSI, with: &message)
    } catch .call(_, errno: EPERM, _) {
      // KVM's -1 for "no LAPIC took it", read as an errno.
    }
  }

  /// Replaces the GSI routing table.
  public func setInterruptRoutes(_ routes: [InterruptRoute]) throws(AcceleratorError) {
    let header = MemoryLayout<kvm_irq_routing>.size
    let stride = MemoryLayout<kvm_irq_routing_entry>.stride
    let table = UnsafeMutableRawPointer.allocate(byteCount: header + routes.count * stride, alignment: 8)
    defer { table.deallocate() }
    table.initializeMemory(as: UInt8.self, repeating: 0, count: header + routes.count * stride)
    table.assumingMemoryBound(to: kvm_irq_routing.self).pointee.nr = UInt32(routes.count)
    let entries = (table + header).assumingMemoryBound(to: kvm_irq_routing_entry.self)
    for (index, route) in routes.enumerated() {
      entries[index].gsi = route.gsi
      switch route.target {
      case .pic(let second, let pin):
        entries[index].type = UInt32(KVM_IRQ_ROUTING_IRQCHIP)
        entries[index].u.irqchip.irqchip = UInt32(second ? KVM_IRQCHIP_PIC_SLAVE : KVM_IRQCHIP_PIC_MASTER)
        entries[index].u.irqchip.pin = pin
      case .ioapic(let pin):
        entries[index].type = UInt32(KVM_IRQ_ROUTING_IRQCHIP)
        entries[index].u.irqchip.irqchip = UInt32(KVM_IRQCHIP_IOAPIC)
        entries[index].u.irqchip.pin = pin
      case .message(let address, let data):
        entries[index].type = UInt32(KVM_IRQ_ROUTING_MSI)
        entries[index].u.msi.address_lo = UInt32(truncatingIfNeeded: address)
        entries[index].u.msi.address_hi = UInt32(truncatingIfNeeded: address >> 32)
        entries[index].u.msi.data = data
      }
    }
    _ = try kvmCall("KVM_SET_GSI_ROUTING", descriptor.rawValue, CLINUX_KVM_SET_GSI_ROUTING, table)
  }

  /// Attaches an eventfd to a GSI (`KVM_IRQFD`).
  public func attachInterrupt(
    _ gsi: UInt32, eventDescriptor: Int32, resample: Int32?
  ) throws(AcceleratorError) {
    var request = kvm_irqfd()
    request.fd = UInt32(bitPattern: eventDescriptor)
    request.gsi = gsi
    if let resample {
      request.flags = CLINUX_KVM_IRQFD_FLAG_RESAMPLE
      request.resamplefd = UInt32(bitPattern: resample)
    }
    try kvmCall("KVM_IRQFD", descriptor.rawValue, CLINUX_KVM_IRQFD, with: &request)
  }

  /// Detaches an eventfd from a GSI.
  public func detachInterrupt(_ gsi: UInt32, eventDescriptor: Int32) throws(AcceleratorError) {
    var request = kvm_irqfd()
    request.fd = UInt32(bitPattern: eventDescriptor)
    request.gsi = gsi
    request.flags = CLINUX_KVM_IRQFD_FLAG_DEASSIGN
    try kvmCall("KVM_IRQFD", descriptor.rawValue, CLINUX_KVM_IRQFD, with: &request)
  }

  /// Attaches a doorbell (`KVM_IOEVENTFD`).
  public func attachDoorbell(_ doorbell: Doorbell, eventDescriptor: Int32) throws(AcceleratorError) {
    try setDoorbell(doorbell, eventDescriptor, flags: 0)
    for shell in shells { try shell.attachDoorbell(doorbell, eventDescriptor: eventDescriptor) }
    doorbells.withLock { $0.append((doorbell, eventDescriptor)) }
  }

  /// The views' virtual machines.
  private var shells: [KVMVirtualMachine] { views.withLock { $0.known.values.map(\.shell) } }

  /// Detaches a doorbell.
  public func detachDoorbell(_ doorbell: Doorbell, eventDescriptor: Int32) throws(AcceleratorError) {
    try setDoorbell(doorbell, eventDescriptor, flags: CLINUX_KVM_IOEVENTFD_FLAG_DEASSIGN)
    for shell in shells { try shell.detachDoorbell(doorbell, eventDescriptor: eventDescriptor) }
    doorbells.withLock { $0.removeAll { $0.doorbell == doorbell && $0.descriptor == eventDescriptor } }
  }

  private func setDoorbell(
    _ doorbell: Doorbell, _ eventDescriptor: Int32, flags: UInt32
  ) throws(AcceleratorError) {
    var request = kvm_ioeventfd()
    request.fd = eventDescriptor
    request.addr = doorbell.address
    request.len = doorbell.size
    request.flags = flags
    if doorbell.space == .port { request.flags |= CLINUX_KVM_IOEVENTFD_FLAG_PIO }
    if let match = doorbell.match {
      request.flags |= CLINUX_KVM_IOEVENTFD_FLAG_DATAMATCH
      request.datamatch = match
    }
    try kvmCall("KVM_IOEVENTFD", descriptor.rawValue, CLINUX_KVM_IOEVENTFD, with: &request)
  }

  /// Pages the guest wrote (`KVM_GET_DIRTY_LOG`).
  public func takeDirtyLog(slot number: UInt32) throws(AcceleratorError) -> [UInt64] {
    guard let slot = slots.withLock({ $0[number] }) else { throw .unknownSlot(number) }
    var words = [UInt64](repeating: 0, count: Int((slot.range.size >> 12) + 63) / 64)
    let fd = descriptor.rawValue
    let result = words.withUnsafeMutableBytes { buffer in
      Result { () throws(AcceleratorError) in
        var log = kvm_dirty_log()
        log.slot = number
        log.dirty_bitmap = buffer.baseAddress
        try kvmCall("KVM_GET_DIRTY_LOG", fd, CLINUX_KVM_GET_DIRTY_LOG, with: &log)
      }
    }
    try result.get()
    try mergeViewLogs(number, into: &words)
    return words
  }

  /// Pages in all dirty rings, which are empty and armed again afterwards.
  public func collectDirtyRings() throws(AcceleratorError) -> [(slot: UInt32, page: UInt64)] {
    guard accelerator.dirtyRingEntries != nil else {
      throw .unsupported(engine: accelerator.name, what: "a dirty ring in a virtual machine that was made without")
    }
    let pages = rings.withLock { rings in rings.flatMap { $0.collect() } }
    _ = try kvmCall("KVM_RESET_DIRTY_RINGS", descriptor.rawValue, CLINUX_KVM_RESET_DIRTY_RINGS)
    return pages
  }

  /// Nanoseconds of the paravirtual clock (`KVM_GET_CLOCK`).
  public func readClock() throws(AcceleratorError) -> UInt64 {
    var clock = kvm_clock_data()
    try kvmCall("KVM_GET_CLOCK", descriptor.rawValue, CLINUX_KVM_GET_CLOCK, with: &clock)
    return clock.clock
  }

  /// Sets the paravirtual clock (`KVM_SET_CLOCK`).
  public func writeClock(_ nanoseconds: UInt64) throws(AcceleratorError) {
    var clock = kvm_clock_data()
    clock.clock = nanoseconds
    try kvmCall("KVM_SET_CLOCK", descriptor.rawValue, CLINUX_KVM_SET_CLOCK, with: &clock)
    for shell in shells { try shell.writeClock(nanoseconds) }
  }

  /// In-kernel interrupt controllers and PIT as KVM's own structures, and the clock.
  public func save() throws(AcceleratorError) -> StateNode {
    let clock = try readClock()
    var chips: [[UInt8]] = []
    var timer: [UInt8] = []
    if interrupts == .inKernel {
      for id in Self.chipIDs {
        var chip = kvm_irqchip()
        chip.chip_id = id
        try kvmCall("KVM_GET_IRQCHIP", descriptor.rawValue, CLINUX_KVM_GET_IRQCHIP, with: &chip)
        chips.append(withUnsafeBytes(of: &chip) { Array($0) })
      }
      var state = kvm_pit_state2()
      try kvmCall("KVM_GET_PIT2", descriptor.rawValue, CLINUX_KVM_GET_PIT2, with: &state)
      timer = withUnsafeBytes(of: &state) { Array($0) }
    }
    return StateNode(Self.nodeName, version: Self.versions.upperBound) { writer in
      writer.write(clock)
      writer.write(UInt8(chips.count))
      for chip in chips { writer.write(chip) }
      writer.write(timer)
    }
  }

  /// Puts back what `save` returned.
  public func restore(_ node: StateNode) throws(AcceleratorError) {
    let clock: UInt64
    var chips: [[UInt8]] = []
    let timer: [UInt8]
    do {
      (clock, chips, timer) = try node.read(Self.nodeName, versions: Self.versions) {
        reader, _ throws(StateError) in
        let clock = try reader.read(UInt64.self)
        let count = try reader.read(UInt8.self)
        guard count == (interrupts == .inKernel ? Self.chipIDs.count : 0) else {
          throw reader.invalid("interrupt controllers", UInt64(count))
        }
        var chips: [[UInt8]] = []
        for _ in 0..<count {
          let chip = try reader.read(limit: MemoryLayout<kvm_irqchip>.size)
          guard chip.count == MemoryLayout<kvm_irqchip>.size else {
            throw reader.invalid("interrupt controller size", UInt64(chip.count))
          }
          chips.append(chip)
        }
        let timer = try reader.read(limit: MemoryLayout<kvm_pit_state2>.size)
        guard timer.count == (count == 0 ? 0 : MemoryLayout<kvm_pit_state2>.size) else {
          throw reader.invalid("timer size", UInt64(timer.count))
        }
        return (clock, chips, timer)
      }
    } catch {
      throw .state(error)
    }
    for (index, bytes) in chips.enumerated() {
      var chip = kvm_irqchip()
      withUnsafeMutableBytes(of: &chip) { $0.copyBytes(from: bytes) }
      chip.chip_id = Self.chipIDs[index]
      try kvmCall("KVM_SET_IRQCHIP", descriptor.rawValue, CLINUX_KVM_SET_IRQCHIP, with: &chip)
    }
    if !timer.isEmpty {
      var state = kvm_pit_state2()
      withUnsafeMutableBytes(of: &state) { $0.copyBytes(from: timer) }
      try kvmCall("KVM_SET_PIT2", descriptor.rawValue, CLINUX_KVM_SET_PIT2, with: &state)
    }
    try writeClock(clock)
  }

  private static let nodeName = "kvm"
  private static let versions: ClosedRange<UInt32> = 1...1
  private static let chipIDs = [
    UInt32(KVM_IRQCHIP_PIC_MASTER), UInt32(KVM_IRQCHIP_PIC_SLAVE), UInt32(KVM_IRQCHIP_IOAPIC),
  ]
}
