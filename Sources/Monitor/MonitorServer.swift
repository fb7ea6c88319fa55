import Host
import JSON
import NIOCore
import NIOPosix
import Synchronization

/// The QMP server. One thread serves every client, and starts with the server.
public final class MonitorServer: Sendable {
  /// Clients at a time; one more is sent away.
  public static let clientLimit = 64
  /// Bytes that may wait for a client to read them; a client that lets more pile up is dropped.
  public static let outputLimit = 4 << 20

  private let group: MultiThreadedEventLoopGroup
  private let hub: Hub
  private let listener: Mutex<StreamListener?>

  /// Serves `target` on a socket. `package` is the program and its version; `log` gets one line for each client that is
  /// dropped, on the server's thread.
  public init(
    _ listener: consuming StreamListener, target: any MonitorTarget, commands: [QMPCommand] = QMPCommand.standard,
    package: String, log: @escaping @Sendable (String) -> Void
  ) throws(MonitorError) {
    let endpoint = listener.endpoint
    let group = MultiThreadedEventLoopGroup(numberOfThreads: 1)
    let hub = Hub(loop: group.next(), log: log)
    let context = QMPCommand.Context(target: target, commands: commands, package: package)
    let bootstrap = ServerBootstrap(group: group)
      .childChannelOption(
        ChannelOptions.writeBufferWaterMark, value: .init(low: Self.outputLimit / 2, high: Self.outputLimit)
      )
      .childChannelInitializer { channel in
        channel.eventLoop.makeCompletedFuture {
          try channel.pipeline.syncOperations.addHandler(ClientHandler(QMPSession(context), hub))
        }
      }
    do {
      // NIO closes what it is given; the listener's own descriptor goes with the socket's file.
      let socket = try listener.descriptor.duplicate().release()
      _ = try bootstrap.withBoundSocket(socket).wait()
    } catch {
      try? group.syncShutdownGracefully()
      throw .server(endpoint, reason: "\(error)")
    }
    self.group = group
    self.hub = hub
    self.listener = Mutex(listener)
  }

  /// Tells every client, in the order of the calls, from any thread; never waits for one.
  public func emit(_ event: QMPEvent) {
    hub.emit(event)
  }

  /// Sends the events that wait, ends every connection, removes the socket's file and ends the thread. Once.
  ///
  /// Not to be called on the server's own thread, so not by a command.
  public func close() {
    guard hub.close() else { return }
    try? hub.loop.submit { [hub] in hub.sendEvents() }.wait()
    try? group.syncShutdownGracefully()
    listener.withLock { $0 = nil }
  }
}

/// The clients that get events, and the events on their way to them.
private final class Hub: Sendable {
  private struct State {
    var clients = 0
    var subscribers: [ObjectIdentifier: any Channel] = [:]
    var events: [JSONValue] = []
    var isClosed = false
  }

  let loop: any NIOCore.EventLoop
  private let log: @Sendable (String) -> Void
  private let state = Mutex(State())

  init(loop: any NIOCore.EventLoop, log: @escaping @Sendable (String) -> Void) {
    self.loop = loop
    self.log = log
  }

  func emit(_ event: QMPEvent) {
    state.withLock { state in
      // Under the lock, because a loop that has ended takes no work.
      guard !state.isClosed else { return }
      state.events.append(event.message())
      loop.execute { self.sendEvents() }
    }
  }

  /// Takes no more events; false where that is so already.
  func close() -> Bool {
    state.withLock { state in
      defer { state.isClosed = true }
      return !state.isClosed
    }
  }

  /// On the loop's thread only: also before each reply, so that a command's events precede its reply, as QEMU's do.
  func sendEvents() {
    let (events, subscribers) = state.withLock { state in
      defer { state.events = [] }
      return (state.events, state.subscribers)
    }
    for event in events {
      for channel in subscribers.values { send(event, to: channel) }
    }
  }

  func send(_ message: JSONValue, to channel: any Channel) {
    guard channel.isActive else { return }
    guard channel.isWritable else {
      log("dropped a QMP client that does not read: \(MonitorServer.outputLimit) bytes wait for it")
      channel.close(promise: nil)
      return
    }
    channel.writeAndFlush(ByteBuffer(string: message.serialized() + "\r\n"), promise: nil)
  }

  /// Whether there is room for one more client.
  func admit() -> Bool {
    state.withLock { state in
      guard state.clients < MonitorServer.clientLimit else { return false }
      state.clients += 1
      return true
    }
  }

  func subscribe(_ channel: any Channel) {
    state.withLock { $0.subscribers[ObjectIdentifier(channel)] = channel }
  }

  func remove(_ channel: any Channel) {
    state.withLock { state in
      state.clients -= 1
      state.subscribers[ObjectIdentifier(channel)] = nil
    }
  }

  func refuse(_ channel: any Channel) {
    log("refused a QMP client: \(MonitorServer.clientLimit) are connected")
    channel.close(promise: nil)
  }
}

private final class ClientHandler: ChannelInboundHandler {
  typealias InboundIn = ByteBuffer

  private var session: QMPSession
  private let hub: Hub
  private var isAdmitted = false

  init(_ session: QMPSession, _ hub: Hub) {
    self.session = session
    self.hub = hub
  }

  func channelActive(context: ChannelHandlerContext) {
    isAdmitted = hub.admit()
    guard isAdmitted else { return hub.refuse(context.channel) }
    hub.send(session.greeting, to: context.channel)
  }

  func channelRead(context: ChannelHandlerContext, data: NIOAny) {
    for byte in unwrapInboundIn(data).readableBytesView {
      guard isAdmitted, context.channel.isActive else { return }
      guard let reply = session.receive(byte) else { continue }
      hub.sendEvents()
      hub.send(reply, to: context.channel)
      if session.isNegotiated { hub.subscribe(context.channel) }
    }
  }

  func channelInactive(context: ChannelHandlerContext) {
    if isAdmitted { hub.remove(context.channel) }
  }

  func errorCaught(context: ChannelHandlerContext, error: any Error) {
    context.close(promise: nil)
  }
}
