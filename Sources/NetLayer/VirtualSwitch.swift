import Glibc
import Host

/// A learning Ethernet switch between stream sockets and TAP interfaces (IEEE 802.1D, without a spanning tree).
///
/// It belongs to its loop's thread. Frames go from the memory that one read has filled to every port's socket in one call each;
/// a port that does not read has a queue of its own, and loses its own frames when that is full.
public final class VirtualSwitch: @unchecked Sendable {
  /// What may be chosen.
  public struct Configuration: Sendable {
    /// Stations that are remembered.
    public var stations = 4096
    /// Nanoseconds after which a station that has been silent is forgotten: the standard's 300 seconds.
    public var ageing: UInt64 = 300_000_000_000
    /// Ports at a time; who connects beyond that is turned away.
    public var ports = 256

    /// The usual.
    public init() {}
  }

  /// What has been done, and has passed ports that are gone.
  private var counters = SwitchCounters()
  /// Something that the person who runs the switch should know, in one line.
  public var onMessage: (NetworkError) -> Void = { _ in }

  private let loop: EventLoop
  private let configuration: Configuration
  private var table: MACTable
  private var ports: [SwitchPort?] = []
  private var portCount = 0
  /// Ports whose links have frames that are not flushed.
  private var touched: [SwitchPort] = []
  private var listener: Listener?
  private var capture: PacketCapture?
  private var captureTimer: EventLoop.Timer?
  private var sweep: EventLoop.Timer?
  /// The time of the frames under way: it is asked for once a series.
  private var now: UInt64 = 0

  private final class Listener {
    let listener: StreamListener
    init(_ listener: consuming StreamListener) { self.listener = listener }
  }

  /// A switch without ports.
  public init(on loop: EventLoop, _ configuration: Configuration = Configuration()) {
    self.loop = loop
    self.configuration = configuration
    table = MACTable(capacity: configuration.stations, ageing: configuration.ageing)
    sweep = loop.makeTimer { [weak self] in self?.forget() }
    armSweep()
  }

  // MARK: Ports

  /// Makes a port of everyone who connects.
  public func listen(_ listener: consuming StreamListener) throws(NetworkError) {
    let listener = Listener(listener)
    let descriptor = listener.listener.descriptor.rawValue
    _ = fcntl(descriptor, F_SETFL, O_NONBLOCK)
    do throws(HostError) {
      try loop.add(descriptor, .readable) { [weak self] _ in self?.accept() }
    } catch {
      throw .host(error)
    }
    self.listener = listener
  }

  /// Makes a port of an interface of the host's, or of a connection to another switch, which must be there.
  public func addUplink(_ uplink: NetworkAttachment) throws(NetworkError) {
    guard let port = makePort(uplink.description) else { throw .tooManyPorts(limit: configuration.ports) }
    do throws(NetworkError) {
      switch uplink {
      case .tap(let name):
        port.link = try TapLink(
          name: name, on: loop, traffic: port.traffic,
          receive: { [unowned self, unowned port] in receive($0, at: port) },
          seriesEnds: { [unowned self] in flush() },
          lost: { [unowned self, unowned port] in
            remove(port)
            onMessage(.uplinkGone(uplink))
          })
      case .stream(let path):
        try connect(port, to: path)
      }
    } catch {
      remove(port)
      throw error
    }
  }

  private func connect(_ port: SwitchPort, to path: String) throws(NetworkError) {
    do throws(HostError) {
      let connector = StreamConnector(try StreamEndpoint("unix:" + path), on: loop, traffic: port.traffic)
      connector.framesArrived = { [unowned self, unowned port] in
        if let link = port.connector?.link { receive(from: link, at: port) }
      }
      connector.linkChanged = { [unowned self, unowned port] in
        port.link = port.connector?.link
        if port.link == nil { table.forget(port: port.index) }
      }
      port.connector = connector
      try connector.start()
      port.link = connector.link
    } catch {
      throw error.errno == ENAMETOOLONG ? .host(error) : .noSwitch(path: path, error)
    }
  }

  private func accept() {
    guard let listener else { return }
    let socket: FileDescriptor
    do throws(HostError) {
      socket = try listener.listener.accept()
    } catch {
      if error.errno != EAGAIN { restAccepting() }
      return
    }
    _ = fcntl(socket.rawValue, F_SETFL, O_NONBLOCK)
    attach(socket)
  }

  /// Makes a port of a connected, non-blocking socket; nil where that cannot be, and then the socket is closed.
  @discardableResult
  func attach(_ socket: consuming FileDescriptor) -> SwitchPort? {
    guard let port = makePort(nil) else {
      counters.refusedPorts += 1
      return nil
    }
    do throws(HostError) {
      let link = try StreamLink(
        socket, on: loop, traffic: port.traffic,
        framesArrived: { [unowned self, unowned port] in
          if let link = port.link as? StreamLink { receive(from: link, at: port) }
        }, lost: { [unowned self, unowned port] in remove(port) })
      port.link = link
      link.receives = true
      return port
    } catch {
      remove(port)
      return nil
    }
  }

  /// A host that is out of descriptors would call for every turn of the loop.
  private func restAccepting() {
    guard let descriptor = listener?.listener.descriptor.rawValue else { return }
    try? loop.modify(descriptor, [])
    loop.makeTimer { [weak self] in
      guard let self, listener != nil else { return }
      try? loop.modify(descriptor, .readable)
    }.arm(at: monotonicNanoseconds() + 100_000_000)
  }

  /// A port without a link; nil where there are too many.
  func makePort(_ name: String?) -> SwitchPort? {
    guard portCount < configuration.ports else { return nil }
    let index = ports.firstIndex { $0 == nil } ?? ports.count
    if index == ports.count { ports.append(nil) }
    counters.connectedPorts += 1
    let port = SwitchPort(index: index, name: name ?? "port \(counters.connectedPorts)")
    ports[index] = port
    portCount += 1
    return port
  }

  /// Closes a port.
  func remove(_ port: SwitchPort) {
    guard ports[port.index] === port else { return }
    port.close()
    ports[port.index] = nil
    portCount -= 1
    table.forget(port: port.index)
    counters.add(port.traffic.counters)
  }

  /// Ports that are there, with what has passed each.
  public var portReports: [SwitchPortReport] {
    ports.compactMap { $0 }.map {
      SwitchPortReport(name: $0.name, isUp: $0.link != nil, counters: $0.traffic.counters)
    }
  }

  /// What has passed all ports, those that have gone included.
  public var total: SwitchCounters {
    var sum = counters
    for port in ports { if let port { sum.add(port.traffic.counters) } }
    sum.stations = table.count
    return sum
  }

  /// Ends: nobody is connected any more, and the socket is removed.
  public func close() {
    sweep?.cancel()
    if let listener { loop.remove(listener.listener.descriptor.rawValue) }
    listener = nil
    for port in ports { if let port { remove(port) } }
    captureTimer?.cancel()
    flushCapture()
    capture = nil
  }

  // MARK: The path of a frame

  /// Takes what one read has brought.
  private func receive(from link: StreamLink, at port: SwitchPort) {
    now = monotonicNanoseconds()
    while let frame = link.reader.next() { forward(UnsafeRawBufferPointer(frame), from: port) }
    flush()
    if link.reader.isMalformed {
      counters.malformedStreams += 1
      onMessage(.malformedStream(port: port.name, longest: NetworkFrame.longest))
      link.fail()
    }
  }

  /// Takes one frame of a series, which stays where it is until `flush`.
  func receive(_ frame: UnsafeRawBufferPointer, at port: SwitchPort) {
    if touched.isEmpty { now = monotonicNanoseconds() }
    forward(frame, from: port)
  }

  /// Decides where a frame goes, which has its length before it and stays where it is until `flush`. Every frame passes here.
  private func forward(_ frame: UnsafeRawBufferPointer, from port: SwitchPort) {
    let ethernet = frame.baseAddress! + StreamFraming.prefix
    port.traffic.received(frames: 1, bytes: frame.count - StreamFraming.prefix)
    if capture != nil { record(ethernet, frame.count - StreamFraming.prefix) }
    let destination = MACAddress(at: ethernet)
    let source = MACAddress(at: ethernet + 6)
    guard !source.isMulticast, source.rawValue != 0 else {
      counters.invalidSources += 1
      return
    }
    switch table.learn(source, at: port.index, now: now) {
    case .moved: counters.moves += 1
    case .full: counters.unlearned += 1
    case .known, .new: break
    }
    if destination.isMulticast {
      // 802.1D, table 7-10: spanning tree, pause, link layer discovery are for this link alone.
      guard destination.rawValue & 0xffff_ffff_fff0 != 0x0180_c200_0000 else {
        counters.reserved += 1
        return
      }
      flood(frame, from: port)
    } else if let index = table.port(of: destination, now: now), let target = ports[index] {
      // Stations on one port hear each other without the switch.
      guard target !== port else {
        counters.filtered += 1
        return
      }
      deliver(frame, to: target)
    } else {
      counters.unknown += 1
      flood(frame, from: port)
    }
  }

  private func flood(_ frame: UnsafeRawBufferPointer, from port: SwitchPort) {
    for case let target? in ports where target !== port { deliver(frame, to: target) }
  }

  private func deliver(_ frame: UnsafeRawBufferPointer, to port: SwitchPort) {
    guard let link = port.link else { return port.traffic.dropped(frames: 1) }
    link.send(frame)
    if !port.isTouched {
      port.isTouched = true
      touched.append(port)
    }
  }

  /// Ends a series of `forward`.
  func flush() {
    for port in touched {
      port.isTouched = false
      port.link?.flush()
    }
    touched.removeAll(keepingCapacity: true)
  }

  private func forget() {
    table.forget(before: monotonicNanoseconds())
    armSweep()
  }

  private func armSweep() {
    sweep?.arm(at: monotonicNanoseconds() &+ min(configuration.ageing, 60_000_000_000))
  }

  // MARK: Capture

  /// Writes every frame that comes in from now on into a file, until that fails; none is later there than a second.
  public func capture(to path: String) throws(NetworkError) {
    capture = try PacketCapture(path: path)
    captureTimer = loop.makeTimer { [weak self] in
      self?.flushCapture()
      self?.armCapture()
    }
    armCapture()
  }

  private func armCapture() {
    guard capture != nil else { return }
    captureTimer?.arm(at: monotonicNanoseconds() &+ 1_000_000_000)
  }

  private func record(_ frame: UnsafeRawPointer, _ count: Int) {
    do throws(NetworkError) {
      try capture?.append(UnsafeRawBufferPointer(start: frame, count: count))
    } catch {
      capture = nil
      onMessage(error)
    }
  }

  /// Has everything that was captured in the file.
  func flushCapture() {
    do throws(NetworkError) { try capture?.flush() } catch {
      capture = nil
      onMessage(error)
    }
  }
}
