import DeviceModel
import StateTree
import Synchronization

/// A message-signalled interrupt (Intel SDM vol. 3, 11.11): what a device or an IOAPIC writes to the local APICs.
public struct InterruptMessage: Equatable, Sendable {
  /// Guest-physical address: destination and its mode.
  public var address: UInt64
  /// Vector, delivery mode and trigger.
  public var data: UInt32

  /// A message.
  public init(address: UInt64, data: UInt32) {
    self.address = address
    self.data = data
  }

  /// Whether it is level-triggered, so that its end is waited for.
  public var isLevel: Bool { data & 0x8000 != 0 }
}

/// Where an IOAPIC's messages go: the local APICs. Called under the IOAPIC's lock, so it must not call back.
public protocol IOAPICOutput: AnyObject, Sendable {
  /// Delivers an interrupt.
  func deliver(_ message: InterruptMessage)
  /// The guest gave a pin another message, nil while it is masked: local APICs in an accelerator ask which vectors
  /// are level-triggered, so that it reports their ends.
  func routeDidChange(pin: Int, to message: InterruptMessage?)
}

/// The 82093AA I/O APIC with 24 pins, and the EOI register of its successors (version 0x20).
public final class IOAPIC: PlatformDevice {
  /// Guest-physical address of the registers.
  public static let address: UInt64 = 0xfec0_0000
  /// Pins.
  public static let pins = 24

  private static let selectOffset: UInt64 = 0x00
  private static let dataOffset: UInt64 = 0x10
  private static let endOffset: UInt64 = 0x40
  private static let version: UInt32 = 0x20

  /// Bits of a redirection entry.
  private enum Entry {
    static let remoteIRR: UInt64 = 1 << 14
    static let level: UInt64 = 1 << 15
    static let masked: UInt64 = 1 << 16
    static let writable: UInt64 = 0xff00_0000_0001_afff
  }

  /// `ioapic`.
  public let name = "ioapic"
  /// One page.
  public let windows: [BusWindow] = [.memory(address, size: 0x1000)]
  private let output: any IOAPICOutput
  private let state = Mutex(State())

  private struct State {
    var id: UInt32 = 0
    var select: UInt8 = 0
    /// Levels of the inputs.
    var inputs: UInt32 = 0
    var entries = [UInt64](repeating: Entry.masked, count: IOAPIC.pins)
  }

  /// An IOAPIC that sends its messages to `output`.
  public init(output: any IOAPICOutput) {
    self.output = output
  }

  /// Drives a pin, 0-23; others do not exist.
  public func setInput(_ pin: Int, level: Bool) {
    guard (0..<Self.pins).contains(pin) else { return }
    state.withLock { state in
      let bit: UInt32 = 1 << UInt32(pin)
      let rises = level && state.inputs & bit == 0
      state.inputs = level ? state.inputs | bit : state.inputs & ~bit
      if rises { serve(pin, &state, isEdge: true) }
    }
  }

  /// A local APIC's end of interrupt: level-triggered pins with that vector may interrupt again.
  public func endOfInterrupt(vector: UInt8) {
    state.withLock { end(vector, &$0) }
  }

  private func end(_ vector: UInt8, _ state: inout State) {
    for pin in 0..<Self.pins
    where state.entries[pin] & Entry.remoteIRR != 0 && UInt8(truncatingIfNeeded: state.entries[pin]) == vector {
      state.entries[pin] &= ~Entry.remoteIRR
      serve(pin, &state, isEdge: false)
    }
  }

  /// Sends the pin's message where its trigger asks for it. An edge at a masked pin is lost (data sheet, 3.2.4).
  private func serve(_ pin: Int, _ state: inout State, isEdge: Bool) {
    let entry = state.entries[pin]
    guard entry & Entry.masked == 0 else { return }
    if isLevel(entry) {
      guard state.inputs >> UInt32(pin) & 1 == 1, entry & Entry.remoteIRR == 0 else { return }
      state.entries[pin] |= Entry.remoteIRR
      output.deliver(message(entry))
    } else if isEdge {
      output.deliver(message(entry))
    }
  }

  /// Only fixed and lowest-priority delivery has an end of interrupt to wait for.
  private func isLevel(_ entry: UInt64) -> Bool {
    entry & Entry.level != 0 && entry >> 8 & 7 <= 1
  }

  private func message(_ entry: UInt64) -> InterruptMessage {
    // Destination to bits 19-12, its mode to bit 2; vector and delivery mode, trigger, and assert with a level.
    let level: UInt32 = isLevel(entry) ? 0xc000 : 0
    return InterruptMessage(
      address: 0xfee0_0000 | (entry >> 56) << 12 | (entry >> 11 & 1) << 2,
      data: UInt32(truncatingIfNeeded: entry & 0x7ff) | level)
  }

  private func announce(_ pin: Int, _ state: State) {
    let entry = state.entries[pin]
    output.routeDidChange(pin: pin, to: entry & Entry.masked != 0 ? nil : message(entry))
  }

  /// The select register and, through it, the others: 32 bits each, at any size.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    state.withLock { state in
      let value: UInt32 =
        switch offset & ~3 {
        case Self.selectOffset: UInt32(state.select)
        case Self.dataOffset: register(state)
        default: 0
        }
      return UInt64(value) >> ((offset & 3) * 8)
    }
  }

  private func register(_ state: State) -> UInt32 {
    switch state.select {
    // The arbitration id follows the id.
    case 0, 2: return state.id
    case 1: return Self.version | UInt32(Self.pins - 1) << 16
    case 0x10..<0x10 + UInt8(Self.pins * 2):
      let entry = state.entries[Int(state.select - 0x10) / 2]
      return UInt32(truncatingIfNeeded: state.select & 1 == 0 ? entry : entry >> 32)
    default: return 0
    }
  }

  /// Select, data and EOI registers; writes that do not begin at a register are lost.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    state.withLock { state in
      switch offset {
      case Self.selectOffset: state.select = UInt8(truncatingIfNeeded: value)
      case Self.dataOffset: setRegister(UInt32(truncatingIfNeeded: value), &state)
      case Self.endOffset: end(UInt8(truncatingIfNeeded: value), &state)
      default: break
      }
    }
  }

  private func setRegister(_ value: UInt32, _ state: inout State) {
    switch state.select {
    case 0: state.id = value & 0x0f00_0000
    case 0x10..<0x10 + UInt8(Self.pins * 2):
      let pin = Int(state.select - 0x10) / 2
      let shift = UInt64(state.select & 1) * 32
      let mask = Entry.writable & 0xffff_ffff << shift
      var entry = state.entries[pin] & ~mask | UInt64(value) << shift & mask
      // A kernel clears a stuck remote IRR by making the pin edge-triggered for a moment.
      if !isLevel(entry) { entry &= ~Entry.remoteIRR }
      state.entries[pin] = entry
      announce(pin, state)
      serve(pin, &state, isEdge: false)
    default: break
    }
  }

  /// Every pin masked. Inputs keep their levels: their devices drive them.
  public func reset() {
    state.withLock { replace(&$0, with: State(inputs: $0.inputs)) }
  }

  private func replace(_ state: inout State, with other: State) {
    state = other
    for pin in 0..<Self.pins { announce(pin, state) }
  }

  /// Version 1.
  public func save() -> StateNode {
    let state = state.withLock { $0 }
    return StateNode(name, version: 1) { writer in
      writer.write(state.id)
      writer.write(state.select)
      writer.write(state.inputs)
      for entry in state.entries { writer.write(entry) }
    }
  }

  /// Puts the registers and the inputs' levels back; nothing is delivered for them again.
  public func restore(_ node: StateNode) throws(StateError) {
    let restored = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      var state = State(id: try reader.read(), select: try reader.read(), inputs: try reader.read())
      for pin in state.entries.indices {
        state.entries[pin] = try reader.read(UInt64.self) & (Entry.writable | Entry.remoteIRR)
      }
      return state
    }
    state.withLock { replace(&$0, with: restored) }
  }
}
