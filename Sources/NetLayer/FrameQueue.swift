import Glibc

/// Bytes on their way out that the socket had no room for: bounded, so that a peer that does not read costs its own frames only.
struct FrameQueue: ~Copyable {
  /// Bytes that wait at most.
  static let capacity = 1 << 20

  /// Most peers never need it.
  private var storage: UnsafeMutableRawPointer?
  /// They only rise; the place is the remainder by the capacity.
  private var head = 0
  private var tail = 0

  init() {}

  deinit { storage?.deallocate() }

  var isEmpty: Bool { head == tail }
  /// Bytes that wait.
  var count: Int { tail - head }

  /// Adds all of the bytes, or none and returns false where there is no room.
  mutating func append(_ bytes: UnsafeRawBufferPointer) -> Bool {
    guard let source = bytes.baseAddress, bytes.count <= Self.capacity - count else { return false }
    let storage = self.storage ?? .allocate(byteCount: Self.capacity, alignment: 16)
    self.storage = storage
    let place = tail % Self.capacity
    let first = min(bytes.count, Self.capacity - place)
    memcpy(storage + place, source, first)
    memcpy(storage, source + first, bytes.count - first)
    tail += bytes.count
    return true
  }

  /// The bytes in one piece or two: the second is empty, or follows the first.
  func pieces() -> (iovec, iovec) {
    let place = head % Self.capacity
    let first = min(count, Self.capacity - place)
    return (
      iovec(iov_base: storage.map { $0 + place }, iov_len: first), iovec(iov_base: storage, iov_len: count - first)
    )
  }

  mutating func removeFirst(_ count: Int) { head += count }
}
