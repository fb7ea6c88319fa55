import COpenSSL
import Glibc

/// A session's way to its socket: it reads there without waiting, and collects what is to be sent.
final class Wire {
  let socket: Int32
  /// Sent by whoever may wait.
  var output = CipherBuffer()
  /// Why the last read failed.
  private(set) var errno: Int32 = 0

  init(_ socket: Int32) { self.socket = socket }

  /// The library's end of it, which the library owns; it must not outlive this.
  func makeBIO() -> OpaquePointer? {
    guard let bio = BIO_new(Self.method) else { return nil }
    BIO_set_data(bio, Unmanaged.passUnretained(self).toOpaque())
    BIO_set_init(bio, 1)
    return bio
  }

  private nonisolated(unsafe) static let method: OpaquePointer? = {
    let method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "swiftvmm socket")
    BIO_meth_set_read(method) { bio, bytes, count in
      copenssl_clear_retry(bio)
      guard let wire = Wire.of(bio), let bytes else { return -1 }
      return wire.read(bio, bytes, Int(count))
    }
    BIO_meth_set_write(method) { bio, bytes, count in
      copenssl_clear_retry(bio)
      guard let wire = Wire.of(bio), let bytes else { return -1 }
      wire.output.append(bytes, Int(count))
      return count
    }
    // Nothing but a flush is asked for, which has nothing to do.
    BIO_meth_set_ctrl(method) { _, command, _, _ in command == BIO_CTRL_FLUSH ? 1 : 0 }
    return method
  }()

  private static func of(_ bio: OpaquePointer?) -> Wire? {
    BIO_get_data(bio).map { Unmanaged<Wire>.fromOpaque($0).takeUnretainedValue() }
  }

  private func read(_ bio: OpaquePointer?, _ bytes: UnsafeMutableRawPointer, _ count: Int) -> Int32 {
    while true {
      let got = recv(socket, bytes, count, Int32(MSG_DONTWAIT))
      if got >= 0 { return Int32(got) }
      let code = Glibc.errno
      if code == EINTR { continue }
      if code == EAGAIN { copenssl_will_retry_read(bio) }
      errno = code
      return -1
    }
  }
}
