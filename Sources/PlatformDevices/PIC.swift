import DeviceModel
import StateTree
import Synchronization

/// The processor's INTR pin, which the PIC drives.
public protocol InterruptRequestPin: AnyObject, Sendable {
  /// Whether an interrupt waits for `PIC.acknowledge`. Called under the PIC's lock, so it must not call back.
  func setInterruptRequest(_ level: Bool)
}

/// The two cascaded 8259A interrupt controllers of a PC (Intel 8259A data sheet), with the edge/level control registers.
public final class PIC: PlatformDevice {
  private static let controlOffset: UInt64 = 4
  /// The input of the first controller that the second one's output drives.
  private static let cascade = 2
  private static let end: UInt64 = 6

  /// `pic`.
  public let name = "pic"
  /// Command and data port of each controller, then the two edge/level control registers.
  public let windows: [BusWindow] = [
    .ports(0x20, size: 2), .ports(0xa0, size: 2, offset: 2), .ports(0x4d0, size: 2, offset: controlOffset),
  ]
  private let pin: any InterruptRequestPin
  private let state = Mutex(State())

  private struct State {
    /// The inputs that may be level-triggered: not timer, keyboard, cascade, clock and coprocessor.
    var first = Chip(levelMask: 0xf8, isFirst: true)
    var second = Chip(levelMask: 0xde, isFirst: false)
  }

  /// A pair of controllers that drives `pin`.
  public init(pin: any InterruptRequestPin) {
    self.pin = pin
  }

  /// Drives an ISA interrupt, 0-15; 2 is the cascade's and goes nowhere.
  public func setInput(_ input: Int, level: Bool) {
    guard (0..<16).contains(input), input != Self.cascade else { return }
    change { state in
      if input < 8 { state.first.setInput(input, level) } else { state.second.setInput(input - 8, level) }
    }
  }

  /// The processor's acknowledge cycle: the vector of the most urgent interrupt, now in service; the spurious one where
  /// the request has gone.
  public func acknowledge() -> UInt8 {
    change { state in
      guard let input = state.first.request else { return state.first.vectorBase | 7 }
      state.first.acknowledge(input)
      guard input == Self.cascade else { return state.first.vectorBase | UInt8(input) }
      guard let second = state.second.request else { return state.second.vectorBase | 7 }
      state.second.acknowledge(second)
      return state.second.vectorBase | UInt8(second)
    }
  }

  /// Registers, a byte each; a read in poll mode acknowledges.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    change { state in
      readBytes(offset, size, end: Self.end) { offset in
        switch offset {
        case 0, 1: state.first.read(data: offset == 1)
        case 2, 3: state.second.read(data: offset == 3)
        case 4: state.first.levelTriggered
        default: state.second.levelTriggered
        }
      }
    }
  }

  /// Initialisation and operation command words, masks, edge/level control.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    change { state in
      writeBytes(offset, size, value, end: Self.end) { offset, byte in
        switch offset {
        case 0, 1: state.first.write(byte, data: offset == 1)
        case 2, 3: state.second.write(byte, data: offset == 3)
        case 4: state.first.levelTriggered = byte & state.first.levelMask
        default: state.second.levelTriggered = byte & state.second.levelMask
        }
      }
    }
  }

  private func change<Result>(_ body: (inout State) -> Result) -> Result {
    state.withLock { state in
      let result = body(&state)
      update(&state)
      return result
    }
  }

  private func update(_ state: inout State) {
    state.first.setInput(Self.cascade, state.second.request != nil)
    pin.setInterruptRequest(state.first.request != nil)
  }

  /// The state after power-on. Inputs keep their levels: their devices drive them.
  public func reset() {
    change { state in
      state.first.reset()
      state.second.reset()
    }
  }

  /// Version 1.
  public func save() -> StateNode {
    let state = state.withLock { $0 }
    return StateNode(name, version: 1) { writer in
      state.first.write(to: &writer)
      state.second.write(to: &writer)
    }
  }

  /// Puts the registers and the inputs' levels back.
  public func restore(_ node: StateNode) throws(StateError) {
    let restored = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      var state = State()
      try state.first.read(from: &reader)
      try state.second.read(from: &reader)
      return state
    }
    change { $0 = restored }
  }
}

/// One 8259A.
private struct Chip {
  let levelMask: UInt8
  let isFirst: Bool
  /// Levels of the inputs.
  var inputs: UInt8 = 0
  /// Interrupt request, mask and in-service registers.
  var requests: UInt8 = 0
  var masked: UInt8 = 0
  var inService: UInt8 = 0
  /// The input with the highest priority.
  var highest: UInt8 = 0
  var vectorBase: UInt8 = 0
  var levelTriggered: UInt8 = 0
  /// The initialisation command word that comes next, 2-4; 0 when there is none to come.
  var nextWord: UInt8 = 0
  /// The first initialisation command word.
  var firstWord: UInt8 = 0
  var readsInService = false
  var polls = false
  var specialMask = false
  var endsAutomatically = false
  var rotatesAutomatically = false
  var isSpecialFullyNested = false

  init(levelMask: UInt8, isFirst: Bool) {
    self.levelMask = levelMask
    self.isFirst = isFirst
  }

  mutating func reset() {
    let inputs = inputs
    self = Chip(levelMask: levelMask, isFirst: isFirst)
    self.inputs = inputs
  }

  mutating func setInput(_ input: Int, _ level: Bool) {
    let bit: UInt8 = 1 << UInt8(input)
    let rises = level && inputs & bit == 0
    inputs = level ? inputs | bit : inputs & ~bit
    if isLevel(bit) {
      requests = level ? requests | bit : requests & ~bit
    } else if rises {
      requests |= bit
    }
  }

  /// Bit 3 of the first initialisation command word makes every input level-triggered.
  private func isLevel(_ bit: UInt8) -> Bool {
    levelTriggered & bit != 0 || firstWord & 0x08 != 0
  }

  /// Steps down from the highest priority to the first input of `inputs`; 8 where it is empty.
  private func priority(_ inputs: UInt8) -> Int {
    guard inputs != 0 else { return 8 }
    return (inputs >> highest | inputs << ((8 - highest) & 7)).trailingZeroBitCount
  }

  private func input(atPriority priority: Int) -> Int { (priority + Int(highest)) & 7 }

  /// The input to be served: unmasked and more urgent than what is in service.
  var request: Int? {
    let wanted = priority(requests & ~masked)
    guard wanted < 8 else { return nil }
    var serving = inService
    if specialMask { serving &= ~masked }
    // In this mode a more urgent input of the second controller passes while an earlier one is in service.
    if isSpecialFullyNested, isFirst { serving &= ~4 }
    return wanted < priority(serving) ? input(atPriority: wanted) : nil
  }

  mutating func acknowledge(_ input: Int) {
    let bit: UInt8 = 1 << UInt8(input)
    if !isLevel(bit) { requests &= ~bit }
    if !endsAutomatically {
      inService |= bit
    } else if rotatesAutomatically {
      highest = UInt8(input + 1) & 7
    }
  }

  mutating func read(data: Bool) -> UInt8 {
    if polls {
      polls = false
      guard let request else { return 0 }
      acknowledge(request)
      return 0x80 | UInt8(request)
    }
    if data { return masked }
    return readsInService ? inService : requests
  }

  mutating func write(_ value: UInt8, data: Bool) {
    if data {
      writeData(value)
    } else if value & 0x10 != 0 {
      initialize(value)
    } else if value & 0x08 != 0 {
      // OCW3.
      polls = value & 0x04 != 0
      if value & 0x02 != 0 { readsInService = value & 0x01 != 0 }
      if value & 0x40 != 0 { specialMask = value & 0x20 != 0 }
    } else {
      operate(value >> 5, input: value & 7)
    }
  }

  /// ICW1. Requests of level-triggered inputs stand as long as the inputs do.
  private mutating func initialize(_ word: UInt8) {
    let (inputs, levelTriggered) = (inputs, levelTriggered)
    let vectorBase = vectorBase
    self = Chip(levelMask: levelMask, isFirst: isFirst)
    self.levelTriggered = levelTriggered
    self.vectorBase = vectorBase
    firstWord = word
    nextWord = 2
    self.inputs = inputs
    for input in 0..<8 where inputs >> UInt8(input) & 1 == 1 && isLevel(1 << UInt8(input)) { setInput(input, true) }
  }

  private mutating func writeData(_ value: UInt8) {
    switch nextWord {
    case 2:
      vectorBase = value & 0xf8
      // Bit 1 of the first word: no cascade, no third word; bit 0: there is a fourth.
      nextWord = firstWord & 0x02 == 0 ? 3 : firstWord & 0x01 != 0 ? 4 : 0
    case 3: nextWord = firstWord & 0x01 != 0 ? 4 : 0
    case 4:
      isSpecialFullyNested = value & 0x10 != 0
      endsAutomatically = value & 0x02 != 0
      nextWord = 0
    default: masked = value
    }
  }

  /// OCW2: ends of interrupt and rotations.
  private mutating func operate(_ command: UInt8, input: UInt8) {
    switch command {
    case 0, 4: rotatesAutomatically = command == 4
    case 1, 5:
      let served = priority(specialMask ? inService & ~masked : inService)
      guard served < 8 else { return }
      let input = self.input(atPriority: served)
      inService &= ~(1 << UInt8(input))
      if command == 5 { highest = UInt8(input + 1) & 7 }
    case 3, 7:
      inService &= ~(1 << input)
      if command == 7 { highest = (input + 1) & 7 }
    case 6: highest = (input + 1) & 7
    default: break
    }
  }

  func write(to writer: inout StateWriter) {
    for byte in [
      inputs, requests, masked, inService, highest, vectorBase, levelTriggered, nextWord, firstWord,
    ] { writer.write(byte) }
    for flag in [
      readsInService, polls, specialMask, endsAutomatically, rotatesAutomatically, isSpecialFullyNested,
    ] { writer.write(flag) }
  }

  mutating func read(from reader: inout StateReader) throws(StateError) {
    inputs = try reader.read()
    requests = try reader.read()
    masked = try reader.read()
    inService = try reader.read()
    highest = try reader.read(UInt8.self) & 7
    vectorBase = try reader.read(UInt8.self) & 0xf8
    levelTriggered = try reader.read(UInt8.self) & levelMask
    nextWord = try reader.read()
    firstWord = try reader.read()
    readsInService = try reader.read()
    polls = try reader.read()
    specialMask = try reader.read()
    endsAutomatically = try reader.read()
    rotatesAutomatically = try reader.read()
    isSpecialFullyNested = try reader.read()
  }
}
