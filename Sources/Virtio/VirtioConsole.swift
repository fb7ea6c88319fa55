import BlockLayer
import GuestMemory
import StateTree

/// A virtio console with named ports (virtio 1.2, 5.3, multiport): byte streams between the guest and the host.
///
/// Port 0 would be a console, which swiftvmm has not; named ports begin with 1. It belongs to the thread that runs its queues.
public final class VirtioConsole: VirtioDevice {
  /// Bytes for the guest that a port keeps at most while nobody reads them.
  public static let longestBacklog = 256 << 10
  /// Bytes that one buffer of the guest's is taken for at most; what is beyond is dropped.
  private static let longestTransfer = 64 << 10
  /// Control messages that wait for the guest's buffers at most: a driver that asks and never listens gets no more.
  private static let mostMessages = 256
  /// A port's name.
  private static let longestText = 256

  /// Unique in the machine.
  public let name: String
  /// A console.
  public let type: UInt16 = 3
  /// Another communication device.
  public let classCode: UInt32 = 0x078000
  /// Two for port 0, two for control messages, two a port.
  public let queueSizes: [UInt16]
  /// Several ports.
  public var features: VirtioFeatures { VirtioFeatures(rawValue: 1 << 1) }
  /// Set by the transport.
  public var configurationChanged: () -> Void = {}
  /// What the guest has written to a port, by the port's index in `ports`.
  public var onInput: (Int, [UInt8]) -> Void = { _, _ in }
  /// Whether somebody in the guest has opened a port.
  public var onOpen: (Int, Bool) -> Void = { _, _ in }
  /// What the host's side of the ports has, which goes with a saved device.
  public var onSave: () -> StateNode? = { nil }
  /// Puts that back, once the ports are as they were.
  public var onRestore: (StateNode) throws(StateError) -> Void = { _ throws(StateError) in }

  private struct Port {
    let name: [UInt8]
    var isOpen = false
    var output: [UInt8] = []
  }

  private struct Message {
    var port: UInt32
    var event: UInt16
    var value: UInt16
    var text: [UInt8] = []
  }

  private enum Event {
    static let deviceReady: UInt16 = 0
    static let portAdd: UInt16 = 1
    static let portReady: UInt16 = 3
    static let portOpen: UInt16 = 6
    static let portName: UInt16 = 7
  }

  private static let controlReceive = 2
  private static let controlTransmit = 3

  private var ports: [Port]
  private var messages: [Message] = []
  private var queues: [Virtqueue?] = []
  private var interrupt: (Int) -> Void = { _ in }
  private let chain = VirtqueueChain()
  private let memory: GuestMemory
  private var isDraining = false

  /// A device with these ports.
  public init(name: String, ports: [String], memory: GuestMemory) {
    self.name = name
    self.memory = memory
    self.ports = ports.map { Port(name: Array($0.utf8)) }
    queueSizes = Array(repeating: 64, count: 4 + 2 * ports.count)
  }

  /// The structure of 5.3.4: no size, and how many ports there may be.
  public func readConfiguration(offset: Int, size: Int) -> UInt64 {
    let ports = UInt64(self.queueSizes.count / 2 - 1) << 32
    guard (0..<8).contains(offset) else { return 0 }
    let value = ports >> UInt64(offset * 8)
    return size >= 8 ? value : value & (1 << UInt64(size * 8) - 1)
  }

  private static func receiveQueue(_ port: Int) -> Int { 4 + 2 * port }
  private static func transmitQueue(_ port: Int) -> Int { 5 + 2 * port }

  // MARK: The host's side

  /// Whether somebody in the guest has opened a port.
  public func isOpen(_ port: Int) -> Bool { ports[port].isOpen }

  /// Sends bytes to the guest: all of them, or false and none where nobody reads there.
  public func send(_ bytes: [UInt8], to port: Int) -> Bool {
    guard ports[port].isOpen, ports[port].output.count + bytes.count <= Self.longestBacklog else { return false }
    ports[port].output += bytes
    do throws(VirtqueueError) { try fill(port) } catch {
      // The transport meets it at the driver's next notification.
    }
    return true
  }

  // MARK: The guest's side

  /// Takes the queues.
  public func start(_ queues: [Virtqueue?], features: VirtioFeatures, interrupt: @escaping (Int) -> Void) {
    self.queues = queues
    self.interrupt = interrupt
  }

  /// Takes what the guest has written, or fills the buffers that it has made ready.
  public func process(queue index: Int) throws(VirtqueueError) -> Bool {
    guard !isDraining, queues.indices.contains(index), let queue = queues[index] else { return false }
    switch index {
    case 0, 1: return try discard(queue, index)
    case Self.controlReceive:
      try tell()
      return false
    case Self.controlTransmit: return try read(queue, index) { obey($0) }
    default:
      let port = (index - 4) / 2
      if index == Self.receiveQueue(port) {
        try fill(port)
        return false
      }
      return try read(queue, index) { bytes in
        // A restored driver has opened it before.
        setOpen(port, true)
        onInput(port, bytes)
      }
    }
  }

  /// Port 0 is not there: what is written to it goes nowhere.
  private func discard(_ queue: Virtqueue, _ index: Int) throws(VirtqueueError) -> Bool {
    index == 0 ? false : try read(queue, index) { _ in }
  }

  /// Hands on what the guest has written; true where more is left.
  private func read(_ queue: Virtqueue, _ index: Int, _ body: ([UInt8]) -> Void) throws(VirtqueueError) -> Bool {
    var budget = 256
    repeat {
      while budget > 0, try queue.take(chain) {
        budget -= 1
        let count = min(chain.readable.byteCount, Self.longestTransfer)
        var bytes = [UInt8](repeating: 0, count: count)
        bytes.withUnsafeMutableBytes { target in
          if let start = target.baseAddress { chain.readable.copyOut(start, from: 0, length: count) }
        }
        queue.giveBack(chain, written: 0)
        body(bytes)
      }
      if queue.needsInterrupt() { interrupt(index) }
    } while budget > 0 && queue.enableNotifications()
    try tell()
    return budget == 0
  }

  /// Writes bytes into a buffer of the guest's; how many had room.
  private func put(_ bytes: ArraySlice<UInt8>, _ queue: Virtqueue) -> Int {
    let count = min(bytes.count, chain.writable.byteCount)
    bytes.withUnsafeBytes { source in
      if let start = source.baseAddress, count > 0 { chain.writable.copyIn(start, from: 0, length: count) }
    }
    chain.writable.forEachPiece { [memory] start, count in memory.markDirty(start, count: count) }
    queue.giveBack(chain, written: UInt32(count))
    return count
  }

  private func fill(_ port: Int) throws(VirtqueueError) {
    let index = Self.receiveQueue(port)
    guard !isDraining, queues.indices.contains(index), let queue = queues[index] else { return }
    while !ports[port].output.isEmpty {
      guard try queue.take(chain) else {
        // The guest may have made one ready before it could know that it must tell.
        if queue.enableNotifications() { continue }
        break
      }
      let count = put(ports[port].output[...], queue)
      ports[port].output.removeFirst(count)
    }
    if queue.needsInterrupt() { interrupt(index) }
  }

  // MARK: Control messages (5.3.6.2)

  private func obey(_ bytes: [UInt8]) {
    guard bytes.count >= 8 else { return }
    let id = UInt32(bytes[0]) | UInt32(bytes[1]) << 8 | UInt32(bytes[2]) << 16 | UInt32(bytes[3]) << 24
    let event = UInt16(bytes[4]) | UInt16(bytes[5]) << 8
    let value = UInt16(bytes[6]) | UInt16(bytes[7]) << 8
    if event == Event.deviceReady {
      guard value == 1 else { return }
      for port in ports.indices { add(Message(port: UInt32(port + 1), event: Event.portAdd, value: 1)) }
      return
    }
    guard id >= 1, id <= UInt32(ports.count) else { return }
    let port = Int(id) - 1
    switch event {
    case Event.portReady where value == 1:
      add(Message(port: id, event: Event.portName, value: 1, text: ports[port].name))
      add(Message(port: id, event: Event.portOpen, value: 1))
    case Event.portOpen: setOpen(port, value == 1)
    default: break
    }
  }

  private func setOpen(_ port: Int, _ isOpen: Bool) {
    guard ports[port].isOpen != isOpen else { return }
    ports[port].isOpen = isOpen
    if !isOpen { ports[port].output = [] }
    onOpen(port, isOpen)
  }

  private func add(_ message: Message) {
    if messages.count < Self.mostMessages { messages.append(message) }
  }

  /// Control messages that the guest has room for.
  private func tell() throws(VirtqueueError) {
    guard !isDraining, queues.indices.contains(Self.controlReceive), let queue = queues[Self.controlReceive] else {
      return
    }
    while let message = messages.first {
      guard try queue.take(chain) else {
        if queue.enableNotifications() { continue }
        break
      }
      var bytes = (0..<4).map { UInt8(truncatingIfNeeded: message.port >> UInt32($0 * 8)) }
      for half in [message.event, message.value] {
        bytes += [UInt8(truncatingIfNeeded: half), UInt8(truncatingIfNeeded: half >> 8)]
      }
      _ = put((bytes + message.text)[...], queue)
      messages.removeFirst()
    }
    if queue.needsInterrupt() { interrupt(Self.controlReceive) }
  }

  // MARK: Rest

  /// Nothing is ever under way between two calls.
  public func drain(_ done: @escaping () -> Void) {
    isDraining = true
    done()
  }

  /// The host fails nothing here.
  public var hasStoppedRequests: Bool { false }

  /// Goes on.
  public func undrain() { isDraining = false }

  /// The driver has gone, and with it whoever had opened a port.
  public func stop() {
    queues = []
    messages = []
    isDraining = false
    for port in ports.indices { setOpen(port, false) }
  }

  /// Nothing is held elsewhere.
  public func disconnect() {}

  private static let nodeName = "ports"

  /// Which ports are open, and what is on its way to the guest.
  public func save() -> StateNode? {
    StateNode(Self.nodeName, version: 1, children: [onSave()].compactMap(\.self)) { writer in
      writer.write(UInt32(ports.count))
      for port in ports {
        writer.write(port.isOpen)
        writer.write(port.output)
      }
      writer.write(UInt32(messages.count))
      for message in messages {
        writer.write(message.port)
        writer.write(message.event)
        writer.write(message.value)
        writer.write(message.text)
      }
    }
  }

  /// Puts it back; whoever listens hears of open ports.
  public func restore(_ node: StateNode?) throws(StateError) {
    guard let node else { return }
    var ports = ports
    let messages = try node.read(Self.nodeName, versions: 1...1) { reader, _ throws(StateError) in
      let count = try reader.read(UInt32.self)
      guard count == ports.count else { throw reader.invalid("ports", UInt64(count)) }
      for index in ports.indices {
        ports[index].isOpen = try reader.read(Bool.self)
        ports[index].output = try reader.read(limit: Self.longestBacklog)
      }
      return try Self.messages(&reader)
    }
    // Closed, as they are; `setOpen` tells.
    for index in ports.indices where ports[index].isOpen {
      setOpen(index, true)
      self.ports[index].output = ports[index].output
    }
    self.messages = messages
    for child in node.children { try onRestore(child) }
  }

  private static func messages(_ reader: inout StateReader) throws(StateError) -> [Message] {
    let count = try reader.read(UInt32.self)
    guard count <= mostMessages else { throw reader.invalid("messages", UInt64(count)) }
    var messages: [Message] = []
    for _ in 0..<count {
      messages.append(
        Message(
          port: try reader.read(UInt32.self), event: try reader.read(UInt16.self), value: try reader.read(UInt16.self),
          text: try reader.read(limit: longestText)))
    }
    return messages
  }
}
