import Glibc

/// Times of snapshots: milliseconds since 1970, UTC.
enum RecoveryTime {
  static func now() -> UInt64 {
    var time = timespec()
    clock_gettime(CLOCK_REALTIME, &time)
    return UInt64(time.tv_sec) * 1000 + UInt64(time.tv_nsec) / 1_000_000
  }

  /// When a file was last written to.
  static func modified(_ path: String) -> UInt64? {
    var status = stat()
    guard stat(path, &status) == 0, status.st_mtim.tv_sec >= 0 else { return nil }
    return UInt64(status.st_mtim.tv_sec) * 1000 + UInt64(status.st_mtim.tv_nsec) / 1_000_000
  }

  static func text(_ milliseconds: UInt64) -> String {
    var seconds = time_t(clamping: milliseconds / 1000)
    var parts = tm()
    guard gmtime_r(&seconds, &parts) != nil else { return "\(milliseconds)" }
    func two(_ value: Int32) -> String { value < 10 ? "0\(value)" : "\(value)" }
    return "\(parts.tm_year + 1900)-\(two(parts.tm_mon + 1))-\(two(parts.tm_mday))T\(two(parts.tm_hour)):"
      + "\(two(parts.tm_min)):\(two(parts.tm_sec))Z"
  }

  /// `YYYYMMDDTHHMMSSZ`, as files are called.
  static func compact(_ milliseconds: UInt64) -> String { text(milliseconds).filter { $0 != "-" && $0 != ":" } }

  /// `YYYY-MM-DDTHH:MM:SSZ`.
  static func parse(_ text: String) -> UInt64? {
    let bytes = Array(text.utf8)
    guard bytes.count == 20 else { return nil }
    for (place, mark) in [(4, "-"), (7, "-"), (10, "T"), (13, ":"), (16, ":"), (19, "Z")] {
      guard bytes[place] == mark.utf8.first else { return nil }
    }
    func number(_ range: Range<Int>) -> Int32? {
      guard range.allSatisfy({ (0x30...0x39).contains(bytes[$0]) }) else { return nil }
      return range.reduce(0) { $0 * 10 + Int32(bytes[$1] - 0x30) }
    }
    guard let year = number(0..<4), let month = number(5..<7), let day = number(8..<10), let hour = number(11..<13),
      let minute = number(14..<16), let second = number(17..<19), year >= 1970, (1...12).contains(month),
      (1...31).contains(day), hour < 24, minute < 60, second < 61
    else { return nil }
    var parts = tm()
    (parts.tm_year, parts.tm_mon, parts.tm_mday) = (year - 1900, month - 1, day)
    (parts.tm_hour, parts.tm_min, parts.tm_sec) = (hour, minute, second)
    let seconds = timegm(&parts)
    return seconds < 0 ? nil : UInt64(seconds) * 1000
  }
}
