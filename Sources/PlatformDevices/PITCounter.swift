import StateTree

/// One counter of the 8254. Times are ticks of its input clock.
struct Counter {
  /// Which of the count's bytes the guest reads and writes.
  private enum Access: UInt8 {
    case low = 1
    case high
    case both
  }

  private var mode: UInt8 = 0
  private var isBCD = false
  private var access = Access.both
  var gate = true
  /// The count register, 1 to 65536.
  private var count: UInt64 = 65536
  /// A count written in mode 2 or 3 while it counts: it takes effect at the period's end.
  private var nextCount: UInt64?
  /// When it began to count; nil while no count was written or no trigger came. While the gate holds it, `held` is what
  /// it had counted.
  private var start: UInt64?
  private var held: UInt64?
  /// The low byte written while the high one is to come.
  private var writtenLow: UInt8?
  /// The next read gives the high byte.
  private var readsHigh = false
  private var latched: UInt16?
  private var latchedStatus: UInt8?

  init() {}

  /// Rate and square wave: what has no end.
  var isPeriodic: Bool { mode == 2 || mode == 3 }
  /// Started by the gate's rising edge, and not stopped by its fall.
  private var isTriggered: Bool { mode == 1 || mode == 5 }

  // MARK: What it counts

  private func elapsed(_ now: UInt64) -> UInt64? {
    if let held { return held }
    return start.map { now &- min($0, now) }
  }

  /// The count that is in force and the phase in its period, for the periodic modes.
  private func phase(_ now: UInt64) -> (count: UInt64, phase: UInt64)? {
    guard let elapsed = elapsed(now) else { return nil }
    guard let nextCount, elapsed >= count else { return (count, elapsed % count) }
    return (nextCount, (elapsed - count) % nextCount)
  }

  /// Makes a pending count the one in force, once its time has come.
  private mutating func settle(_ now: UInt64) {
    guard let next = nextCount, let elapsed = elapsed(now), elapsed >= count else { return }
    if let start { self.start = start &+ count }
    if let held { self.held = held - count }
    count = next
    nextCount = nil
  }

  /// The OUT pin.
  func output(_ now: UInt64) -> Bool {
    switch mode {
    case 0: return elapsed(now).map { $0 >= count } ?? false
    case 1: return elapsed(now).map { $0 >= count } ?? true
    case 2: return !gate || phase(now).map { $0.phase != $0.count - 1 } ?? true
    case 3: return !gate || phase(now).map { $0.phase < ($0.count + 1) / 2 } ?? true
    default: return elapsed(now).map { $0 != count } ?? true
    }
  }

  /// The OUT pin as far as an interrupt line needs it: where only the rises matter, it stays high between them.
  func lineLevel(_ now: UInt64) -> Bool { mode > 1 || output(now) }

  /// When OUT next rises after `now`; nil where it never does by itself.
  func nextRise(after now: UInt64) -> UInt64? {
    guard held == nil, let start else { return nil }
    if isPeriodic {
      guard let phase = phase(now) else { return nil }
      return now &+ (phase.count - phase.phase)
    }
    // The strobe of modes 4 and 5 is low for one tick.
    let rise = start &+ count &+ (mode >= 4 ? 1 : 0)
    return rise > now ? rise : nil
  }

  /// The counting element as the guest reads it.
  private func value(_ now: UInt64) -> UInt16 {
    var value: UInt64
    if isPeriodic {
      let (count, phase) = phase(now) ?? (count, 0)
      // The square wave counts down by two.
      value = mode == 2 ? count - phase : count - phase * 2 % count
    } else {
      let elapsed = elapsed(now) ?? 0
      let turn: UInt64 = isBCD ? 10000 : 65536
      value = (count + turn - elapsed % turn) % turn
    }
    guard isBCD else { return UInt16(truncatingIfNeeded: value) }
    value %= 10000
    var digits: UInt16 = 0
    for place in 0..<4 as Range<UInt16> {
      digits |= UInt16(value % 10) << (place * 4)
      value /= 10
    }
    return digits
  }

  // MARK: What the guest does

  /// A control word for this counter: a mode, or the counter latch command.
  mutating func control(_ word: UInt8, _ now: UInt64) {
    guard let access = Access(rawValue: word >> 4 & 3) else {
      latchCount(now)
      return
    }
    let gate = gate
    self = Counter()
    self.gate = gate
    self.access = access
    let mode = word >> 1 & 7
    self.mode = mode >= 6 ? mode - 4 : mode
    isBCD = word & 1 != 0
  }

  mutating func latchCount(_ now: UInt64) {
    if latched == nil { latched = value(now) }
  }

  /// Output, null count, access, mode and BCD, as the read-back command gives them.
  mutating func latchStatus(_ now: UInt64) {
    settle(now)
    guard latchedStatus == nil else { return }
    let isNull = start == nil && held == nil || nextCount != nil
    latchedStatus =
      (output(now) ? 0x80 : 0) | (isNull ? 0x40 : 0) | access.rawValue << 4 | mode << 1 | (isBCD ? 1 : 0)
  }

  mutating func read(_ now: UInt64) -> UInt8 {
    if let status = latchedStatus {
      latchedStatus = nil
      return status
    }
    let value = latched ?? value(now)
    let takesHigh = access == .high || access == .both && readsHigh
    if access == .both { readsHigh.toggle() }
    if access != .both || takesHigh { latched = nil }
    return takesHigh ? UInt8(value >> 8) : UInt8(truncatingIfNeeded: value)
  }

  mutating func write(_ byte: UInt8, _ now: UInt64) {
    switch access {
    case .low: load(UInt16(byte), now)
    case .high: load(UInt16(byte) << 8, now)
    case .both:
      if let low = writtenLow {
        writtenLow = nil
        load(UInt16(byte) << 8 | UInt16(low), now)
      } else {
        writtenLow = byte
        // In mode 0 the first byte stops the counting.
        if mode == 0 { (start, held) = (nil, nil) }
      }
    }
  }

  private mutating func load(_ register: UInt16, _ now: UInt64) {
    settle(now)
    var new = UInt64(register)
    if isBCD {
      new = (0..<4 as Range<UInt16>).reversed().reduce(0) { $0 * 10 + UInt64(register >> ($1 * 4) & 15) }
    }
    if new == 0 { new = isBCD ? 10000 : 65536 }
    if isPeriodic, start != nil || held != nil {
      nextCount = new
      return
    }
    count = new
    // Modes 1 and 5 wait for a trigger; one that runs goes on with the count it has.
    guard !isTriggered else { return }
    (start, held) = gate ? (now, nil) : (nil, 0)
  }

  mutating func setGate(_ level: Bool, _ now: UInt64) {
    guard level != gate else { return }
    settle(now)
    gate = level
    switch mode {
    case 1, 5: if level { start = now }
    case 2, 3:
      // The rise loads the count afresh.
      guard start != nil || held != nil else { return }
      if let next = nextCount, level { (count, nextCount) = (next, nil) }
      (start, held) = level ? (now, nil) : (nil, 0)
    default:
      if level {
        if let held { (start, self.held) = (now &- held, nil) }
      } else if let elapsed = elapsed(now) {
        (start, held) = (nil, elapsed)
      }
    }
  }

  // MARK: Life

  func write(to writer: inout StateWriter) {
    func optional<T: FixedWidthInteger>(_ value: T?) {
      writer.write(value != nil)
      writer.write(value ?? 0)
    }
    writer.write(mode)
    writer.write(isBCD)
    writer.write(access.rawValue)
    writer.write(gate)
    writer.write(count)
    optional(nextCount)
    optional(start)
    optional(held)
    optional(writtenLow)
    writer.write(readsHigh)
    optional(latched)
    optional(latchedStatus)
  }

  mutating func read(from reader: inout StateReader) throws(StateError) {
    func optional<T: FixedWidthInteger>(_ type: T.Type = T.self) throws(StateError) -> T? {
      let isThere = try reader.read(Bool.self)
      let value = try reader.read(T.self)
      return isThere ? value : nil
    }
    mode = try reader.read()
    guard mode < 6 else { throw reader.invalid("mode", UInt64(mode)) }
    isBCD = try reader.read()
    let access = try reader.read(UInt8.self)
    guard let known = Access(rawValue: access) else { throw reader.invalid("access", UInt64(access)) }
    self.access = known
    gate = try reader.read()
    count = try reader.read()
    nextCount = try optional()
    for count in [count, nextCount ?? 1] where !(1...65536).contains(count) { throw reader.invalid("count", count) }
    start = try optional()
    held = try optional()
    writtenLow = try optional()
    readsHigh = try reader.read()
    latched = try optional()
    latchedStatus = try optional()
  }
}
