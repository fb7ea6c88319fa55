import BlockLayer
import GuestMemory
import Host
import NetLayer
import StateTree
import Synchronization

/// A virtio network device (virtio 1.2, 5.1) over a network backend.
///
/// It belongs to the thread of its loop, but for `readConfiguration`. Its backend is a wire: frames that nobody takes are lost, and
/// none is saved. Without a driver, and until a machine has arrived from elsewhere, frames are dropped: the other place has had them.
public final class VirtioNetwork: VirtioDevice {
  enum Queue {
    static let receive = 0
    static let transmit = 1
    static let control = 2
  }

  /// Unique in the machine.
  public let name: String
  /// A network card.
  public let type: UInt16 = 1
  /// An Ethernet controller.
  public let classCode: UInt32 = 0x020000
  /// One pair, and the control queue.
  public let queueSizes: [UInt16] = [256, 256, 64]
  /// What the driver is told that a frame may carry, if anything (5.1.4.1).
  public let mtu: UInt16?
  /// What the backend and the guest's driver may leave to each other.
  public let offloads: NetworkOffloads

  /// Set by the transport.
  public var configurationChanged: () -> Void = {}
  /// Set by the transport.
  public var serve: (Int) -> Void = { _ in }

  let memory: GuestMemory
  let backend: any NetworkBackend
  private let loop: EventLoop
  private var queues: [Virtqueue?] = []
  /// What the driver has accepted.
  private var accepted: VirtioFeatures = []
  private(set) var interrupt: (Int) -> Void = { _ in }
  /// What vCPUs and others read.
  private let visible: Mutex<Visible>
  var filter = NetworkReceiveFilter()
  /// Whether whoever runs the machine has left the cable in (QMP's `set_link`).
  private(set) var isPlugged = true

  private var isDraining = false
  /// The machine has come from elsewhere and does not run yet.
  private var isArriving = false
  /// The transport has let the device at its queue of buffers.
  private var isServed = false
  private var isReceiving = true

  /// For one request at a time.
  let chain = VirtqueueChain()
  /// For a frame that goes into several buffers.
  var chains: [VirtqueueChain] = []
  /// For a frame that is sent.
  var pieces = IOVectors()
  let header = DiskBuffer(count: NetworkHeader.size)

  private var announcement = NetworkAnnouncement()
  /// How often it has been told where the station is; no further where there is nothing to tell.
  private var round = UInt64.max
  private var timer: EventLoop.Timer?

  private struct Visible {
    var station: MACAddress
    var permanent: MACAddress
    var status: UInt16 = 0
    var needed: NetworkOffloads = []
  }

  private enum Status {
    static let linkUp: UInt16 = 1
    static let announce: UInt16 = 2
  }

  /// A device whose frames go to `backend`.
  ///
  /// - Parameters:
  ///   - name: unique in the machine.
  ///   - address: the station's, until a machine with another one is restored here.
  ///   - mtu: what the driver is told that a frame may carry; nil for nothing.
  ///   - backend: not started yet.
  ///   - usesOffloads: whether the backend's offloads are the driver's, too.
  ///   - memory: the guest's.
  ///   - loop: where the device and the backend work.
  public init(
    name: String, address: MACAddress, mtu: UInt16? = nil, backend: any NetworkBackend, usesOffloads: Bool = true,
    memory: GuestMemory, loop: EventLoop
  ) {
    self.name = name
    self.mtu = mtu
    self.backend = backend
    self.memory = memory
    self.loop = loop
    offloads = usesOffloads ? backend.offloads : []
    visible = Mutex(Visible(station: address, permanent: address))
    timer = loop.makeTimer(onLoop { $0.announceRound() })
  }

  /// Begins to take frames. On the loop's thread, or before it runs.
  public func connect() throws(NetworkError) {
    try backend.start(
      on: loop, framesArrived: { [weak self] in self?.framesArrived() },
      linkChanged: { [weak self] in self?.updateLink() })
    updateLink()
  }

  /// A call from the loop, which is handed to it.
  private func onLoop(_ body: @escaping @Sendable (VirtioNetwork) -> Void) -> @Sendable () -> Void {
    struct Reference: @unchecked Sendable {
      weak var device: VirtioNetwork?
    }
    let reference = Reference(device: self)
    return { if let device = reference.device { body(device) } }
  }

  // MARK: Identity

  private enum Feature {
    static let checksum = VirtioFeatures(rawValue: 1 << 0)
    static let guestChecksum = VirtioFeatures(rawValue: 1 << 1)
    static let mtu = VirtioFeatures(rawValue: 1 << 3)
    static let address = VirtioFeatures(rawValue: 1 << 5)
    static let mergeableBuffers = VirtioFeatures(rawValue: 1 << 15)
    static let status = VirtioFeatures(rawValue: 1 << 16)
    static let control = VirtioFeatures(rawValue: 1 << 17)
    static let controlReceive = VirtioFeatures(rawValue: 1 << 18)
    static let controlReceiveMore = VirtioFeatures(rawValue: 1 << 20)
    static let announce = VirtioFeatures(rawValue: 1 << 21)
    static let controlAddress = VirtioFeatures(rawValue: 1 << 23)
    /// What needs checksums: the guest may be given, and may give.
    static let segmentation: [(offload: NetworkOffloads, guest: VirtioFeatures, host: VirtioFeatures)] = [
      (.tcp4, .init(rawValue: 1 << 7), .init(rawValue: 1 << 11)),
      (.tcp6, .init(rawValue: 1 << 8), .init(rawValue: 1 << 12)),
      (.ecn, .init(rawValue: 1 << 9), .init(rawValue: 1 << 13)),
      (.udp, .init(rawValue: 1 << 10), .init(rawValue: 1 << 14)),
    ]
  }

  /// What a driver can use here.
  public var features: VirtioFeatures {
    var features: VirtioFeatures = [
      Feature.address, Feature.mergeableBuffers, Feature.status, Feature.control, Feature.controlReceive,
      Feature.controlReceiveMore, Feature.announce, Feature.controlAddress,
    ]
    if mtu != nil { features.insert(Feature.mtu) }
    guard offloads.contains(.checksum) else { return features }
    features.formUnion([Feature.checksum, Feature.guestChecksum])
    for (offload, guest, host) in Feature.segmentation where offloads.contains(offload) {
      features.formUnion([guest, host])
    }
    return features
  }

  /// The structure of 5.1.4.
  public func readConfiguration(offset: Int, size: Int) -> UInt64 {
    let (station, status) = visible.withLock { ($0.station, $0.status) }
    let bytes = station.bytes + Self.bytes(status) + Self.bytes(1) + Self.bytes(mtu ?? 0)
    var value: UInt64 = 0
    for index in 0..<min(size, 8) where bytes.indices.contains(offset + index) {
      value |= UInt64(bytes[offset + index]) << UInt64(index * 8)
    }
    return value
  }

  private static func bytes(_ value: UInt16) -> [UInt8] {
    [UInt8(truncatingIfNeeded: value), UInt8(truncatingIfNeeded: value >> 8)]
  }

  /// The address that the station has now. On any thread.
  public var station: MACAddress { visible.withLock { $0.station } }

  /// Its address after a reset. On any thread.
  public var permanentAddress: MACAddress { visible.withLock { $0.permanent } }

  /// Which frames the driver wants.
  public var receiveFilter: NetworkReceiveFilter { filter }

  func setStation(_ address: MACAddress) { visible.withLock { $0.station = address } }

  // MARK: Queues

  /// Takes the queues.
  public func start(_ queues: [Virtqueue?], features: VirtioFeatures, interrupt: @escaping (Int) -> Void) {
    self.queues = queues
    self.interrupt = interrupt
    accepted = features
    let needed = acceptedOffloads(receiving: true).union(acceptedOffloads(receiving: false))
    visible.withLock { $0.needed = needed }
    backend.setReceiveOffloads(acceptedOffloads(receiving: true))
  }

  /// Fills buffers, sends frames, or carries out commands.
  public func process(queue index: Int) throws(VirtqueueError) -> Bool {
    guard !isDraining, queues.indices.contains(index), let queue = queues[index] else { return false }
    switch index {
    case Queue.receive:
      // The driver runs.
      isArriving = false
      isServed = true
      setReceiving(true)
      try receive(queue)
      return false
    case Queue.transmit: return try transmit(queue)
    default: return try control(queue)
    }
  }

  /// Told by the backend.
  private func framesArrived() {
    guard !isDraining else { return }
    guard !queues.isEmpty, !isArriving, isPlugged else { return discard(256) }
    isServed = false
    serve(Queue.receive)
    // What may not reach memory now is served when it may.
    if !isServed { setReceiving(false) }
  }

  /// Whether frames are asked for.
  func setReceiving(_ wanted: Bool) {
    guard isReceiving != wanted else { return }
    isReceiving = wanted
    backend.setReceiving(wanted)
  }

  private func discard(_ most: Int) {
    for _ in 0..<most {
      guard backend.nextFrame() != nil else { return }
      backend.takeFrame()
    }
  }

  var isMergeable: Bool { accepted.contains(Feature.mergeableBuffers) }

  /// What the driver has accepted of the backend's offloads.
  func acceptedOffloads(receiving: Bool) -> NetworkOffloads {
    guard accepted.contains(receiving ? Feature.guestChecksum : Feature.checksum) else { return [] }
    var offloads: NetworkOffloads = .checksum
    for (offload, guest, host) in Feature.segmentation where accepted.contains(receiving ? guest : host) {
      offloads.insert(offload)
    }
    return offloads.intersection(self.offloads)
  }

  /// Those of either direction, which another backend must have for the driver to go on there. On any thread.
  public var neededOffloads: NetworkOffloads { visible.withLock { $0.needed } }

  // MARK: Link

  /// Whether frames pass.
  public var isLinkUp: Bool { isPlugged && backend.isLinkUp }

  /// Puts the cable in, or takes it out: frames are lost meanwhile.
  public func setPlugged(_ isPlugged: Bool) {
    self.isPlugged = isPlugged
    updateLink()
  }

  private func updateLink() {
    let bit = isLinkUp ? Status.linkUp : 0
    let isChanged = visible.withLock { visible in
      defer { visible.status = visible.status & ~Status.linkUp | bit }
      return visible.status & Status.linkUp != bit
    }
    if isChanged { configurationChanged() }
  }

  // MARK: Announcements (5.1.6.5.4)

  /// Tells the network where the station is now: the driver does, which knows its other addresses too, where it has said that it can.
  public func announce(_ announcement: NetworkAnnouncement) {
    self.announcement = announcement
    round = 0
    announceRound()
  }

  private func announceRound() {
    guard round < announcement.rounds else { return }
    let isDriven = accepted.contains([Feature.announce, Feature.control]) && !queues.isEmpty
    if isDriven, !isDraining {
      visible.withLock { $0.status |= Status.announce }
      configurationChanged()
    }
    // The first is for switches, which need not wait for the driver.
    if !isDriven || round == 0, !isDraining, isLinkUp { sendOwn(Announcement.frame(for: station)) }
    let wait = announcement.wait(after: round)
    round += 1
    if round < announcement.rounds { timer?.arm(at: monotonicNanoseconds() + wait * 1_000_000) }
  }

  func acknowledgeAnnouncement() { visible.withLock { $0.status &= ~Status.announce } }

  // MARK: Rest

  /// Nothing is ever under way between two calls.
  public func drain(_ done: @escaping () -> Void) {
    isDraining = true
    setReceiving(false)
    done()
  }

  /// The host fails nothing here.
  public var hasStoppedRequests: Bool { false }

  /// Goes on. What has come before its machine, the machine has met elsewhere.
  public func undrain() {
    isDraining = false
    if isArriving {
      isArriving = false
      discard(4096)
      announce(NetworkAnnouncement())
    }
    setReceiving(true)
  }

  /// The driver has gone, and what it has set.
  public func stop() {
    queues = []
    accepted = []
    filter = NetworkReceiveFilter()
    visible.withLock { visible in
      visible.station = visible.permanent
      visible.status &= ~Status.announce
      visible.needed = []
    }
    round = .max
    timer?.cancel()
    isDraining = false
    backend.setReceiveOffloads([])
    setReceiving(true)
  }

  /// Lets go of the backend.
  public func disconnect() {
    timer?.cancel()
    backend.close()
  }

  private static let nodeName = "network"

  /// The station's address, which goes with it, and what the driver has set.
  public func save() -> StateNode? {
    StateNode(Self.nodeName, version: 1) { writer in
      writer.write(permanentAddress.rawValue)
      writer.write(station.rawValue)
      writer.write(isPlugged)
      filter.write(to: &writer)
    }
  }

  /// Puts it back.
  public func restore(_ node: StateNode?) throws(StateError) {
    guard let node else { throw .missing(node: name, child: Self.nodeName) }
    try node.read(Self.nodeName, versions: 1...1) { reader, _ throws(StateError) in
      let permanent = try Self.address(&reader)
      let station = try Self.address(&reader)
      let isPlugged = try reader.read(Bool.self)
      filter = try NetworkReceiveFilter(from: &reader)
      visible.withLock { ($0.permanent, $0.station) = (permanent, station) }
      self.isPlugged = isPlugged
    }
    isArriving = true
    updateLink()
  }

  private static func address(_ reader: inout StateReader) throws(StateError) -> MACAddress {
    let value = try reader.read(UInt64.self)
    let address = MACAddress(rawValue: value)
    guard address.rawValue == value, !address.isMulticast else { throw reader.invalid("address", value) }
    return address
  }
}
