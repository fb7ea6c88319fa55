import DeviceModel
import GuestMemory
import PlatformDevices
import Synchronization

/// Remembers what the devices asked for.
public final class RecordingMachine: MachineControl {
  private let state = Mutex<[MachineRequest]>([])
  /// Nothing asked for.
  public init() {}
  /// Notes the request.
  public func request(_ request: MachineRequest) { state.withLock { $0.append(request) } }
  /// The requests since the last call.
  public func take() -> [MachineRequest] {
    state.withLock { requests in
      defer { requests = [] }
      return requests
    }
  }
}

/// Remembers the levels of the lines, the rises on them, and the messages.
public final class RecordingSink: InterruptSink {
  /// A message-signalled interrupt.
  public struct Message: Equatable, Sendable {
    /// Where it was written.
    public var address: UInt64
    /// What was written.
    public var data: UInt32
    /// A message.
    public init(address: UInt64, data: UInt32) {
      self.address = address
      self.data = data
    }
  }
  private struct State {
    var high: Set<UInt32> = []
    var rises: [UInt32: Int] = [:]
    var messages: [Message] = []
  }
  private let state = Mutex(State())

  /// Every line down.
  public init() {}
  /// Notes the level.
  public func setInterruptLine(_ gsi: UInt32, level: Bool) {
    state.withLock { state in
      if level {
        if state.high.insert(gsi).inserted { state.rises[gsi, default: 0] += 1 }
      } else {
        state.high.remove(gsi)
      }
    }
  }
  /// Notes the message.
  public func signalMSI(address: UInt64, data: UInt32) {
    state.withLock { $0.messages.append(Message(address: address, data: data)) }
  }
  /// Whether a line is up.
  public func isHigh(_ gsi: UInt32) -> Bool { state.withLock { $0.high.contains(gsi) } }
  /// How often a line rose since the start.
  public func rises(_ gsi: UInt32) -> Int { state.withLock { $0.rises[gsi] ?? 0 } }
  /// The messages since the last call.
  public func takeMessages() -> [Message] {
    state.withLock { state in
      defer { state.messages = [] }
      return state.messages
    }
  }
}

/// Remembers the INTR pin's level.
public final class RecordingPin: InterruptRequestPin {
  private let level = Atomic(false)
  /// Down.
  public init() {}
  /// Notes the level.
  public func setInterruptRequest(_ level: Bool) { self.level.store(level, ordering: .relaxed) }
  /// Whether the pin is up.
  public var isHigh: Bool { level.load(ordering: .relaxed) }
}

/// Remembers an IOAPIC's messages and the routes of its pins.
public final class RecordingLocalAPICs: IOAPICOutput {
  private struct State {
    var messages: [InterruptMessage] = []
    var routes: [Int: InterruptMessage] = [:]
  }
  private let state = Mutex(State())
  /// No message, no route.
  public init() {}
  /// Notes the message.
  public func deliver(_ message: InterruptMessage) { state.withLock { $0.messages.append(message) } }
  /// Notes the route.
  public func routeDidChange(pin: Int, to message: InterruptMessage?) { state.withLock { $0.routes[pin] = message } }
  /// The messages since the last call.
  public func take() -> [InterruptMessage] {
    state.withLock { state in
      defer { state.messages = [] }
      return state.messages
    }
  }
  /// Where a pin's interrupts go; nil while it is masked.
  public func route(_ pin: Int) -> InterruptMessage? { state.withLock { $0.routes[pin] } }
}

/// Keeps what a guest prints.
public final class RecordingOutput: SerialOutput {
  private let state = Mutex<[UInt8]>([])
  /// Nothing printed.
  public init() {}
  /// Keeps the byte.
  public func write(_ byte: UInt8) { state.withLock { $0.append(byte) } }
  /// Everything printed so far.
  public var text: String { String(decoding: state.withLock { $0 }, as: UTF8.self) }
}

/// What a device needs around it, in the test's hand.
public struct Fixture: Sendable {
  /// Guest time.
  public let clock: ManualClock
  /// What devices asked of the machine.
  public let machine = RecordingMachine()
  /// Where interrupts arrive.
  public let sink = RecordingSink()
  /// What serial devices print.
  public let output = RecordingOutput()
  /// Port space.
  public let ports = AddressBus(name: "ports")
  /// Memory space outside RAM.
  public let bus = AddressBus(name: "memory")
  /// 1 MiB of RAM at 0 and 64 KiB at 4 GiB.
  public let memory: GuestMemory

  /// A fixture at guest time `now`.
  public init(now: UInt64 = 0) throws(GuestMemoryError) {
    clock = ManualClock(now: now)
    let ranges = [(UInt64(0), UInt64(1 << 20)), (4 << 30, 1 << 16)].compactMap {
      GuestRange(start: GuestPhysicalAddress($0.0), size: $0.1)
    }
    memory = try GuestMemory(ranges)
  }

  /// A device's end of a new line.
  public func line(_ gsi: UInt32) -> InterruptLine.Source { InterruptLine(gsi: gsi, sink: sink).makeSource() }

  /// Places the device on the buses.
  public func attach(_ device: any PlatformDevice) throws(DeviceModelError) {
    try device.attach(ports: ports, memory: bus)
  }

  /// A timer with lines of its own, and nobody to take off theirs.
  public func hpet() -> HPET {
    HPET(
      lines: HPET.routes.map { line($0) }, timerLine: line(0), clockLine: line(8), clock: clock, interrupts: sink,
      onLegacyReplacement: { _ in })
  }

  /// A PCI host whose BARs move on the fixture's buses.
  public func pciHost() -> PCIHost { PCIHost(ports: ports, memory: bus, interrupts: sink) }

  /// A guest's `in`.
  public func input(_ port: UInt64, size: Int = 1) -> UInt64 {
    ports.read(port, size: size) & (size == 8 ? ~0 : (1 << UInt64(size * 8)) - 1)
  }

  /// A guest's `out`.
  public func output(_ port: UInt64, _ value: UInt64, size: Int = 1) {
    ports.write(port, size: size, value: value)
  }
}

/// Random numbers that a seed repeats (splitmix64).
public struct SeededGenerator: RandomNumberGenerator {
  private var state: UInt64
  /// The sequence of `seed`.
  public init(seed: UInt64) { state = seed }
  /// The next 64 bits.
  public mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var z = state
    z = (z ^ z >> 30) &* 0xbf58_476d_1ce4_e5b9
    z = (z ^ z >> 27) &* 0x94d0_49bb_1331_11eb
    return z ^ z >> 31
  }
}
