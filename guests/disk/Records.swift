import CGuest

/// Which records there are, where they are, and what was last seen of each on each disk.
final class Records {
  let count: UInt64
  /// Sectors of a record.
  let sectors: UInt64
  let disks: Int
  /// Two 32-bit words a record and disk: the lowest and the highest generation of its sectors.
  private let seen: UInt64

  /// The lowest generation of a record with a sector that is neither empty nor its own.
  private static let wrong: UInt32 = .max

  init(count: UInt64, sectors: UInt64, disks: Int) {
    self.count = count
    self.sectors = sectors
    self.disks = disks
    seen = guest_allocate(count * UInt64(disks) * 8, 8)
  }

  var bytes: UInt64 { sectors * 512 }

  /// Records are numbered from 1.
  func sector(_ record: UInt64) -> UInt64 { (record - 1) * sectors }

  /// With two disks, a record is on the first, the second or both.
  func isOn(_ record: UInt64, disk: Int) -> Bool {
    disks == 1 || record % 3 == 2 || record % 3 == UInt64(disk)
  }

  private func place(_ record: UInt64, _ disk: Int) -> UInt64 {
    seen + ((record - 1) * UInt64(disks) + UInt64(disk)) * 8
  }

  func remember(_ record: UInt64, disk: Int, _ buffer: UInt64) {
    var low = UInt32.max - 1
    var high: UInt32 = 0
    for sector in 0..<sectors {
      switch Record.content(buffer, number: record, sector: sector, disk: disk) {
      case .nothing: low = 0
      case .generation(let generation):
        low = min(low, generation)
        high = max(high, generation)
      case .wrong:
        store32(place(record, disk), Self.wrong)
        store32(place(record, disk) + 4, 0)
        return
      }
    }
    store32(place(record, disk), low)
    store32(place(record, disk) + 4, high)
  }

  /// Ends the guest where what was seen of a record is not of these generations.
  func check(_ record: UInt64, disk: Int, from lowest: UInt32, to highest: UInt32) {
    let low = load32(place(record, disk))
    let high = load32(place(record, disk) + 4)
    if low == Self.wrong {
      say("FAIL disk \(disk) record \(record): it is neither a record nor empty")
      Power.fail()
    }
    if low < lowest || high > highest {
      say("FAIL disk \(disk) record \(record): generation \(low) to \(high), not \(lowest) to \(highest)")
      Power.fail()
    }
  }

  /// What is on the disks: how many records are whole on each disk that they belong to, and the last write that left a
  /// trace: the highest generation, and the highest record of it.
  struct Summary {
    var whole: UInt64 = 0
    var generation: UInt32 = 0
    var last: UInt64 = 0
  }

  var summary: Summary {
    var summary = Summary()
    for record in 1...count {
      var isWhole = true
      for disk in 0..<disks where isOn(record, disk: disk) {
        let low = load32(place(record, disk))
        let high = load32(place(record, disk) + 4)
        if low == 0 || low == Self.wrong { isWhole = false }
        if high != 0 && high >= summary.generation {
          summary.generation = high
          summary.last = record
        }
      }
      if isWhole { summary.whole += 1 }
    }
    return summary
  }

  /// The first record of the last interval that left a trace: those before it were flushed before its writing began. Where no more
  /// than `window` records before a record may be under way with it, those before them were written too.
  func begun(_ summary: Summary, flush: UInt64, window: UInt64 = .max) -> UInt64 {
    if summary.last == 0 { return 1 }
    let start = (summary.last - 1) / flush * flush + 1
    return summary.last > window ? max(start, summary.last - window) : start
  }

  /// Ends the guest at the first record that is wrong: one of another generation than writing up to `summary` can have left,
  /// with a flush every `flush` records and `window` of them under way, or older than what was `known` to be flushed.
  func verify(_ summary: Summary, flush: UInt64, window: UInt64, known: (record: UInt64, generation: UInt32)) {
    let begun = begun(summary, flush: flush, window: window)
    for record in 1...count {
      let flushed = summary.generation == 0 || record < begun ? summary.generation : summary.generation - 1
      let acknowledged = record <= known.record || known.generation == 0 ? known.generation : known.generation - 1
      for disk in 0..<disks where isOn(record, disk: disk) {
        check(record, disk: disk, from: max(flushed, acknowledged), to: summary.generation)
      }
    }
  }
}
