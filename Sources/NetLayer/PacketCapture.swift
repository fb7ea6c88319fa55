import Glibc
import Host

/// A file of frames in the format of libpcap, with times in nanoseconds: tshark and tcpdump read it.
final class PacketCapture {
  /// Bytes that are written at once.
  private static let capacity = 128 << 10

  private let path: String
  private let file: FileDescriptor
  private var bytes: [UInt8] = []

  /// Makes or replaces a file.
  init(path: String) throws(NetworkError) {
    self.path = path
    do throws(HostError) { file = try FileDescriptor.open(path, O_WRONLY | O_CREAT | O_TRUNC) } catch {
      throw .capture(path: path, error)
    }
    bytes.reserveCapacity(Self.capacity)
    // Nanoseconds, version 2.4, UTC, the longest frame, Ethernet.
    for word: UInt32 in [0xa1b2_3c4d, 4 << 16 | 2, 0, 0, UInt32(NetworkFrame.longest), 1] { append(word) }
    try flush()
  }

  private func append(_ word: UInt32) {
    withUnsafeBytes(of: word.littleEndian) { bytes.append(contentsOf: $0) }
  }

  func append(_ frame: UnsafeRawBufferPointer) throws(NetworkError) {
    var time = timespec()
    clock_gettime(CLOCK_REALTIME, &time)
    let length = UInt32(truncatingIfNeeded: frame.count)
    for word in [UInt32(truncatingIfNeeded: time.tv_sec), UInt32(truncatingIfNeeded: time.tv_nsec), length, length] {
      append(word)
    }
    bytes.append(contentsOf: frame)
    if bytes.count > Self.capacity - StreamFraming.longest { try flush() }
  }

  func flush() throws(NetworkError) {
    let failure = bytes.withUnsafeBytes { part -> HostError? in
      do throws(HostError) { try file.writeAll(part) } catch { return error }
      return nil
    }
    if let failure { throw .capture(path: path, failure) }
    bytes.removeAll(keepingCapacity: true)
  }
}
