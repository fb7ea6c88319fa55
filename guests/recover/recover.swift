import CGuest

private let agentVector: UInt8 = 0x51
private let plugVector: UInt8 = 0x52

/// Gets its own data back from a snapshot of its disk, which it asks the host for and finds plugged in as a second disk.
func guestMain() {
  expect("a PM timer", PMTimer.isPresent)
  PIC.begin()
  LocalAPIC.begin()
  set_interrupt_handler(Volume.vector) { _ in LocalAPIC.endOfInterrupt() }
  PCIHotplug.listen(vector: plugVector)
  let test = Recovery()
  switch StartInfo.option("mode") {
  case .none: test.recover()
  case .some(let mode) where mode.equals("recover"): test.recover()
  case .some(let mode) where mode.equals("hold"): test.hold()
  case .some(let mode) where mode.equals("ask"): test.ask()
  case .some(let mode) where mode.equals("flood"): test.flood()
  case .some(let mode) where mode.equals("serve"): test.serve()
  case .some(let mode):
    say("FAIL mode=\(mode) is none of recover, hold, ask, flood, serve")
    Power.fail()
  }
  say("recover: all passed")
}

private final class Recovery {
  private let agent = Agent(vector: agentVector)
  /// Records of the disk: the first half is a file, the second half all else.
  private let records = StartInfo.number("records", default: 16)
  private let isTimed = StartInfo.flag("timed")
  /// The time of the latest snapshot that was listed, and how many there are.
  private var latest: UInt64 = 0
  private var snapshots: UInt64 = 0

  init() { expect("records", records, in: 2...4096) }

  // MARK: The way through

  /// Writes, waits for a snapshot, corrupts, recovers and verifies.
  func recover() {
    let first = disk()
    for record in 0..<records { write(first, record, 1) }
    first.flush()
    say("written")
    waitForSnapshot()
    say("a snapshot is there")
    // The file is spoiled; of all else some has changed since, and is to stay.
    for record in 0..<records / 2 { write(first, record, 666) }
    for record in records / 2..<records where record % 2 == 0 { write(first, record, 2) }
    first.flush()
    expect("the file is spoiled", first.holds(0, generation: 666))
    for _ in 0..<StartInfo.number("rounds", default: 1) {
      let second = attach()
      for record in 0..<records {
        expect("the record as it was at the snapshot", second.holds(record, generation: 1))
      }
      for record in 0..<records / 2 { first.copy(record, from: second) }
      first.flush()
      if !second.device.isReadOnly { tryWriting(second) }
      detach(second)
    }
    for record in 0..<records / 2 { expect("the file is back", first.holds(record, generation: 1)) }
    for record in records / 2..<records {
      expect("what is no part of the file is as it was", first.holds(record, generation: record % 2 == 0 ? 2 : 1))
    }
  }

  private func write(_ volume: Volume, _ record: UInt64, _ generation: UInt64) {
    expect("a write's status", UInt64(volume.write(record, generation: generation)), equals: 0)
  }

  /// Copy-on-write: what is written there is read there, and goes with the disk.
  private func tryWriting(_ volume: Volume) {
    write(volume, 0, 77)
    volume.flush()
    expect("what was written to the snapshot", volume.holds(0, generation: 77))
  }

  private func disk() -> Volume {
    var found: PCI.Function?
    VirtioBlock.forEachFunction { function in if found == nil { found = function } }
    guard let found else {
      say("FAIL a disk: run with --disk")
      Power.fail()
    }
    return Volume(found)
  }

  // MARK: Requests

  private func waitForSnapshot() {
    while true {
      list()
      if snapshots > 0 { return }
      delay(microseconds: 20_000)
    }
  }

  private func list() {
    let id = agent.request("snapshots")
    agent.add("}")
    agent.end()
    let answer = reply(id)
    expect("an answer without an error", answer.member("error") == nil)
    snapshots = 0
    var rest = answer
    // The oldest comes first.
    while let time = rest.member("time") {
      latest = max(latest, time.number)
      snapshots += 1
      rest = rest.dropping(Int(time.address - rest.address + time.count))
    }
  }

  /// The answer to a request; events that come before it are looked at.
  private func reply(_ id: UInt64) -> Bytes {
    while true {
      let line = nextLine()
      if let number = line.member("id"), line.member("event") == nil, number.number == id { return line }
      note(line)
    }
  }

  private func nextLine() -> Bytes {
    while true {
      if let line = agent.line() { return line }
      sti_hlt_cli()
    }
  }

  private var attachedEvents: UInt64 = 0
  private var detachedEvents: UInt64 = 0
  private var quotaEvents: UInt64 = 0
  private var malformedEvents: UInt64 = 0

  private func note(_ line: Bytes) {
    guard let event = line.member("event") else { return }
    if event.equals("snapshot-attached") { attachedEvents += 1 }
    if event.equals("snapshot-detached") { detachedEvents += 1 }
    if event.equals("snapshot-quota") { quotaEvents += 1 }
    if event.equals("malformed") { malformedEvents += 1 }
  }

  private func hearUntil(_ isDone: () -> Bool) {
    while !isDone() {
      if let line = agent.line() { note(line) } else { sti_hlt_cli() }
    }
  }

  /// Asks for the latest snapshot so far, and finds it as a second disk.
  private func attach() -> Volume {
    let (events, interrupts, plugs) = (attachedEvents, Agent.interrupts, PCIHotplug.interrupts)
    var watch = Stopwatch()
    let id = agent.request("snapshot-attach")
    agent.add(", \"before\": ")
    agent.add(latest + 1)
    agent.add("}")
    agent.end()
    let answer = reply(id)
    guard let serial = answer.member("serial") else {
      say("FAIL a snapshot: \(answer)")
      Power.fail()
    }
    let name = copy(serial)
    let isWritable = answer.member("writable")?.starts(with: "true") ?? false
    var arrived: UInt32 = 0
    hearUntil {
      arrived |= PCIHotplug.takeArrived()
      return arrived != 0 && attachedEvents > events
    }
    expect("devices that came at once", UInt64(arrived.nonzeroBitCount), equals: 1)
    let volume = Volume(PCI.Function(bus: 0, device: UInt8(arrived.trailingZeroBitCount), function: 0))
    _ = volume.holds(0, generation: 1)
    let time = watch.read()
    if isTimed { say("attached in \(time) us") }
    wait("an interrupt of the agent's port") { Agent.interrupts > interrupts }
    wait("an interrupt of the hot-plug") { PCIHotplug.interrupts > plugs }
    expect("the serial number", volume.serial().equals(name))
    volume.name = name
    expect("that the disk takes writes", volume.device.isReadOnly != isWritable)
    if volume.device.isReadOnly { expect("that a write fails", volume.write(0, generation: 9) != 0) }
    say("attached \(name)")
    return volume
  }

  private func copy(_ text: Bytes) -> Bytes {
    let copy = Bytes(address: guest_allocate(text.count, 1), count: text.count)
    var offset: UInt64 = 0
    text.forEach { byte in
      store8(copy.address + offset, byte)
      offset += 1
    }
    return copy
  }

  /// The guest lets go of a disk of its own accord.
  private func detach(_ volume: Volume, isRude: Bool = false) {
    let events = detachedEvents
    let id = agent.request("snapshot-detach")
    agent.add(#", "serial": ""#)
    agent.add(volume.name)
    agent.add("\"}")
    agent.end()
    let answer = reply(id)
    expect("an answer without an error", answer.member("error") == nil)
    hearUntil { volume.isLeaving }
    volume.eject(isRude: isRude)
    hearUntil { detachedEvents > events }
    say("detached \(volume.name)")
  }

  // MARK: Other modes

  /// Attaches several at once and uses all of them until the host wants each back; the last ones go with requests under way.
  func hold() {
    waitForSnapshot()
    let count = StartInfo.number("attaches", default: 1)
    let isRude = StartInfo.flag("rude")
    var volumes: [Volume] = []
    for _ in 0..<count { volumes.append(attach()) }
    say("holding")
    let asks = StartInfo.flag("detach")
    var turn: UInt64 = 0
    while !volumes.isEmpty {
      var kept: [Volume] = []
      for volume in volumes {
        use(volume, turn)
        if asks && turn > 100 {
          underWay(volume, isRude)
          detach(volume, isRude: isRude)
        } else if volume.isLeaving {
          let events = detachedEvents
          underWay(volume, isRude)
          volume.eject(isRude: isRude)
          hearUntil { detachedEvents > events }
          say("gone")
        } else {
          kept.append(volume)
        }
      }
      volumes = kept
      turn += 1
    }
  }

  private var isFull = false

  private func use(_ volume: Volume, _ turn: UInt64) {
    let record = turn % records
    if volume.device.isReadOnly {
      expect("the record as it was at the snapshot", volume.holds(record, generation: 1))
      return
    }
    // Each record in a block of its own, so that a quota of blocks is used up.
    let place = StartInfo.flag("spread") ? record * 16 : record
    let isRefused = volume.write(place, generation: turn) != 0
    if isRefused && !isFull { say("no more writes") }
    isFull = isFull || isRefused
    if !isRefused { expect("what was written to the snapshot", volume.holds(place, generation: turn)) }
  }

  /// Begins requests that nobody waits for.
  private func underWay(_ volume: Volume, _ isRude: Bool) {
    if !isRude { return }
    for slot in 0..<volume.device.depth {
      let isRead = volume.device.isReadOnly || slot % 2 == 0
      volume.begin(isRead ? .read : .write, slot: slot, record: UInt64(slot) % records)
    }
  }

  /// Sends each line of the first module as it is, and prints what the host answers.
  func ask() { sendModule { say("\(nextLine())") } }

  /// Sends each line of the first module as it is, and finds that the host answers the next question.
  func flood() {
    sendModule { while let line = agent.line() { note(line) } }
    let id = agent.request("ping")
    agent.add("}")
    agent.end()
    expect("an answer without an error", reply(id).member("error") == nil)
    say("malformed \(malformedEvents)")
  }

  private func sendModule(_ then: () -> Void) {
    expect("modules", UInt64(StartInfo.moduleCount), equals: 1)
    let text = StartInfo.module(0)
    var start: UInt64 = 0
    while start < text.count {
      let end = scan_byte(text.address, start, text.count, 10)
      agent.add(Bytes(address: text.address + start, count: end - start))
      agent.end()
      then()
      start = end + 1
    }
  }

  /// Answers the host's pings for ever, or until it is asked to start again.
  func serve() {
    say("serving")
    while true {
      let line = nextLine()
      guard let request = line.member("request"), let id = line.member("id") else { continue }
      if request.equals("restart") { Power.restart() }
      let isPing = request.equals("ping")
      agent.add(#"{"id": "#)
      agent.add(id)
      agent.add(isPing ? #", "result": {}}"# : #", "error": "unknown request"}"#)
      agent.end()
    }
  }
}
