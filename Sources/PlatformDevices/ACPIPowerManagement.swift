import DeviceModel
import StateTree
import Synchronization

/// ACPI's fixed hardware (ACPI 6.5, section 4.8): PM1 event and control blocks, PM timer, one general-purpose event block.
///
/// The SCI is level-triggered: it stands while an enabled event is pending. Writing SLP_TYP 5 with SLP_EN to the
/// control block (0x3400) powers off; SLP_TYP 1 suspends the machine, RAM kept, until an enabled event wakes it.
public final class ACPIPowerManagement: PlatformDevice {
  /// First port of the block.
  public static let port: UInt64 = 0x600
  /// Ports of the block.
  public static let windowSize: UInt64 = 0x40
  /// PM1a event block: status, then enable, 16 bits each.
  public static let eventOffset: UInt64 = 0
  /// PM1a control block.
  public static let controlOffset: UInt64 = 4
  /// PM timer.
  public static let timerOffset: UInt64 = 8
  /// General-purpose event block 0: 16 status bits, then 16 enable bits.
  public static let generalEventOffset: UInt64 = 0x20
  /// The SCI's global system interrupt.
  public static let interrupt: UInt32 = 9
  /// PM timer ticks a second; it has 32 bits.
  public static let timerFrequency: UInt64 = 3_579_545
  /// The SLP_TYP value that \_S3 gives.
  public static let sleepType3: UInt16 = 1
  /// The SLP_TYP value that \_S5 gives.
  public static let sleepType5: UInt16 = 5

  /// `acpi-pm`.
  public let name = "acpi-pm"
  /// One block of ports.
  public let windows: [BusWindow] = [.ports(port, size: windowSize)]
  private let line: InterruptLine.Source
  private let clock: any DeviceClock
  private let machine: any MachineControl
  private let state = Mutex(State())

  private struct State {
    var registers = Registers()
    /// Fires when the PM timer's highest bit changes, while somebody waits for that.
    var timer: (any DeviceTimer)?
  }

  private struct Registers {
    var status: UInt16 = 0
    var enable: UInt16 = 0
    var control = Control.acpiMode
    var generalStatus: UInt16 = 0
    var generalEnable: UInt16 = 0
    /// Half-turns of the PM timer up to which its status bit was brought.
    var countedHalfTurns: UInt64 = 0
    var power = Power.working
  }

  private enum Power: UInt8 {
    case working
    case sleeping
    /// Woken, with the reset that belongs to waking still to come: it keeps the status register.
    case waking
  }

  /// Bits of PM1's status and enable registers.
  private enum Event {
    static let timer: UInt16 = 1 << 0
    static let powerButton: UInt16 = 1 << 8
    static let realTimeClock: UInt16 = 1 << 10
    /// Status only.
    static let wake: UInt16 = 1 << 15
    static let enabled: UInt16 = 0x0721
  }

  private enum Control {
    /// Firmware hands over in ACPI mode; there is no other.
    static let acpiMode: UInt16 = 1
    static let sleepEnable: UInt16 = 1 << 13
    static let sleepType: UInt16 = 7 << 10
  }

  /// A block whose SCI is `line`.
  public init(line: InterruptLine.Source, clock: any DeviceClock, machine: any MachineControl) {
    self.line = line
    self.clock = clock
    self.machine = machine
    let timer = clock.makeTimer { [weak self] in self?.change { _ in } }
    let halfTurns = ticks(at: clock.now()) >> 31
    state.withLock { state in
      state.timer = timer
      state.registers.countedHalfTurns = halfTurns
    }
  }

  /// Presses the power button: the guest is asked to power off, or wakes.
  public func pressPowerButton() {
    signal(Event.powerButton)
  }

  /// The real-time clock's alarm went off.
  public func signalAlarm() {
    signal(Event.realTimeClock)
  }

  /// Wakes a machine that sleeps, for a reason of the user's.
  public func wake() {
    let wakes = state.withLock { wake(&$0.registers) }
    if wakes { machine.request(.wake) }
  }

  /// Raises a general-purpose event (0-15), for hot-plug; others are ignored.
  public func raise(generalEvent bit: Int) {
    guard (0..<16).contains(bit) else { return }
    let wakes = change { registers in
      registers.generalStatus |= 1 << UInt16(bit)
      return registers.generalEnable & 1 << UInt16(bit) != 0 && wake(&registers)
    }
    if wakes { machine.request(.wake) }
  }

  private func signal(_ event: UInt16) {
    let wakes = change { registers in
      registers.status |= event
      // The power button wakes whether or not its interrupt is enabled.
      return (registers.enable | Event.powerButton) & event != 0 && wake(&registers)
    }
    if wakes { machine.request(.wake) }
  }

  private func wake(_ registers: inout Registers) -> Bool {
    guard registers.power == .sleeping else { return false }
    registers.power = .waking
    registers.status |= Event.wake
    return true
  }

  /// Bytes of the registers, whatever the access's size and offset.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    let ticks = ticks(at: clock.now())
    let registers = state.withLock { state in
      count(ticks, &state.registers)
      return state.registers
    }
    return readBytes(offset, size, end: Self.windowSize) { byte($0, registers, ticks) }
  }

  /// Status bits are cleared by writing 1; SLP_EN carries out SLP_TYP.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    let request = change { registers in
      var request: MachineRequest?
      if registers.power == .waking { registers.power = .working }
      writeBytes(offset, size, value, end: Self.windowSize) { offset, byte in
        write(byte, at: offset, &registers)
        guard offset == Self.controlOffset + 1, UInt16(byte) << 8 & Control.sleepEnable != 0 else { return }
        switch (registers.control & Control.sleepType) >> 10 {
        case Self.sleepType5: request = .powerOff
        case Self.sleepType3:
          registers.power = .sleeping
          request = .suspend
        default: break
        }
      }
      return request
    }
    if let request { machine.request(request) }
  }

  private func byte(_ offset: UInt64, _ registers: Registers, _ ticks: UInt64) -> UInt8 {
    let value: UInt64 =
      switch offset & ~1 {
      case Self.eventOffset: UInt64(registers.status)
      case Self.eventOffset + 2: UInt64(registers.enable)
      case Self.controlOffset: UInt64(registers.control)
      case Self.timerOffset: ticks
      case Self.timerOffset + 2: ticks >> 16
      case Self.generalEventOffset: UInt64(registers.generalStatus)
      case Self.generalEventOffset + 2: UInt64(registers.generalEnable)
      default: 0
      }
    return UInt8(truncatingIfNeeded: value >> ((offset & 1) * 8))
  }

  private func write(_ byte: UInt8, at offset: UInt64, _ registers: inout Registers) {
    let shift = UInt16(offset & 1) * 8
    let bits = UInt16(byte) << shift
    let kept = ~(UInt16(0xff) << shift)
    switch offset & ~1 {
    case Self.eventOffset: registers.status &= ~bits
    case Self.eventOffset + 2: registers.enable = (registers.enable & kept | bits) & Event.enabled
    case Self.controlOffset:
      registers.control = (registers.control & kept | bits) & Control.sleepType | Control.acpiMode
    case Self.generalEventOffset: registers.generalStatus &= ~bits
    case Self.generalEventOffset + 2: registers.generalEnable = registers.generalEnable & kept | bits
    default: break
    }
  }

  private func ticks(at time: UInt64) -> UInt64 {
    let (seconds, nanoseconds) = time.quotientAndRemainder(dividingBy: nanosecondsPerSecond)
    return seconds &* Self.timerFrequency &+ nanoseconds * Self.timerFrequency / nanosecondsPerSecond
  }

  /// Sets the timer's status bit where its highest bit changed since the last count.
  private func count(_ ticks: UInt64, _ registers: inout Registers) {
    let halfTurns = ticks >> 31
    if halfTurns != registers.countedHalfTurns { registers.status |= Event.timer }
    registers.countedHalfTurns = halfTurns
  }

  @discardableResult
  private func change<Result>(_ body: (inout Registers) -> Result) -> Result {
    let now = clock.now()
    return state.withLock { state in
      count(ticks(at: now), &state.registers)
      let result = body(&state.registers)
      update(state, now)
      return result
    }
  }

  private func update(_ state: State, _ now: UInt64) {
    let registers = state.registers
    line.set(
      registers.status & registers.enable != 0 || registers.generalStatus & registers.generalEnable != 0)
    if registers.enable & Event.timer != 0, registers.status & Event.timer == 0 {
      let left = (1 << 31) - ticks(at: now) & (1 << 31 - 1)
      state.timer?.arm(at: now &+ left * nanosecondsPerSecond / Self.timerFrequency &+ 1000)
    } else {
      state.timer?.cancel()
    }
  }

  /// The state after power-on; after a wake-up the status says what woke the machine.
  public func reset() {
    change { registers in
      let status = registers.power == .waking ? registers.status : 0
      registers = Registers(status: status, countedHalfTurns: registers.countedHalfTurns)
    }
  }

  /// Version 1.
  public func save() -> StateNode {
    let registers = state.withLock { $0.registers }
    return StateNode(name, version: 1) { writer in
      writer.write(registers.status)
      writer.write(registers.enable)
      writer.write(registers.control)
      writer.write(registers.generalStatus)
      writer.write(registers.generalEnable)
      writer.write(registers.countedHalfTurns)
      writer.write(registers.power.rawValue)
    }
  }

  /// Puts the registers back; guest time is put back first.
  public func restore(_ node: StateNode) throws(StateError) {
    let restored = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      var registers = Registers(
        status: try reader.read(), enable: try reader.read(), control: try reader.read(),
        generalStatus: try reader.read(), generalEnable: try reader.read(), countedHalfTurns: try reader.read())
      let power = try reader.read(UInt8.self)
      guard let known = Power(rawValue: power) else { throw reader.invalid("power state", UInt64(power)) }
      registers.power = known
      return registers
    }
    let now = clock.now()
    state.withLock { state in
      state.registers = restored
      update(state, now)
    }
  }
}
