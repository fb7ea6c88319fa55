import CGuest
import CLoops

/// How fast the CPU is: a line of JSON a loop, with the instructions it executed, the bytes it moved, cycles of the TSC and
/// nanoseconds of the PM timer. A line that says `begin` comes first, for those who measure from outside.
///
/// `loop=NAME` runs one alone. A loop's own name sets the size of one round: `alu=`, `branchy=` and `cr3=` iterations,
/// `calls=` Fibonacci's argument, `chase=`, `copy=` and `rep-movsq=` KiB. Rounds are repeated until `milliseconds=` (0) have
/// gone by; a round must take less than four seconds. Copies of 64 MiB want a machine of 256 MiB.
func guestMain() {
  expect("a PM timer", PMTimer.isPresent)
  alu()
  calls()
  branchy()
  chase()
  copy("copy", kibibytes: 32, instructions: { loop_copy_instructions($0 / 32) }) { loop_copy($0, $1, $2 / 32) }
  copy("rep-movsq", kibibytes: 256, instructions: { _ in loop_rep_movsq_instructions() }) {
    loop_rep_movsq($0, $1, $2 / 8)
  }
  cr3()
}

private func alu() {
  guard let size = size("alu", default: 2000, in: 1...1_000_000_000) else { return }
  var (a, d, s, k): (UInt64, UInt64, UInt64, UInt64) = (0, 0, 1, 0x9e37_79b9_7f4a_7c15)
  for _ in 0..<100 {
    a &+= k
    d ^= a
    d = d << 13 | d >> 51
    s = s &+ d &* 4 &+ 7
    a &-= s
    k |= 1
  }
  expect("alu", loop_alu(100), equals: (a ^ d) &+ s)
  row("alu", instructions: loop_alu_instructions(size)) { loop_alu(size) }
}

private func calls() {
  guard let size = size("calls", default: 12, in: 0...47) else { return }
  var (fibonacci, next): (UInt64, UInt64) = (0, 1)
  for _ in 0..<size { (fibonacci, next) = (next, fibonacci + next) }
  let argument = UInt32(truncatingIfNeeded: size)
  let checksum = row("calls", instructions: loop_calls_instructions(argument)) { UInt64(loop_calls(argument)) }
  expect("calls", checksum, equals: fibonacci)
}

private func branchy() {
  guard let size = size("branchy", default: 1000, in: 1...1_000_000_000) else { return }
  var (random, sum): (UInt64, UInt64) = (0x9e37_79b9_7f4a_7c15, 0)
  for _ in 0..<100 {
    random ^= random << 13
    random ^= random >> 7
    random ^= random << 17
    if random & 16 == 0 {
      sum ^= random
    } else {
      sum &+= random
      sum = sum << 1 | sum >> 63
    }
  }
  expect("branchy", loop_branchy(100), equals: sum)
  row("branchy", instructions: loop_branchy_instructions(size)) { loop_branchy(size) }
}

private func chase() {
  guard let size = size("chase", default: 64, in: 1...65536) else { return }
  var order: UInt32 = 4
  while 1 << order < size * 16 { order += 1 }
  let table = memory.address(64 << order)
  loop_chase_prepare(table, order)
  let loads: UInt64 = 1 << (order - 3)
  let end = row("chase", instructions: loop_chase_instructions(loads)) { loop_chase(table, loads) }
  expect("chase", end, equals: table)
}

/// Both copies: a pattern that differs in every page, looked at in each page afterwards.
private func copy(
  _ name: StaticString, kibibytes: UInt64, instructions: (UInt64) -> UInt64,
  _ copy: (_ to: UInt64, _ from: UInt64, _ bytes: UInt64) -> Void
) {
  guard let size = size(name, default: kibibytes, in: 4...65536) else { return }
  let bytes = (size + 3) / 4 * 4096
  let from = memory.address(2 * bytes)
  let to = from + bytes
  fill64(to, 0, bytes / 8)
  fill64(from, 0x0123_4567_89ab_cdef, bytes / 8)
  var page: UInt64 = 0
  while page < bytes {
    store64(from + place(page), page + 1)
    page += 4096
  }
  row(name, instructions: instructions(bytes), bytes: bytes) {
    copy(to, from, bytes)
    return bytes
  }
  page = 0
  while page < bytes {
    expect(name, load64(to + place(page)), equals: page + 1)
    expect(name, load64(to + (place(page) ^ 8)), equals: 0x0123_4567_89ab_cdef)
    page += 4096
  }
}

/// The word of a page that differs from other pages': at another offset in each.
private func place(_ page: UInt64) -> UInt64 { page + (page >> 12 &* 40 & 4080) }

private func cr3() {
  guard let size = size("cr3", default: 20, in: 1...1_000_000_000) else { return }
  let pages: UInt64 = 0x40_0000_0000
  let frames = guest_allocate(64 * 4096, 4096)
  var sum: UInt64 = 0
  for page in 0..<UInt64(64) {
    Paging.map(pages + page * 4096, to: frames + page * 4096, .writable)
    store64(frames + page * 4096, page + 1)
    sum += page + 1
  }
  let root = read_cr3()
  let other = guest_allocate(4096, 4096)
  loop_rep_movsq(other, root, 512)
  let checksum = row("cr3", instructions: loop_cr3_instructions(size)) { loop_cr3(root, other, size, pages) }
  write_cr3(root)
  expect("cr3", checksum, equals: sum * size)
}

/// The size of one round; nil where another loop alone is asked for.
private func size(_ name: StaticString, default value: UInt64, in range: ClosedRange<UInt64>) -> UInt64? {
  if let chosen = StartInfo.option("loop"), !chosen.equals(name) { return nil }
  let size = StartInfo.number(name, default: value)
  expect(name, size, in: range)
  return size
}

/// What the loops that use memory share, one after the other, so that 64 MiB and their copy fit in a machine of 256 MiB.
private struct SharedMemory {
  private var start: UInt64 = 0
  private var size: UInt64 = 0

  /// At least `bytes`, aligned as a kernel's large pages would be.
  mutating func address(_ bytes: UInt64) -> UInt64 {
    if bytes > size {
      start = guest_allocate(bytes, 2 << 20)
      size = bytes
    }
    return start
  }
}

nonisolated(unsafe) private var memory = SharedMemory()

@discardableResult
private func row(
  _ name: StaticString, instructions: UInt64, bytes: UInt64 = 0, _ round: () -> UInt64
) -> UInt64 {
  let least = StartInfo.number("milliseconds", default: 0) * 1000
  say("{\"begin\":\"\(name)\"}")
  var watch = Stopwatch()
  let start = rdtsc()
  let checksum = round()
  var rounds: UInt64 = 1
  while watch.read() < least {
    expect(name, round(), equals: checksum)
    rounds += 1
  }
  let cycles = rdtsc() - start
  let nanoseconds = watch.ticks * 1_000_000_000 / PMTimer.frequency
  sayPart("{\"loop\":\"\(name)\",\"rounds\":\(rounds),\"instructions\":\(rounds * instructions),")
  sayPart("\"bytes\":\(rounds * bytes),")
  say("\"cycles\":\(cycles),\"nanoseconds\":\(nanoseconds),\"checksum\":\"\(hex: checksum)\"}")
  return checksum
}
