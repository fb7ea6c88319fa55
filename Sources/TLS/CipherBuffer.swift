import Glibc

/// Bytes on their way to a socket.
final class CipherBuffer {
  private var base = UnsafeMutableRawPointer.allocate(byteCount: 16 << 10, alignment: 64)
  private var capacity = 16 << 10
  private var start = 0
  private var end = 0

  deinit { base.deallocate() }

  var isEmpty: Bool { start == end }
  var count: Int { end - start }
  var first: UnsafeRawPointer { UnsafeRawPointer(base + start) }

  func append(_ bytes: UnsafeRawPointer, _ count: Int) {
    if capacity - end < count { makeRoom(count) }
    memcpy(base + end, bytes, count)
    end += count
  }

  func removeFirst(_ count: Int) {
    start += count
    if start == end { (start, end) = (0, 0) }
  }

  private func makeRoom(_ count: Int) {
    let used = end - start
    if used + count > capacity {
      capacity = max(used + count, capacity * 2)
      let larger = UnsafeMutableRawPointer.allocate(byteCount: capacity, alignment: 64)
      memcpy(larger, base + start, used)
      base.deallocate()
      base = larger
    } else {
      memmove(base, base + start, used)
    }
    (start, end) = (0, used)
  }
}
