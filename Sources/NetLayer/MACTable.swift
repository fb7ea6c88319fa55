import Glibc

/// Which port each station was last seen at (IEEE 802.1D, 7.9): bounded, forgetful, and without a place that a stranger's
/// addresses could be aimed at.
struct MACTable: ~Copyable {
  /// What `learn` has done.
  enum Learned: Equatable {
    /// It was known there.
    case known
    /// It is new.
    case new
    /// It was at another port before.
    case moved
    /// It is not known, and there is no room: frames for it are flooded.
    case full
  }

  private struct Entry {
    /// `empty`, or a station.
    var station: UInt64
    var port: Int32
    /// Nanoseconds of the monotonic clock.
    var seen: UInt64
  }

  /// No station: multicast addresses are not learned.
  private static let empty: UInt64 = 0xffff_ffff_ffff

  private let entries: UnsafeMutablePointer<Entry>
  private let mask: Int
  private let shift: UInt64
  private let seed: UInt64
  private let capacity: Int
  private let ageing: UInt64
  /// When there may be something to forget: looking through a full table for every new station would cost more than the station.
  private var nextSweep: UInt64 = 0
  /// Stations in the table, those that have not been forgotten yet included.
  private(set) var count = 0

  /// A table of at most `capacity` stations that forgets those not seen for `ageing` nanoseconds.
  init(capacity: Int, ageing: UInt64, seed: UInt64 = .random(in: 0...UInt64.max)) {
    // Half of the places stay free, so that what is sought is near.
    var size = 16
    while size < capacity * 2 { size *= 2 }
    entries = .allocate(capacity: size)
    entries.initialize(repeating: Entry(station: Self.empty, port: 0, seen: 0), count: size)
    mask = size - 1
    shift = UInt64(64 - size.trailingZeroBitCount)
    self.seed = seed
    self.capacity = capacity
    self.ageing = ageing
  }

  deinit { entries.deallocate() }

  /// The port that a station is at; nil where that is not known.
  func port(of station: MACAddress, now: UInt64) -> Int? {
    let entry = entries[place(of: station.rawValue)]
    guard entry.station == station.rawValue, now &- entry.seen < ageing else { return nil }
    return Int(entry.port)
  }

  /// A frame from the station, no multicast address, has come in at the port.
  mutating func learn(_ station: MACAddress, at port: Int, now: UInt64) -> Learned {
    var place = place(of: station.rawValue)
    if entries[place].station == station.rawValue {
      let isFresh = now &- entries[place].seen < ageing
      let isSame = entries[place].port == Int32(truncatingIfNeeded: port)
      entries[place].port = Int32(truncatingIfNeeded: port)
      entries[place].seen = now
      return !isFresh ? .new : isSame ? .known : .moved
    }
    if count == capacity {
      guard now >= nextSweep else { return .full }
      nextSweep = now &+ 1_000_000_000
      forget(before: now)
      guard count < capacity else { return .full }
      place = self.place(of: station.rawValue)
    }
    entries[place] = Entry(station: station.rawValue, port: Int32(truncatingIfNeeded: port), seen: now)
    count += 1
    return .new
  }

  /// Forgets the stations of a port that has gone.
  mutating func forget(port: Int) {
    removeAll { $0.port == Int32(truncatingIfNeeded: port) }
  }

  /// Forgets the stations that have not been seen for too long.
  mutating func forget(before now: UInt64) {
    let ageing = ageing
    removeAll { now &- $0.seen >= ageing }
  }

  /// Every station with its port.
  func forEach(_ body: (MACAddress, Int) -> Void) {
    for index in 0...mask where entries[index].station != Self.empty {
      body(MACAddress(rawValue: entries[index].station), Int(entries[index].port))
    }
  }

  private mutating func removeAll(where isOver: (Entry) -> Bool) {
    guard count > 0 else { return }
    // Rebuilding costs no more than closing the gap after each.
    var kept: [Entry] = []
    for index in 0...mask where entries[index].station != Self.empty {
      if !isOver(entries[index]) { kept.append(entries[index]) }
      entries[index].station = Self.empty
    }
    for entry in kept { entries[place(of: entry.station)] = entry }
    count = kept.count
  }

  /// Where the station is, or the free place where it would go.
  @inline(__always)
  private func place(of station: UInt64) -> Int {
    var place = Int(truncatingIfNeeded: hash(station) >> shift)
    while entries[place].station != station, entries[place].station != Self.empty { place = (place &+ 1) & mask }
    return place
  }

  /// Multiplications by numbers that nobody outside knows.
  @inline(__always)
  private func hash(_ station: UInt64) -> UInt64 {
    let product = (station ^ seed).multipliedFullWidth(by: seed | 1 << 63 | 1)
    return (product.high ^ product.low) &* 0x9e37_79b9_7f4a_7c15
  }
}
