import DeviceModel
import StateTree
import Synchronization

/// ACPI's fixed hardware (ACPI 6.5, section 4.8): PM1 event and control blocks, PM timer, one general-purpose event block.
///
/// The SCI is level-triggered: it stands while an enabled event is pending.
public final class ACPIPowerManagement: BusDevice {
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
  /// PM timer ticks a second.
  public static let timerFrequency: UInt64 = 3_579_545
  /// The SLP_TYP value that \_S3 gives.
  public static let sleepType3: UInt16 = 1
  /// The SLP_TYP value that \_S5 gives.
  public static let sleepType5: UInt16 = 5

  /// `acpi-pm`.
  public let name = "acpi-pm"
  private let line: InterruptLine.Source
  private let clock: any DeviceClock
  private let machine: any MachineControl
  private let state = Mutex(State())

  private struct State: Equatable {
    var status: UInt16 = 0
    var enable: UInt16 = 0
    /// SCI_EN: firmware hands over in ACPI mode, there is no other.
    var control: UInt16 = 1
    var generalStatus: UInt16 = 0
    var generalEnable: UInt16 = 0
  }

  private static let powerButton: UInt16 = 1 << 8
  private static let wakeStatus: UInt16 = 1 << 15
  private static let sleepEnable: UInt16 = 1 << 13

  /// A block whose SCI is `line`.
  public init(line: InterruptLine.Source, clock: any DeviceClock, machine: any MachineControl) {
    self.line = line
    self.clock = clock
    self.machine = machine
  }

  /// Presses the power button.
  public func pressPowerButton() {
    change { $0.status |= Self.powerButton }
  }

  /// Raises a general-purpose event (0-15), for hot-plug.
  public func raise(generalEvent bit: Int) {
    guard (0..<16).contains(bit) else { return }
    change { $0.generalStatus |= 1 << UInt16(bit) }
  }

  /// Records that the machine woke from S3.
  public func wake() {
    change { $0.status |= Self.wakeStatus }
  }

  /// Bytes of the registers, whatever the access's size and offset.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    let state = state.withLock { $0 }
    let ticks = ticks()
    var value: UInt64 = 0
    for index in 0..<UInt64(size) where offset + index < Self.windowSize {
      value |= (register(offset + index, state, ticks) & 0xff) << (index * 8)
    }
    return value
  }

  /// Status bits are cleared by writing 1; SLP_EN carries out SLP_TYP.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    var request: MachineRequest?
    change { state in
      for index in 0..<UInt64(size) {
        let byte = UInt16(truncatingIfNeeded: value >> (index * 8)) & 0xff
        let register = offset + index
        let shift = UInt16(register & 1) * 8
        let mask: UInt16 = 0xff << shift
        switch register & ~1 {
        case Self.eventOffset: state.status &= ~(byte << shift)
        case Self.eventOffset + 2: state.enable = state.enable & ~mask | byte << shift
        case Self.controlOffset:
          state.control = (state.control & ~mask | byte << shift) & ~Self.sleepEnable | 1
          if shift == 8, byte << 8 & Self.sleepEnable != 0 {
            switch byte >> 2 & 7 {
            case Self.sleepType5: request = .powerOff
            case Self.sleepType3: request = .suspend
            default: break
            }
          }
        case Self.generalEventOffset: state.generalStatus &= ~(byte << shift)
        case Self.generalEventOffset + 2: state.generalEnable = state.generalEnable & ~mask | byte << shift
        default: break
        }
      }
    }
    if let request { machine.request(request) }
  }

  /// The byte at an offset, in the low bits.
  private func register(_ offset: UInt64, _ state: State, _ ticks: UInt64) -> UInt64 {
    let value: UInt64 =
      switch offset & ~1 {
      case Self.eventOffset: UInt64(state.status)
      case Self.eventOffset + 2: UInt64(state.enable)
      case Self.controlOffset: UInt64(state.control)
      case Self.timerOffset: ticks
      case Self.timerOffset + 2: ticks >> 16
      case Self.generalEventOffset: UInt64(state.generalStatus)
      case Self.generalEventOffset + 2: UInt64(state.generalEnable)
      default: 0
      }
    return value >> ((offset & 1) * 8)
  }

  /// The PM timer from guest time; it wraps at 32 bits.
  private func ticks() -> UInt64 {
    let (seconds, nanoseconds) = clock.now().quotientAndRemainder(dividingBy: 1_000_000_000)
    return seconds &* Self.timerFrequency &+ nanoseconds * Self.timerFrequency / 1_000_000_000
  }

  private func change(_ body: (inout State) -> Void) {
    state.withLock { state in
      body(&state)
      line.set(state.status & state.enable & 0x7fff != 0 || state.generalStatus & state.generalEnable != 0)
    }
  }

  /// The state after power-on; what woke the machine survives in the status register until the guest clears it.
  public func reset() {
    change { $0 = State() }
  }

  /// Version 1.
  public func save() -> StateNode {
    let state = state.withLock { $0 }
    return StateNode(name, version: 1) { writer in
      writer.write(state.status)
      writer.write(state.enable)
      writer.write(state.control)
      writer.write(state.generalStatus)
      writer.write(state.generalEnable)
    }
  }

  /// Puts the registers back.
  public func restore(_ node: StateNode) throws(StateError) {
    let restored = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      State(
        status: try reader.read(), enable: try reader.read(), control: try reader.read(),
        generalStatus: try reader.read(), generalEnable: try reader.read())
    }
    change { $0 = restored }
  }
}
