import CLinux
import Glibc
import Host
import Machine
import PlatformDevices
import Synchronization

/// COM1's other end, as `--serial` says: standard input and output, nothing, a file, or a unix socket's client.
final class Console: SerialOutput {
  private struct Input {
    /// Bytes that the port had no room for yet; while there are any, nothing more is read.
    var waiting: [UInt8] = []
    var keys = ConsoleKeys()
    var isWatched = false
  }

  /// /dev/null where there is none.
  private let input: FileDescriptor
  private let output: FileDescriptor
  private let hasInput: Bool
  private let listener: Listener?
  /// The socket's client; output without one is lost, as with QEMU.
  private let client = Mutex<Client?>(nil)
  private let isTerminal: Bool
  /// Whether a file's bytes come when the port has room for them, and not when the loop gets round to it.
  private let isDeterministic: Bool
  private let state = Mutex(Input())

  private final class Listener: Sendable {
    let listener: StreamListener
    init(_ listener: consuming StreamListener) { self.listener = listener }
  }

  private final class Client: Sendable {
    let socket: FileDescriptor
    init(_ socket: consuming FileDescriptor) { self.socket = socket }
  }

  /// Opens what `--serial` names.
  init(_ text: String, isDeterministic: Bool = false) throws(Failure) {
    self.isDeterministic = isDeterministic
    hasInput = text == "stdio"
    isTerminal = hasInput && isatty(STDIN_FILENO) == 1
    let path =
      switch text {
      case "stdio", "none": "/dev/null"
      case _ where text.hasPrefix("unix:"): "/dev/null"
      case _ where text.hasPrefix("file:"): String(text.dropFirst(5))
      default:
        throw .badValue(option: "--serial", value: text, expected: "stdio, none, file:PATH or unix:PATH")
      }
    do {
      input = hasInput ? FileDescriptor(owning: dup(STDIN_FILENO)) : try FileDescriptor.open("/dev/null", O_RDONLY)
      output =
        hasInput
        ? FileDescriptor(owning: dup(STDOUT_FILENO)) : try FileDescriptor.open(path, O_WRONLY | O_CREAT | O_TRUNC)
    } catch {
      throw .output(path: path, reason: HostError.reason(error.errno))
    }
    do {
      listener = text.hasPrefix("unix:") ? Listener(try StreamListener(StreamEndpoint(text))) : nil
    } catch {
      throw .host(error)
    }
  }

  /// Begins to feed the machine's COM1, with the terminal in raw mode where there is one.
  func attach(_ machine: Machine) throws(Failure) {
    if let listener { try accept(listener, machine) }
    guard hasInput else { return }
    if isTerminal, clinux_terminal_raw(STDIN_FILENO) < 0 { throw .host(.systemCall("tcsetattr", errno: errno)) }
    do {
      try machine.loop.add(input.rawValue, .readable) { [self, machine] _ in pump(machine, from: input.rawValue) }
      state.withLock { $0.isWatched = true }
    } catch .systemCall(_, EPERM) {
      // A regular file or /dev/null cannot be waited for: it can always be read.
      execute(machine) { [self, machine] in pump(machine, from: input.rawValue) }
    } catch {
      throw .host(error)
    }
  }

  /// One client at a time: the next one takes the place of the one before.
  private func accept(_ listener: Listener, _ machine: Machine) throws(Failure) {
    do {
      try machine.loop.add(listener.listener.descriptor.rawValue, .readable) { [self, machine] _ in
        guard let socket = try? listener.listener.accept() else { return }
        let client = Client(socket)
        let number = client.socket.rawValue
        self.client.withLock { old in
          if let old { machine.loop.remove(old.socket.rawValue) }
          old = client
        }
        state.withLock { $0.isWatched = true }
        try? machine.loop.add(number, .readable) { [self, machine] _ in pump(machine, from: number) }
      }
    } catch {
      throw .host(error)
    }
  }

  /// Gives the terminal back.
  func close() {
    clinux_terminal_restore()
  }

  /// One byte at a time: the exit that brought it costs more than the call.
  func write(_ byte: UInt8) {
    guard listener != nil else { return Self.write(byte, to: output.rawValue) }
    client.withLock { if let client = $0 { Self.write(byte, to: client.socket.rawValue) } }
  }

  private static func write(_ byte: UInt8, to descriptor: Int32) {
    withUnsafeBytes(of: byte) { bytes in
      while Glibc.write(descriptor, bytes.baseAddress, 1) < 0 {
        // A terminal that other programs have made non-blocking may be full for a moment; a reader that is gone stays gone.
        guard errno == EINTR || errno == EAGAIN else { return }
        var poll = pollfd(fd: descriptor, events: Int16(POLLOUT), revents: 0)
        if Glibc.poll(&poll, 1, 100) == 0 { return }
      }
    }
  }

  private func execute(_ machine: Machine, _ body: @escaping @Sendable () -> Void) {
    if isDeterministic, !state.withLock({ $0.isWatched }) { body() } else { machine.loop.execute(body) }
  }

  /// Moves bytes from `source` to the port until one of them has no more to give or to take. Runs on the loop.
  private func pump(_ machine: Machine, from source: Int32) {
    repeat {
      guard read(source, machine) else { return }
    } while deliver(machine, from: source) && !state.withLock({ $0.isWatched })
  }

  /// Gives the port what waits for it; false where it has no room for all, and then it goes on when there is.
  private func deliver(_ machine: Machine, from source: Int32) -> Bool {
    let waiting = state.withLock { $0.waiting }
    guard !waiting.isEmpty else { return true }
    let taken = machine.serial.receive(waiting) { [weak self, weak machine] in
      guard let self, let machine else { return }
      self.execute(machine) {
        // What can be waited for says itself when there is more; a file is read on.
        guard self.deliver(machine, from: source), !self.state.withLock({ $0.isWatched }) else { return }
        self.pump(machine, from: source)
      }
    }
    state.withLock { $0.waiting.removeFirst(taken) }
    // While bytes wait for the port, a readable descriptor must not wake the loop again and again.
    if state.withLock({ $0.isWatched }) {
      try? machine.loop.modify(source, taken == waiting.count ? .readable : [])
    }
    return taken == waiting.count
  }

  /// Reads once; false at the end of the input, or when nothing is there.
  private func read(_ source: Int32, _ machine: Machine) -> Bool {
    var bytes = [UInt8](repeating: 0, count: 4096)
    let count = Glibc.read(source, &bytes, bytes.count)
    guard count > 0 else {
      if count < 0, errno == EINTR || errno == EAGAIN { return false }
      machine.loop.remove(source)
      client.withLock { if $0?.socket.rawValue == source { $0 = nil } }
      return false
    }
    guard isTerminal else {
      state.withLock { $0.waiting += bytes.prefix(count) }
      return true
    }
    let (toGuest, actions) = state.withLock { $0.keys.filter(bytes.prefix(count)) }
    state.withLock { $0.waiting += toGuest }
    for action in actions {
      switch action {
      case .end: machine.finish(.quit)
      case .help: printError(ConsoleKeys.help)
      }
    }
    return true
  }
}
