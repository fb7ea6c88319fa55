import CGuest

private let blockVector: UInt8 = 0x50
private let tickVector: UInt8 = 0x51

/// Writes numbered, checksummed records to one or two virtio disks with a flush at intervals, or verifies what such a writer
/// has left, whole or cut off at any moment.
func guestMain() {
  expect("a PM timer", PMTimer.isPresent)
  PIC.begin()
  LocalAPIC.begin()
  set_interrupt_handler(blockVector) { _ in LocalAPIC.endOfInterrupt() }

  let test = DiskTest()
  if let mode = StartInfo.option("mode"), mode.equals("plugged") {
    test.plugged()
    say("disk: all passed")
    return
  }
  test.connectAll()
  switch StartInfo.option("mode") {
  case .none: test.write()
  case .some(let mode) where mode.equals("write"): test.write()
  case .some(let mode) where mode.equals("rewrite"): test.rewrite()
  case .some(let mode) where mode.equals("verify"): test.verify()
  case .some(let mode):
    say("FAIL mode=\(mode) is none of write, verify, rewrite, plugged")
    Power.fail()
  }
  say("disk: all passed")
}

private final class DiskTest {
  private let records: Records
  private var disks: [Disk] = []
  private let isPolling: Bool
  /// Records between two flushes; for `flush=0` one at the end of a pass.
  private let flush: UInt64
  /// Records a second; 0 for as many as there can be.
  private let rate = StartInfo.number("rate", default: 0)
  /// Whether the longest request is told after each flush.
  private let isTimed = StartInfo.number("timed", default: 0) != 0
  private let passes = StartInfo.number("passes", default: 1)
  private var watch = Stopwatch()
  private var paced: UInt64 = 0
  private let count = Int(StartInfo.number("disks", default: 1))
  private let options: VirtioBlock.Options

  init() {
    expect("disks", UInt64(count), in: 1...2)
    let sectors = StartInfo.number("sectors", default: 8)
    expect("sectors", sectors, in: 1...2048)
    let number = StartInfo.number("records", default: 256)
    expect("records", number, in: 1...1 << 20)
    records = Records(count: number, sectors: sectors, disks: count)
    let interval = StartInfo.number("flush", default: 16)
    flush = interval == 0 ? number : interval
    isPolling = Self.choice("interrupts", "msix", or: "poll")

    options = VirtioBlock.Options(
      isPacked: Self.choice("queue", "split", or: "packed"),
      usesIndirect: StartInfo.number("indirect", default: 1) != 0,
      usesEventIndex: StartInfo.number("events", default: 1) != 0,
      vector: isPolling ? nil : blockVector,
      queues: UInt16(truncatingIfNeeded: StartInfo.number("queues", default: 1)),
      depth: UInt16(truncatingIfNeeded: StartInfo.number("depth", default: 8)))
  }

  /// The disks that are there from the start.
  func connectAll() {
    VirtioBlock.forEachFunction { function in
      if disks.count < count { connect(function) }
    }
    expect("block devices", UInt64(disks.count), equals: UInt64(count))
  }

  private func connect(_ function: PCI.Function) {
    let device = VirtioBlock(function, options)
    say("disk \(disks.count): \(device.sectors) sectors, \(device.isPacked ? "packed" : "split") queue")
    expect("sectors for all records", device.sectors >= records.count * records.sectors)
    disks.append(Disk(disks.count, device, records, isTimed: isTimed))
  }

  /// Whether an option has its second value; any third one ends the guest.
  private static func choice(_ key: StaticString, _ first: StaticString, or second: StaticString) -> Bool {
    guard let value = StartInfo.option(key) else { return false }
    if value.equals(second) { return true }
    if value.equals(first) { return false }
    say("FAIL \(key)=\(value) is neither \(first) nor \(second)")
    Power.fail()
  }

  // MARK: Modes

  func write() {
    startPacing()
    var generation = UInt32(truncatingIfNeeded: StartInfo.number("generation", default: 1))
    expect("generation", generation > 0)
    for _ in 0..<passes {
      pass(generation) { .write($0) }
      generation += 1
    }
  }

  /// Verifies, finishes the generation that a writer may have been cut off in, and replaces it by the next ones, each record
  /// read before it is written.
  func rewrite() {
    let found = verify()
    startPacing()
    var generation = found.generation
    if generation > 0 { pass(generation, from: records.begun(found, flush: flush)) { .write($0) } }
    for _ in 0..<passes {
      generation += 1
      pass(generation) { .replace($0) }
    }
  }

  /// Waits for disks that are plugged in, `plugs` of them, one after another. Each is verified, and rewritten until it is
  /// asked for.
  func plugged() {
    expect("disks", UInt64(count), equals: 1)
    for _ in 0..<StartInfo.number("plugs", default: 1) {
      say("waiting for a disk")
      let device = waitForArrival()
      connect(PCI.Function(bus: 0, device: device, function: 0))
      let found = verify()
      var generation = found.generation
      if generation > 0 { pass(generation, from: records.begun(found, flush: flush)) { .write($0) } }
      repeat {
        generation += 1
        pass(generation) { .replace($0) }
      } while !PCIHotplug.isLeaving(device)
      disks.removeLast().device.stop()
      PCIHotplug.eject(device)
      let function = PCI.Function(bus: 0, device: device, function: 0)
      expect("an ejected device's identity", UInt64(PCI.read32(function, 0)), equals: 0xffff_ffff)
    }
  }

  /// The place of the next device that comes.
  private func waitForArrival() -> UInt8 {
    while true {
      let arrived = PCIHotplug.takeArrived()
      if arrived != 0 {
        expect("devices that came at once", UInt64(arrived.nonzeroBitCount), equals: 1)
        return UInt8(arrived.trailingZeroBitCount)
      }
      delay(microseconds: 1000)
    }
  }

  /// Reads everything, and returns what is there.
  @discardableResult
  func verify() -> Records.Summary {
    each(from: 1, to: records.count) { _ in .scan }
    let summary = records.summary
    say("found \(summary.whole) of \(records.count) records, last \(summary.last) generation \(summary.generation)")
    let known = StartInfo.number("expect", default: 0)
    let generation = known == 0 ? 0 : StartInfo.number("generation", default: 1)
    records.verify(
      summary, flush: flush, window: StartInfo.number("window", default: .max),
      known: (known, UInt32(truncatingIfNeeded: generation)))
    return summary
  }

  /// All records once, in their order, with a flush after each interval: nothing of the next one is under way before.
  private func pass(_ generation: UInt32, from start: UInt64 = 1, _ step: (UInt32) -> Disk.Step) {
    var first = start
    while first <= records.count {
      let last = min(first + flush - 1, records.count)
      each(from: first, to: last) { _ in
        pace()
        return step(generation)
      }
      for disk in disks where disk.device.hasFlush {
        disk.begin(.flush)
        disk.device.notify()
      }
      finish()
      say("flushed \(last) generation \(generation)")
      if isTimed { for disk in disks { say("slowest \(disk.takeSlowest()) us") } }
      first = last + 1
    }
  }

  /// Has `step` done on each of these records' disks; returns when all of it is done.
  private func each(from first: UInt64, to last: UInt64, _ step: (UInt64) -> Disk.Step) {
    for record in first...last {
      let step = step(record)
      for disk in disks where records.isOn(record, disk: disk.number) {
        while disk.isFull { waitForAny() }
        disk.begin(step, record: record)
        disk.device.notify()
      }
    }
    finish()
  }

  private func finish() {
    while disks.contains(where: { $0.underWay > 0 }) { waitForAny() }
  }

  // MARK: Waiting

  private func reap() -> Bool {
    var isAny = false
    for disk in disks where disk.reap() { isAny = true }
    return isAny
  }

  private func waitForAny() {
    if isPolling {
      while !reap() { cpu_pause() }
      return
    }
    while !reap() {
      var isDone = false
      for disk in disks where disk.device.enableInterrupts() { isDone = true }
      if !isDone { sti_hlt_cli() }
      for disk in disks { disk.device.disableInterrupts() }
    }
  }

  private func startPacing() {
    if rate == 0 { return }
    set_interrupt_handler(tickVector) { _ in LocalAPIC.endOfInterrupt() }
    IOAPIC.route(pin: IOAPIC.pin(ofISA: 0), vector: tickVector, to: LocalAPIC.id)
    PIT.periodic(divisor: UInt16(PIT.frequency / 1000))
    watch = Stopwatch()
  }

  /// Sleeps until the next record is due; what is done meanwhile is seen to.
  private func pace() {
    if rate == 0 { return }
    let due = paced * 1_000_000 / rate
    paced += 1
    while watch.read() < due {
      sti_hlt_cli()
      _ = reap()
    }
  }
}
