import CGuest

/// One named port of a virtio console (virtio 1.2, 5.3, multiport): a byte stream to the host and one from it.
final class VirtioConsole {
  private static let deviceID: UInt32 = 0x1043_1af4
  private static let multiport: UInt64 = 1 << 1
  private static let slots: UInt16 = 16
  private static let bufferSize: UInt32 = 1024

  /// Control messages (5.3.6.2).
  private enum Event {
    static let deviceReady: UInt16 = 0
    static let portAdd: UInt16 = 1
    static let portReady: UInt16 = 3
    static let portOpen: UInt16 = 6
    static let portName: UInt16 = 7
  }

  /// A queue with a buffer for each of its slots.
  private struct Stream {
    let queue: Virtqueue
    let buffers: UInt64

    init(_ queue: Virtqueue) {
      self.queue = queue
      buffers = guest_allocate(UInt64(VirtioConsole.slots) * UInt64(VirtioConsole.bufferSize), 16)
    }

    func buffer(_ slot: UInt16) -> UInt64 { buffers + UInt64(slot) * UInt64(VirtioConsole.bufferSize) }

    func offer(_ slot: UInt16, _ length: UInt32, isWrite: Bool) {
      var chain = Virtqueue.Chain()
      chain.append(buffer(slot), length, isWrite: isWrite)
      queue.add(slot, chain)
      queue.notify()
    }

    /// Sends up to a buffer's bytes and waits until the device has taken them.
    func send(_ bytes: Bytes) {
      copy_bytes(
        UnsafeMutableRawPointer(bitPattern: UInt(buffer(0)))!, UnsafeRawPointer(bitPattern: UInt(bytes.address))!,
        Int(bytes.count))
      offer(0, UInt32(bytes.count), isWrite: false)
      wait("the console's device") { queue.take() != nil }
    }
  }

  private let transport: VirtioPCI
  private let controlIn: Stream
  private let controlOut: Stream
  private var port: UInt32 = 0
  private var input: Stream?
  private var output: Stream?

  /// The first console of bus 0, if there is one.
  static var function: PCI.Function? {
    var found: PCI.Function?
    PCI.forEachFunction { function, id in
      if id == deviceID && found == nil { found = function }
    }
    return found
  }

  /// Opens the port of a name; what comes from it is told of by interrupt `vector`.
  init(_ function: PCI.Function, port name: StaticString, vector: UInt8) {
    transport = VirtioPCI(function, wanted: Self.multiport)
    expect("several ports", transport.features & Self.multiport != 0)
    transport.enableMessages()
    controlIn = Stream(transport.addQueue(2, maximumSize: 64, vector: nil))
    controlOut = Stream(transport.addQueue(3, maximumSize: 64, vector: nil))
    let ports = UInt32(load32(transport.configuration + 4))
    // Which port has the name is known later than queues may be set up.
    var streams = InlineArray<4, (Stream, Stream)?>(repeating: nil)
    for number in 1..<min(ports, 5) {
      let queue = UInt16(2 + 2 * number)
      streams[Int(number - 1)] = (
        Stream(transport.addQueue(queue, maximumSize: 64, vector: vector)),
        Stream(transport.addQueue(queue + 1, maximumSize: 64, vector: nil))
      )
    }
    transport.start()
    for slot in 0..<Self.slots { controlIn.offer(slot, Self.bufferSize, isWrite: true) }
    tell(0, Event.deviceReady, 1)
    wait("the port's name") { hear(name) }
    guard let (input, output) = streams[Int(port - 1)] else {
      say("FAIL the port's number \(port)")
      Power.fail()
    }
    (self.input, self.output) = (input, output)
    for slot in 0..<Self.slots { input.offer(slot, Self.bufferSize, isWrite: true) }
    _ = input.queue.enableInterrupts()
    tell(port, Event.portOpen, 1)
  }

  private func tell(_ port: UInt32, _ event: UInt16, _ value: UInt16) {
    let message = controlOut.buffer(1)
    store32(message, port)
    store16(message + 4, event)
    store16(message + 6, value)
    controlOut.send(Bytes(address: message, count: 8))
  }

  /// Answers a control message; true for the one that names the port.
  private func hear(_ name: StaticString) -> Bool {
    guard let slot = controlIn.queue.take() else { return false }
    let message = controlIn.buffer(slot)
    let length = controlIn.queue.takenLength
    let id = load32(message)
    let text = Bytes(address: message + 8, count: UInt64(max(length, 8)) - 8)
    let event = load16(message + 4)
    let isIt = event == Event.portName && text.equals(name)
    if isIt { port = id }
    controlIn.offer(slot, Self.bufferSize, isWrite: true)
    if event == Event.portAdd { tell(id, Event.portReady, 1) }
    return isIt
  }

  /// Sends bytes to the host.
  func send(_ bytes: Bytes) {
    var offset: UInt64 = 0
    while offset < bytes.count {
      let count = min(bytes.count - offset, UInt64(Self.bufferSize))
      output?.send(Bytes(address: bytes.address + offset, count: count))
      offset += count
    }
  }

  /// Hands on what has come from the host; true where anything has.
  func receive(_ body: (Bytes) -> Void) -> Bool {
    guard let input, let slot = input.queue.take() else { return false }
    body(Bytes(address: input.buffer(slot), count: UInt64(input.queue.takenLength)))
    input.offer(slot, Self.bufferSize, isWrite: true)
    _ = input.queue.enableInterrupts()
    return true
  }
}
