import Glibc

/// Frames in a stream of bytes, as QEMU's `-netdev stream` and `-netdev socket` have them: the length in four bytes, big-endian,
/// then the frame.
enum StreamFraming {
  /// Bytes of the length.
  static let prefix = 4
  /// Bytes of the longest frame with its length.
  static let longest = prefix + NetworkFrame.longest
}

/// A stream on its way in: one read brings many frames, which stay where it has put them.
struct FrameReader: ~Copyable {
  /// Bytes that are read at once.
  static let usualCapacity = 256 << 10
  private let capacity: Int
  /// Before the first length, so that there is room before every frame for a virtio header.
  private static let headroom = 16

  private let start: UnsafeMutableRawPointer
  private var head = Self.headroom
  private var tail = Self.headroom
  /// The peer has announced a frame that is none: where the next one begins cannot be known.
  private(set) var isMalformed = false
  /// Frames that were too short and left out.
  private(set) var runts: UInt64 = 0

  /// With room for a frame of any length at least.
  init(capacity: Int = Self.usualCapacity) {
    self.capacity = max(capacity, StreamFraming.longest)
    start = .allocate(byteCount: Self.headroom + self.capacity, alignment: 16)
  }

  deinit { start.deallocate() }

  /// Where to read to; never empty once `next` has returned nil. The frames before are gone.
  var space: UnsafeMutableRawBufferPointer {
    mutating get {
      if head > Self.headroom {
        memmove(start + Self.headroom, start + head, tail - head)
        tail -= head - Self.headroom
        head = Self.headroom
      }
      return UnsafeMutableRawBufferPointer(start: start + tail, count: Self.headroom + capacity - tail)
    }
  }

  /// So many bytes are in `space`.
  mutating func received(_ count: Int) { tail += count }

  /// The next frame that is there whole, with its length before it; it stays until `space` is asked for.
  mutating func next() -> UnsafeMutableRawBufferPointer? {
    while tail - head >= StreamFraming.prefix, !isMalformed {
      let length = Int(UInt32(bigEndian: (start + head).loadUnaligned(as: UInt32.self)))
      guard length <= NetworkFrame.longest else {
        isMalformed = true
        return nil
      }
      let whole = StreamFraming.prefix + length
      guard tail - head >= whole else { return nil }
      let frame = UnsafeMutableRawBufferPointer(start: start + head, count: whole)
      head += whole
      if length >= NetworkFrame.shortest { return frame }
      runts += 1
    }
    return nil
  }
}
