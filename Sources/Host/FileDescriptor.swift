import Glibc

/// Owner of one open file descriptor: closes it exactly once.
public struct FileDescriptor: ~Copyable, Sendable {
  /// The descriptor's number, valid while the owner lives.
  public let rawValue: Int32

  /// Takes ownership of an open descriptor.
  public init(owning rawValue: Int32) {
    self.rawValue = rawValue
  }

  deinit {
    close(rawValue)
  }

  /// Gives the number away; the caller closes it.
  public consuming func release() -> Int32 {
    let value = rawValue
    discard self
    return value
  }

  /// A second descriptor of the same open file (`F_DUPFD_CLOEXEC`).
  public borrowing func duplicate() throws(HostError) -> FileDescriptor {
    FileDescriptor(owning: try check("fcntl(F_DUPFD_CLOEXEC)", fcntl(rawValue, F_DUPFD_CLOEXEC, 0)))
  }

  /// Opens `path` with `O_CLOEXEC` added to `flags`.
  public static func open(
    _ path: String, _ flags: Int32, mode: mode_t = 0o644
  ) throws(HostError) -> FileDescriptor {
    let value = Glibc.open(path, flags | O_CLOEXEC, mode)
    guard value >= 0 else { throw .path("open", path: path, errno: errno) }
    return FileDescriptor(owning: value)
  }

  /// Writes every byte, going on after short writes and interruptions.
  public borrowing func writeAll(_ bytes: UnsafeRawBufferPointer) throws(HostError) {
    var written = 0
    while written < bytes.count {
      let count = write(rawValue, bytes.baseAddress! + written, bytes.count - written)
      if count < 0 {
        if errno == EINTR { continue }
        throw .systemCall("write", errno: errno)
      }
      written += count
    }
  }

  /// Sends every byte to a socket; a peer that is gone is EPIPE, never a signal.
  public borrowing func sendAll(_ bytes: UnsafeRawBufferPointer) throws(HostError) {
    var rest = bytes[...]
    while !rest.isEmpty {
      let part = UnsafeRawBufferPointer(rebasing: rest)
      let count = send(rawValue, part.baseAddress, part.count, Int32(MSG_NOSIGNAL))
      if count < 0 {
        if errno == EINTR { continue }
        throw .systemCall("send", errno: errno)
      }
      rest = rest.dropFirst(count)
    }
  }

  /// Reads at most `buffer.count` bytes; 0 at the end of the file, nil where the descriptor would block.
  public borrowing func read(into buffer: UnsafeMutableRawBufferPointer) throws(HostError) -> Int? {
    while true {
      let count = Glibc.read(rawValue, buffer.baseAddress, buffer.count)
      if count >= 0 { return count }
      switch errno {
      case EINTR: continue
      case EAGAIN: return nil
      default: throw .systemCall("read", errno: errno)
      }
    }
  }
}

/// Turns the C convention (-1 and `errno`) into a typed error; `errno` is read with nothing in between.
@inline(__always)
public func check(_ call: @autoclosure () -> String, _ result: Int32) throws(HostError) -> Int32 {
  if result >= 0 { return result }
  let code = errno
  throw .systemCall(call(), errno: code)
}
