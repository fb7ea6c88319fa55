import CGuest

/// What a frame holds behind its Ethernet header, so that one that is lost, doubled or damaged shows: little-endian at offset 14
/// a mark (16 bits), number (64), session (32), kind (16), length of the frame (16), a checksum of these (64), then the checksum again and
/// again, its bytes cut off at the end.
enum Frame {
  enum Kind {
    static let data: UInt16 = 1
    static let echo: UInt16 = 2
    static let announcement: UInt16 = 3
  }

  /// What has been read from a frame.
  struct Content {
    var source: UInt64
    var number: UInt64
    var session: UInt32
    var kind: UInt16
  }

  static let shortest: UInt64 = 60
  static let broadcast: UInt64 = 0xffff_ffff_ffff
  /// IEEE's for local experiments, 0x88b5 (802, 9.2.3).
  private static let type: UInt16 = 0xb588
  private static let mark: UInt16 = 0x4e53
  private static let payload: UInt64 = 40

  private static func checksum(_ number: UInt64, _ session: UInt32, _ kind: UInt16, _ length: UInt64) -> UInt64 {
    let place = UInt64(session) | UInt64(kind) << 32 | length << 48
    let mixed = number &* 0x9e37_79b9_7f4a_7c15 ^ place &* 0xbf58_476d_1ce4_e5b9
    return mixed ^ mixed >> 29
  }

  private static func storeAddress(_ place: UInt64, _ address: UInt64) {
    for index in 0..<UInt64(6) { store8(place + index, UInt8(truncatingIfNeeded: address >> (40 - index * 8))) }
  }

  private static func loadAddress(_ place: UInt64) -> UInt64 {
    var address: UInt64 = 0
    for index in 0..<UInt64(6) { address = address << 8 | UInt64(load8(place + index)) }
    return address
  }

  static func fill(
    _ frame: UInt64, length: UInt64, to destination: UInt64, from source: UInt64, number: UInt64, session: UInt32,
    kind: UInt16
  ) {
    let sum = checksum(number, session, kind, length)
    storeAddress(frame, destination)
    storeAddress(frame + 6, source)
    store16(frame + 12, type)
    store16(frame + 14, mark)
    store64(frame + 16, number)
    store32(frame + 24, session)
    store16(frame + 28, kind)
    store16(frame + 30, UInt16(truncatingIfNeeded: length))
    store64(frame + 32, sum)
    let words = (length - payload) / 8
    fill64(frame + payload, sum, words)
    for index in payload + words * 8..<length {
      store8(frame + index, UInt8(truncatingIfNeeded: sum >> (index % 8 * 8)))
    }
  }

  /// Whether it is of this kind of guest at all.
  static func isOurs(_ frame: Bytes) -> Bool {
    frame.count >= shortest && load16(frame.address + 12) == type && load16(frame.address + 14) == mark
  }

  /// What is in a frame; nil for a damaged one.
  static func content(_ frame: Bytes) -> Content? {
    let start = frame.address
    let (number, session, kind) = (load64(start + 16), load32(start + 24), load16(start + 28))
    let sum = checksum(number, session, kind, frame.count)
    let words = (frame.count - payload) / 8
    guard load16(start + 30) == UInt16(truncatingIfNeeded: frame.count), load64(start + 32) == sum,
      all_words64(start + payload, sum, words) != 0
    else { return nil }
    for index in payload + words * 8..<frame.count
    where load8(start + index) != UInt8(truncatingIfNeeded: sum >> (index % 8 * 8)) { return nil }
    return Content(source: loadAddress(start + 6), number: number, session: session, kind: kind)
  }
}

/// Which numbers of a series have come: each is to come once, in any order within a window.
struct Series {
  private static let window: UInt64 = 4096
  private var session: UInt32 = 0
  private let seen = guest_allocate(Series.window / 8, 8)
  /// The highest number that has come, or is no longer waited for.
  private(set) var last: UInt64 = 0
  private(set) var received: UInt64 = 0
  private(set) var lost: UInt64 = 0
  private(set) var doubled: UInt64 = 0
  /// Came after they were counted as lost.
  private(set) var late: UInt64 = 0

  private func bit(_ number: UInt64) -> (place: UInt64, mask: UInt8) {
    let index = number % Series.window
    return (seen + index / 8, 1 << UInt8(index % 8))
  }

  private func clear(_ number: UInt64) {
    let (place, mask) = bit(number)
    store8(place, load8(place) & ~mask)
  }

  /// Notes a number; one of another session begins anew.
  mutating func note(_ number: UInt64, _ session: UInt32) {
    if session != self.session {
      self.session = session
      last = number - 1
      fill64(seen, 0, Series.window / 64)
    }
    if number > last {
      skip(to: number - 1)
      last = number
    } else {
      if last - number >= Series.window { return }
      let (place, mask) = bit(number)
      if load8(place) & mask != 0 {
        doubled += 1
        return
      }
      late += 1
      if lost > 0 { lost -= 1 }
    }
    if number == last { clear(number) }
    let (place, mask) = bit(number)
    store8(place, load8(place) | mask)
    received += 1
  }

  /// Waits no longer for those up to a number.
  mutating func skip(to number: UInt64) {
    if number <= last { return }
    lost += number - last
    if number - last >= Series.window {
      fill64(seen, 0, Series.window / 64)
    } else {
      for skipped in last + 1...number { clear(skipped) }
    }
    last = number
  }
}
