import CGuest

/// A virtio network device (virtio 1.2, 5.1): Ethernet frames to and from it, and its control queue.
final class VirtioNet {
  struct Options {
    var isPacked = false
    var usesIndirect = true
    var usesEventIndex = true
    /// Whether a frame may come in several buffers.
    var isMergeable = true
    /// Whether the device may ask for announcements.
    var announces = true
    /// MSI-X messages arrive here; nil for polling.
    var vector: UInt8?
    /// Buffers for frames that come, and the bytes of each.
    var buffers: UInt16 = 64
    var bufferSize: UInt32 = 1526
  }

  private enum Feature {
    static let mtu: UInt64 = 1 << 3
    static let address: UInt64 = 1 << 5
    static let mergeable: UInt64 = 1 << 15
    static let status: UInt64 = 1 << 16
    static let control: UInt64 = 1 << 17
    static let controlReceive: UInt64 = 1 << 18
    static let announce: UInt64 = 1 << 21
  }

  private static let deviceID: UInt32 = 0x1041_1af4
  static let headerSize: UInt64 = 12
  private static let longestFrame: UInt64 = 65550
  private static let sendSlots: UInt16 = 32

  /// 48 bits, the first byte on the wire the highest.
  let address: UInt64
  /// 0 where the device says none.
  let mtu: UInt16
  let isPacked: Bool
  private let options: Options
  private let transport: VirtioPCI
  private let receiving: Virtqueue
  private let sending: Virtqueue
  private let control: Virtqueue
  private let buffers: UInt64
  private let bufferCount: UInt16
  private let sendBuffers: UInt64
  private var free: [UInt16] = []
  /// A frame that came in pieces.
  private let assembled: UInt64
  private let command: UInt64

  /// The first network card of bus 0, if there is one.
  static var function: PCI.Function? {
    var found: PCI.Function?
    PCI.forEachFunction { function, id in
      if id == deviceID && found == nil { found = function }
    }
    return found
  }

  init(_ function: PCI.Function, _ options: Options) {
    self.options = options
    var wanted = Feature.mtu | Feature.address | Feature.status | Feature.control | Feature.controlReceive
    if options.isMergeable { wanted |= Feature.mergeable }
    if options.announces { wanted |= Feature.announce }
    if options.isPacked { wanted |= VirtioPCI.Feature.packed }
    if options.usesIndirect { wanted |= VirtioPCI.Feature.indirect }
    if options.usesEventIndex { wanted |= VirtioPCI.Feature.eventIndex }
    transport = VirtioPCI(function, wanted: wanted)
    isPacked = transport.features & VirtioPCI.Feature.packed != 0
    expect("the queue's layout", isPacked == options.isPacked)
    expect("an address", transport.features & Feature.address != 0)
    var bytes: UInt64 = 0
    for index in 0..<UInt64(6) { bytes = bytes << 8 | UInt64(load8(transport.configuration + index)) }
    address = bytes
    mtu = transport.features & Feature.mtu != 0 ? load16(transport.configuration + 10) : 0
    if options.vector != nil { transport.enableMessages() }
    receiving = transport.addQueue(0, maximumSize: 256, vector: options.vector)
    sending = transport.addQueue(1, maximumSize: 256, vector: options.vector)
    control = transport.addQueue(2, maximumSize: 16, vector: nil)
    if let vector = options.vector { transport.tellOfConfiguration(3, vector: vector) }
    bufferCount = min(options.buffers, receiving.slots)
    buffers = guest_allocate(UInt64(bufferCount) * UInt64(options.bufferSize), 16)
    sendBuffers = guest_allocate(UInt64(Self.sendSlots) * Self.sendSize, 16)
    assembled = guest_allocate(Self.longestFrame + Self.headerSize, 16)
    command = guest_allocate(64, 16)
    for slot in 0..<min(Self.sendSlots, sending.slots) { free.append(slot) }
    transport.start()
    for slot in 0..<bufferCount { offer(slot) }
    receiving.notify()
  }

  private static let sendSize: UInt64 = 65550 + 12 + 6

  var isLinkUp: Bool { load16(transport.configuration + 6) & 1 != 0 }
  /// Whether the device asks for an announcement.
  var isToAnnounce: Bool { load16(transport.configuration + 6) & 2 != 0 }

  // MARK: Receiving

  private func offer(_ slot: UInt16) {
    var chain = Virtqueue.Chain()
    chain.append(buffers + UInt64(slot) * UInt64(options.bufferSize), options.bufferSize, isWrite: true)
    receiving.add(slot, chain)
  }

  /// Hands on the next frame, if there is one.
  func receive(_ body: (Bytes) -> Void) -> Bool {
    guard let slot = receiving.take() else { return false }
    let first = buffers + UInt64(slot) * UInt64(options.bufferSize)
    let length = UInt64(receiving.takenLength)
    expect("bytes of a frame", length > Self.headerSize)
    let pieces = load16(first + 10)
    expect("buffers of a frame", UInt64(pieces), in: 1...UInt64(options.isMergeable ? bufferCount : 1))
    if pieces == 1 {
      body(Bytes(address: first + Self.headerSize, count: length - Self.headerSize))
      offer(slot)
      return true
    }
    var total = append(first, length, at: 0)
    offer(slot)
    for _ in 1..<pieces {
      // All of them are there at once (5.1.6.4.1).
      guard let slot = receiving.take() else {
        say("FAIL a frame of \(pieces) buffers is not there as a whole")
        Power.fail()
      }
      expect("a full buffer", total % UInt64(options.bufferSize) == 0)
      total = append(buffers + UInt64(slot) * UInt64(options.bufferSize), UInt64(receiving.takenLength), at: total)
      offer(slot)
    }
    body(Bytes(address: assembled + Self.headerSize, count: total - Self.headerSize))
    return true
  }

  private func append(_ buffer: UInt64, _ length: UInt64, at offset: UInt64) -> UInt64 {
    expect("bytes of a frame", offset + length <= Self.longestFrame + Self.headerSize)
    copy_bytes(
      UnsafeMutableRawPointer(bitPattern: UInt(assembled + offset))!, UnsafeRawPointer(bitPattern: UInt(buffer))!,
      Int(length))
    return offset + length
  }

  // MARK: Sending

  /// Sends a frame of `length` bytes that `fill` writes; false where all buffers are under way.
  func send(_ length: UInt64, _ fill: (UInt64) -> Void) -> Bool {
    guard let slot = free.popLast() else { return false }
    let buffer = sendBuffers + UInt64(slot) * Self.sendSize
    store64(buffer, 0)
    store32(buffer + 8, 0)
    fill(buffer + Self.headerSize)
    var chain = Virtqueue.Chain()
    if slot & 1 == 0 {
      // The header and the frame as one buffer, or as two.
      chain.append(buffer, UInt32(length + Self.headerSize), isWrite: false)
    } else {
      chain.append(buffer, UInt32(Self.headerSize), isWrite: false)
      chain.append(buffer + Self.headerSize, UInt32(length), isWrite: false)
    }
    sending.add(slot, chain)
    return true
  }

  /// Takes back buffers of frames that have been sent; true where none is under way.
  func reap() -> Bool {
    while let slot = sending.take() { free.append(slot) }
    return free.count == Int(min(Self.sendSlots, sending.slots))
  }

  /// Tells the device of what there is.
  func notify() {
    receiving.notify()
    sending.notify()
  }

  /// Asks for interrupts; true where something is there already.
  func enableInterrupts() -> Bool {
    let isReceived = receiving.enableInterrupts()
    return sending.enableInterrupts() || isReceived
  }

  func disableInterrupts() {
    receiving.disableInterrupts()
    sending.disableInterrupts()
  }

  // MARK: Control (5.1.6.5)

  /// A command with one byte, or none; whether the device has done it.
  func control(_ kind: UInt8, _ number: UInt8, value: UInt8? = nil) -> Bool {
    store8(command, kind)
    store8(command + 1, number)
    if let value { store8(command + 2, value) }
    store8(command + 8, 0xff)
    var chain = Virtqueue.Chain()
    chain.append(command, value == nil ? 2 : 3, isWrite: false)
    chain.append(command + 8, 1, isWrite: true)
    control.add(0, chain)
    control.notify()
    wait("the control queue") { control.take() != nil }
    return load8(command + 8) == 0
  }

  /// Says that the network has been told.
  func acknowledgeAnnouncement() { expect("the announcement is acknowledged", control(3, 0)) }
}
