import Accelerator
import GuestMemory
import Host
import MemoryViews
import StateTree
import Synchronization

/// One machine of software CPUs: slots, doorbells and dirty pages. Interrupt controllers are the VMM's.
public final class SoftVirtualMachine: VirtualMachine {
  /// RAM behind the slots.
  public let memory: GuestMemory
  /// All of them in the VMM.
  public var interrupts: InterruptControllerModel { .userSpace }

  /// Guest time, where it comes from the instructions.
  public var virtualTime: (any VirtualTime)? { time }

  let time: SoftVirtualTime?
  /// What time-stamp counters count, where time is the host's.
  let counter: TimeSource
  let physical = PhysicalMemory()
  let group = ProcessorGroup()
  private let slots = Mutex<[UInt32: Slot]>([:])
  private let doorbells = Mutex<[(doorbell: Doorbell, descriptor: Int32)]>([])
  /// Whether there are doorbells: asked at every device write.
  private let hasDoorbells = Atomic(false)
  /// How many views were made.
  private let views = Atomic<UInt32>(0)
  /// What `readClock` is ahead of the host's clock.
  private let clockOffset = Atomic<UInt64>(0)

  private struct Slot {
    var slot: MemorySlot
    /// A byte a page, where the slot is logged.
    nonisolated(unsafe) var dirty: UnsafeMutablePointer<UInt8>?
  }

  init(memory: GuestMemory, time: SoftVirtualTime? = nil, counter: TimeSource = .monotonic) {
    self.memory = memory
    self.counter = counter
    self.time = time
    // What devices, loaders and debuggers write may be code that a CPU has decoded.
    memory.setWriteObserver { [group] pointer, count in
      group.memoryWritten(UInt(bitPattern: pointer), count: UInt(count))
    }
  }

  deinit {
    memory.setWriteObserver(nil)
    slots.withLock { for (_, slot) in $0 { slot.dirty?.deallocate() } }
  }

  // MARK: Slots

  /// Adds or replaces a slot.
  public func setMemorySlot(_ slot: MemorySlot) throws(AcceleratorError) {
    guard slot.number < Self.slotLimit else { throw .slotNumber(slot.number, limit: Int(Self.slotLimit)) }
    guard (slot.range.start.rawValue | slot.range.size | UInt64(UInt(bitPattern: slot.hostBase))) & 0xfff == 0,
      slot.range.size > 0
    else { throw .badSlot(number: slot.number, range: slot.range) }
    try slots.withLock { slots throws(AcceleratorError) in
      if let other = slots.first(where: { $0.key != slot.number && $0.value.slot.range.overlaps(slot.range) }) {
        throw .call("memory slot \(slot.number) over slot \(other.key)", errno: 17, reason: HostError.reason(17))
      }
      let old = slots[slot.number]
      let pages = Int(slot.range.size >> 12)
      var dirty = old?.slot.range == slot.range ? old?.dirty : nil
      if !slot.logsDirtyPages {
        dirty = nil
      } else if dirty == nil {
        let bytes = UnsafeMutablePointer<UInt8>.allocate(capacity: pages)
        bytes.initialize(repeating: 0, count: pages)
        dirty = bytes
      }
      slots[slot.number] = Slot(slot: slot, dirty: dirty)
      publish(slots)
      if let bytes = old?.dirty, bytes != dirty { bytes.deallocate() }
    }
  }

  /// Slot numbers are below this, as on KVM.
  private static let slotLimit: UInt32 = 32764

  /// Removes a slot.
  public func removeMemorySlot(_ number: UInt32) throws(AcceleratorError) {
    slots.withLock { slots in
      guard let old = slots.removeValue(forKey: number) else { return }
      publish(slots)
      old.dirty?.deallocate()
    }
  }

  /// Shows the CPUs the slots; none uses the old ones afterwards.
  private func publish(_ slots: [UInt32: Slot]) {
    let table = slots.values.map { entry in
      PhysicalMemory.Slot(
        number: entry.slot.number, start: entry.slot.range.start.rawValue, size: entry.slot.range.size,
        host: entry.slot.hostBase, isWritable: entry.slot.access == .readWriteExecute, dirtyPages: entry.dirty)
    }
    // The largest first: it is what most accesses are to.
    physical.publish(table.sorted { $0.size > $1.size })
    group.flush()
  }

  /// Pages of a slot written since the last call.
  public func takeDirtyLog(slot number: UInt32) throws(AcceleratorError) -> [UInt64] {
    try slots.withLock { slots throws(AcceleratorError) in
      guard let slot = slots[number] else { throw .unknownSlot(number) }
      guard let dirty = slot.dirty else {
        throw .call("dirty log of slot \(number)", errno: 2, reason: HostError.reason(2))
      }
      let pages = Int(slot.slot.range.size >> 12)
      var words = [UInt64](repeating: 0, count: (pages + 63) / 64)
      // Taken first, so that a write after the flush is seen again; one between the two is in this log.
      for page in 0..<pages where dirty[page] != 0 {
        dirty[page] = 0
        words[page >> 6] |= 1 << UInt64(page & 63)
      }
      group.flush()
      for page in 0..<pages where dirty[page] != 0 { words[page >> 6] |= 1 << UInt64(page & 63) }
      return words
    }
  }

  /// There are no rings.
  public func collectDirtyRings() throws(AcceleratorError) -> [(slot: UInt32, page: UInt64)] {
    throw .unsupported(engine: "soft", what: "dirty rings")
  }

  // MARK: Views

  /// A view with the next number.
  public func makeView(base: MemoryView?) throws(AcceleratorError) -> MemoryView {
    let number = views.add(1, ordering: .relaxed).newValue
    return base.map { MemoryView(number: number, base: $0) } ?? MemoryView(number: number)
  }

  /// Changes rights, and has every CPU forget what it translated by the old ones.
  public func change(_ changes: [ViewChange]) throws(AcceleratorError) {
    for change in changes { change.apply() }
    group.flush()
  }

  // MARK: vCPUs

  /// A CPU in the state after reset.
  public func makeVCPU(index: Int, cpuid: [CPUIDLeaf]) throws(AcceleratorError) -> any VirtualCPU {
    SoftVirtualCPU(machine: self, index: index, cpuid: cpuid)
  }

  // MARK: Interrupts: the VMM's own controllers take them

  /// Not here.
  public func setInterruptLine(_ gsi: UInt32, level: Bool) throws(AcceleratorError) { throw Self.noController }
  /// Not here.
  public func signalMSI(address: UInt64, data: UInt32) throws(AcceleratorError) { throw Self.noController }
  /// Not here.
  public func setInterruptRoutes(_ routes: [InterruptRoute]) throws(AcceleratorError) { throw Self.noController }
  /// Not here.
  public func attachInterrupt(
    _ gsi: UInt32, eventDescriptor: Int32, resample: Int32?
  ) throws(AcceleratorError) { throw Self.noController }
  /// Not here.
  public func detachInterrupt(_ gsi: UInt32, eventDescriptor: Int32) throws(AcceleratorError) {
    throw Self.noController
  }

  private static var noController: AcceleratorError {
    .unsupported(engine: "soft", what: "interrupt controllers of its own")
  }

  // MARK: Doorbells

  /// Signals the eventfd when the guest writes to the doorbell.
  public func attachDoorbell(_ doorbell: Doorbell, eventDescriptor: Int32) throws(AcceleratorError) {
    guard [0, 1, 2, 4, 8].contains(doorbell.size), doorbell.size != 0 || doorbell.match == nil else {
      throw .call("doorbell of \(doorbell.size) bytes", errno: 22, reason: HostError.reason(22))
    }
    try doorbells.withLock { doorbells throws(AcceleratorError) in
      guard !doorbells.contains(where: { $0.doorbell == doorbell }) else {
        throw .call("doorbell that exists already", errno: 17, reason: HostError.reason(17))
      }
      doorbells.append((doorbell, eventDescriptor))
      hasDoorbells.store(true, ordering: .releasing)
    }
  }

  /// Undoes `attachDoorbell`.
  public func detachDoorbell(_ doorbell: Doorbell, eventDescriptor: Int32) throws(AcceleratorError) {
    try doorbells.withLock { doorbells throws(AcceleratorError) in
      guard let index = doorbells.firstIndex(where: { $0.doorbell == doorbell && $0.descriptor == eventDescriptor })
      else {
        throw .call("doorbell that does not exist", errno: 2, reason: HostError.reason(2))
      }
      doorbells.remove(at: index)
      hasDoorbells.store(!doorbells.isEmpty, ordering: .releasing)
    }
  }

  /// Rings the doorbell that a write hits; false where there is none.
  func ring(_ space: Doorbell.Space, _ address: UInt64, size: UInt8, value: UInt64) -> Bool {
    guard hasDoorbells.load(ordering: .acquiring) else { return false }
    return doorbells.withLock { doorbells in
      for (doorbell, descriptor) in doorbells
      where doorbell.space == space && doorbell.address == address
        && (doorbell.size == 0 || doorbell.size == UInt32(size)) && (doorbell.match ?? value) == value
      {
        EventNotifier.signal(descriptor)
        return true
      }
      return false
    }
  }

  // MARK: Clock and state

  /// Nanoseconds of a clock that runs with the host's: no guest sees it, but it moves with the machine.
  public func readClock() throws(AcceleratorError) -> UInt64 { now() &+ clockOffset.load(ordering: .relaxed) }
  /// Sets what `readClock` returns.
  public func writeClock(_ nanoseconds: UInt64) throws(AcceleratorError) {
    clockOffset.store(nanoseconds &- now(), ordering: .relaxed)
  }

  private func now() -> UInt64 { time?.now ?? TimeSource.monotonic.read(nil) }

  /// The clock: vCPUs and the VMM's interrupt controllers are apart.
  public func save() throws(AcceleratorError) -> StateNode {
    let clock = try readClock()
    return StateNode("soft", version: 1) { $0.write(clock) }
  }

  /// Puts a saved clock in place.
  public func restore(_ node: StateNode) throws(AcceleratorError) {
    do throws(StateError) {
      let clock = try node.read("soft", versions: 1...1) { reader, _ throws(StateError) in try reader.read(UInt64.self)
      }
      clockOffset.store(clock &- now(), ordering: .relaxed)
    } catch {
      throw .state(error)
    }
  }
}
