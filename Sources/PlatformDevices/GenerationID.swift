import DeviceModel
import GuestMemory
import StateTree
import Synchronization

/// Microsoft's virtual machine generation id, as QEMU's `vmgenid` has it: 16 bytes in guest memory that change when a machine
/// goes on from a copy of its past, and a general-purpose event that tells the guest.
public final class GenerationID: PlatformDevice, LaterDevice {
  /// The general-purpose event.
  public static let event = 5
  /// Bytes of an id.
  public static let size = 16

  /// `vmgenid`.
  public let name = "vmgenid"
  /// None: the guest reads memory.
  public let windows: [BusWindow] = []
  private let memory: GuestMemory
  private let address: GuestPhysicalAddress?
  private let power: ACPIPowerManagement
  private let isDeterministic: Bool
  private let state: Mutex<State>

  private struct State {
    var id: [UInt8]
    /// The guest's tables name the device.
    var isKnown = true
  }

  /// An id at `address`, nil where no table names it. Where the machine `isDeterministic`, ids are counted instead of drawn.
  public init(
    memory: GuestMemory, address: GuestPhysicalAddress?, power: ACPIPowerManagement, isDeterministic: Bool
  ) {
    self.memory = memory
    self.address = address
    self.power = power
    self.isDeterministic = isDeterministic
    state = Mutex(State(id: isDeterministic ? Self.counted([UInt8](repeating: 0, count: Self.size)) : Self.random()))
  }

  private static func random() -> [UInt8] {
    var generator = SystemRandomNumberGenerator()
    var id = (0..<size).map { _ in UInt8.random(in: 0...255, using: &generator) }
    // A random UUID's version and variant (RFC 9562), in the GUID's order of bytes.
    id[7] = id[7] & 0x0f | 0x40
    id[8] = id[8] & 0x3f | 0x80
    return id
  }

  private static func counted(_ last: [UInt8]) -> [UInt8] {
    var id = last
    for index in id.indices {
      id[index] &+= 1
      if id[index] != 0 { break }
    }
    return id
  }

  /// The id as a GUID is written: the first three groups are little-endian.
  public var text: String {
    let id = state.withLock { $0.id }
    let groups: [[Int]] = [[3, 2, 1, 0], [5, 4], [7, 6], [8, 9], [10, 11, 12, 13, 14, 15]]
    return groups.map { group in
      group.map { place in
        let digits = String(id[place], radix: 16)
        return digits.count < 2 ? "0" + digits : digits
      }.joined()
    }.joined(separator: "-")
  }

  /// Writes the id where the guest's tables, which are there too now, say that it is.
  public func place() throws(GuestMemoryError) {
    let id = state.withLock { state in
      state.isKnown = true
      return state.id
    }
    if let address { try memory.write(id, to: address) }
  }

  /// The machine is a copy of one that was: it gets another id and is told so.
  public func renew() throws(GuestMemoryError) {
    let isKnown = state.withLock { state in
      state.id = isDeterministic ? Self.counted(state.id) : Self.random()
      return state.isKnown
    }
    guard isKnown, address != nil else { return }
    try place()
    power.raise(generalEvent: Self.event)
  }

  /// A reset is none of a generation's changes.
  public func reset() {}

  /// No access reaches it.
  public func read(offset: UInt64, size: Int) -> UInt64 { .max }
  /// No access reaches it.
  public func write(offset: UInt64, size: Int, value: UInt64) {}

  /// Version 1.
  public func save() -> StateNode {
    let state = state.withLock { $0 }
    return StateNode(name, version: 1) { writer in
      writer.write(state.isKnown)
      writer.write(state.id)
    }
  }

  /// Puts the id back; memory has it already.
  public func restore(_ node: StateNode) throws(StateError) {
    let restored = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      let isKnown = try reader.read(Bool.self)
      let id = try reader.read(limit: Self.size)
      guard id.count == Self.size else { throw reader.invalid("size", UInt64(id.count)) }
      return State(id: id, isKnown: isKnown)
    }
    state.withLock { $0 = restored }
  }

  /// The guest's tables have no such device: its memory is left alone until it boots again.
  public func restoreAbsent() { state.withLock { $0.isKnown = false } }
}
