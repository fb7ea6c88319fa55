import CLinux
import Glibc
import Host
import Machine
import PlatformDevices
import Synchronization

/// COM1's other end, as `--serial` says: standard input and output, nothing, or a file.
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
  private let isTerminal: Bool
  private let state = Mutex(Input())

  /// Opens what `--serial` names.
  init(_ text: String) throws(Failure) {
    hasInput = text == "stdio"
    isTerminal = hasInput && isatty(STDIN_FILENO) == 1
    let path =
      switch text {
      case "stdio", "none": "/dev/null"
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
  }

  /// Begins to feed the machine's COM1, with the terminal in raw mode where there is one.
  func attach(_ machine: Machine) throws(Failure) {
    guard hasInput else { return }
    if isTerminal, clinux_terminal_raw(STDIN_FILENO) < 0 { throw .host(.systemCall("tcsetattr", errno: errno)) }
    do {
      try machine.loop.add(input.rawValue, .readable) { [self, machine] _ in pump(machine) }
      state.withLock { $0.isWatched = true }
    } catch .systemCall(_, EPERM) {
      // A regular file or /dev/null cannot be waited for: it can always be read.
      machine.loop.execute { [self, machine] in pump(machine) }
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
    withUnsafeBytes(of: byte) { bytes in
      while Glibc.write(output.rawValue, bytes.baseAddress, 1) < 0 {
        // A terminal that other programs have made non-blocking may be full for a moment; a reader that is gone stays gone.
        guard errno == EINTR || errno == EAGAIN else { return }
        var poll = pollfd(fd: output.rawValue, events: Int16(POLLOUT), revents: 0)
        if Glibc.poll(&poll, 1, 100) == 0 { return }
      }
    }
  }

  /// Moves bytes from the input to the port until one of them has no more to give or to take. Runs on the loop.
  private func pump(_ machine: Machine) {
    while true {
      let waiting = state.withLock { $0.waiting }
      if !waiting.isEmpty {
        let taken = machine.serial.receive(waiting) { [weak self, weak machine] in
          guard let self, let machine else { return }
          machine.loop.execute { self.pump(machine) }
        }
        state.withLock { $0.waiting.removeFirst(taken) }
        watch(machine, taken == waiting.count)
        if taken < waiting.count { return }
        if state.withLock({ $0.isWatched }) { return }
      }
      guard read(machine) else { return }
    }
  }

  /// While bytes wait for the port, a readable descriptor must not wake the loop again and again.
  private func watch(_ machine: Machine, _ wanted: Bool) {
    guard state.withLock({ $0.isWatched }) else { return }
    try? machine.loop.modify(input.rawValue, wanted ? .readable : [])
  }

  /// Reads once; false at the end of the input, or when nothing is there.
  private func read(_ machine: Machine) -> Bool {
    var bytes = [UInt8](repeating: 0, count: 4096)
    let result = bytes.withUnsafeMutableBytes { buffer in
      Result { () throws(HostError) in try input.read(into: buffer) }
    }
    guard let count = try? result.get(), count > 0 else {
      machine.loop.remove(input.rawValue)
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
