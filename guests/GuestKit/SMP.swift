import CGuest
import Synchronization

/// The other processors.
enum SMP {
  /// More than these are left asleep.
  static let limit = 64
  private static let trampoline: UInt64 = 0x8000
  nonisolated(unsafe) private static var body: (@convention(c) (Int) -> Void)?
  /// APIC ids by processor number; written before the processor starts.
  nonisolated(unsafe) private static var ids = InlineArray<64, UInt32>(repeating: 0)
  nonisolated(unsafe) private(set) static var count = 1
  private static let online = Atomic<Int>(1)

  static func id(_ processor: Int) -> UInt32 { ids[processor] }

  /// The number of the processor that asks; 0 is the boot processor.
  static var current: Int {
    let id = LocalAPIC.id
    for number in 0..<count where ids[number] == id { return number }
    return 0
  }

  /// Turns the PICs off and starts every processor of the MADT by INIT and SIPI; each runs `body(number)` with interrupts off and then halts.
  static func start(_ body: @escaping @convention(c) (Int) -> Void) {
    self.body = body
    PIC.begin()
    LocalAPIC.begin()
    ids[0] = LocalAPIC.id
    let from = UnsafeRawPointer(bitPattern: UInt(trampoline_address()))!
    UnsafeMutableRawPointer(bitPattern: UInt(trampoline))!.copyMemory(from: from, byteCount: Int(trampoline_size()))
    ACPI.forEachProcessor { id in
      if id == ids[0] || count == limit { return }
      let number = count
      ids[number] = id
      count += 1
      set_ap_stack(guest_allocate(16384, 4096) + 16384)
      LocalAPIC.send(0, to: .processor(id), mode: 5)
      delay(microseconds: 200)
      LocalAPIC.send(UInt8(trampoline >> 12), to: .processor(id), mode: 6)
      wait("a processor starts") { online.load(ordering: .acquiring) == number + 1 }
    }
  }

  fileprivate static func arrive() {
    LocalAPIC.begin()
    let number = online.wrappingAdd(1, ordering: .acquiringAndReleasing).oldValue
    body?(number)
  }
}

@_cdecl("guest_ap_start")
func guestApplicationProcessorStart() { SMP.arrive() }

/// A test-and-set lock.
struct SpinLock: ~Copyable {
  private let taken = Atomic<Bool>(false)

  borrowing func lock() {
    while taken.exchange(true, ordering: .acquiring) {
      while taken.load(ordering: .relaxed) { cpu_pause() }
    }
  }

  borrowing func unlock() { taken.store(false, ordering: .releasing) }
}
