import CGuest

private let cardVector: UInt8 = 0x50
private let tickVector: UInt8 = 0x51
private let ticks: UInt64 = 100

/// Sends numbered, checksummed frames to a peer that sends them back, or is that peer, and counts what is lost, doubled or
/// damaged.
func guestMain() {
  expect("a PM timer", PMTimer.isPresent)
  PIC.begin()
  LocalAPIC.begin()
  set_interrupt_handler(cardVector) { _ in LocalAPIC.endOfInterrupt() }
  set_interrupt_handler(tickVector) { _ in LocalAPIC.endOfInterrupt() }
  guard let function = VirtioNet.function else {
    say("FAIL there is no network card: run with --net")
    Power.fail()
  }
  NetTest(function).run()
  say("net: all passed")
}

private final class NetTest {
  private enum Mode {
    case ping, echo, send, receive
  }

  private let mode: Mode
  private let card: VirtioNet
  private let isPolling: Bool
  private let session = UInt32(truncatingIfNeeded: rdtsc() | 1)
  /// Where frames go: the option's, else everybody until somebody has answered.
  private var peer = StartInfo.number("peer", default: Frame.broadcast)
  private let frames = StartInfo.number("frames", default: 0)
  private let rate = StartInfo.number("rate", default: 0)
  private let window = StartInfo.number("window", default: 8)
  private let timeout = StartInfo.number("timeout", default: 1000) * 1000
  private let interval = StartInfo.number("report", default: 256)
  private let shortest: UInt64
  private let longest: UInt64
  private var watch = Stopwatch()
  private var sent: UInt64 = 0
  private var damaged: UInt64 = 0
  private var series = Series()
  private var progress: UInt64 = 0
  private var reported: UInt64 = 0
  private var wasUp = true

  init(_ function: PCI.Function) {
    switch StartInfo.option("mode") {
    case .none: mode = .ping
    case .some(let text) where text.equals("ping"): mode = .ping
    case .some(let text) where text.equals("echo"): mode = .echo
    case .some(let text) where text.equals("send"): mode = .send
    case .some(let text) where text.equals("receive"): mode = .receive
    case .some(let text):
      say("FAIL mode=\(text) is none of ping, echo, send, receive")
      Power.fail()
    }
    isPolling = StartInfo.option("interrupts").map { $0.equals("poll") } ?? false
    var options = VirtioNet.Options()
    options.isPacked = StartInfo.option("queue").map { $0.equals("packed") } ?? false
    options.usesIndirect = StartInfo.number("indirect", default: 1) != 0
    options.usesEventIndex = StartInfo.number("events", default: 1) != 0
    options.isMergeable = StartInfo.number("mergeable", default: 1) != 0
    options.announces = StartInfo.number("announce", default: 1) != 0
    options.vector = isPolling ? nil : cardVector
    options.buffers = UInt16(truncatingIfNeeded: StartInfo.number("buffers", default: 64))
    options.bufferSize = UInt32(
      truncatingIfNeeded: StartInfo.number("buffer", default: options.isMergeable ? 1526 : 9026))
    card = VirtioNet(function, options)
    let most = UInt64(card.mtu == 0 ? 1500 : card.mtu) + 14
    shortest = StartInfo.number("shortest", default: Frame.shortest)
    longest = StartInfo.number("longest", default: most)
    expect("bytes of a frame", shortest, in: Frame.shortest...65535)
    expect("bytes of a frame", longest, in: shortest...65535)
    sayPart("net: ")
    var shift: UInt64 = 48
    while shift > 0 {
      shift -= 8
      let byte = card.address >> shift & 0xff
      if byte < 16 { sayPart("0") }
      Console.write(hex: byte)
      if shift > 0 { sayPart(":") }
    }
    say(", mtu \(card.mtu), \(card.isPacked ? "packed" : "split") queue")
  }

  func run() -> Void {
    IOAPIC.route(pin: IOAPIC.pin(ofISA: 0), vector: tickVector, to: LocalAPIC.id)
    PIT.periodic(divisor: UInt16(PIT.frequency / ticks))
    watch = Stopwatch()
    while !isDone {
      var isBusy = false
      while card.receive(take) { isBusy = true }
      let isIdle = card.reap()
      if mode == .ping || mode == .send { sendDue() }
      card.notify()
      report()
      if isBusy { continue }
      // These cost more than frames do.
      lookAtStatus()
      if isIdle, isToldToEnd { break }
      if isPolling {
        cpu_pause()
        continue
      }
      if !card.enableInterrupts() { sti_hlt_cli() }
      card.disableInterrupts()
    }
    wait("the last frames are sent") { card.reap() }
    say("sent \(sent) received \(series.received) lost \(series.lost) doubled \(series.doubled) damaged \(damaged)")
    expect("frames that came twice", series.doubled, equals: 0)
    expect("damaged frames", damaged, equals: 0)
    if let most = StartInfo.option("lost")?.number { expect("lost frames", series.lost, in: 0...most) }
  }

  private var isDone: Bool {
    guard frames > 0 else { return false }
    return mode == .send ? sent >= frames : series.received >= frames
  }

  /// A `q` on the serial line.
  private var isToldToEnd: Bool { inb(0x3fd) & 1 != 0 && inb(0x3f8) == 113 }

  private func take(_ frame: Bytes) {
    guard Frame.isOurs(frame) else { return }
    guard let content = Frame.content(frame) else {
      damaged += 1
      return
    }
    switch (content.kind, mode) {
    case (Frame.Kind.data, .echo):
      series.note(content.number, content.session)
      let length = frame.count
      // A frame that cannot be sent now is lost, and the peer counts it.
      _ = send(length, to: content.source, content.number, content.session, Frame.Kind.echo)
    case (Frame.Kind.data, .receive): series.note(content.number, content.session)
    case (Frame.Kind.echo, .ping) where content.session == session:
      peer = content.source
      series.note(content.number, session)
      progress = watch.read()
    default: break
    }
  }

  private func send(
    _ length: UInt64, to destination: UInt64, _ number: UInt64, _ session: UInt32, _ kind: UInt16
  ) -> Bool {
    card.send(length) { frame in
      Frame.fill(
        frame, length: length, to: destination, from: card.address, number: number, session: session, kind: kind)
    }
  }

  private func sendDue() {
    let now = watch.read()
    if mode == .ping {
      // What nobody has answered for so long is lost.
      if sent > series.last, now - progress > timeout {
        series.skip(to: sent)
        progress = now
      }
      if sent == series.last { progress = now }
    }
    while frames == 0 || sent < frames || mode == .ping {
      if mode == .ping, sent - series.last >= window { return }
      if rate > 0, sent * 1_000_000 / rate > now { return }
      let number = sent + 1
      let length = shortest + number &* 997 % (longest - shortest + 1)
      guard send(length, to: peer, number, session, Frame.Kind.data) else { return }
      sent = number
    }
  }

  private func lookAtStatus() {
    let isUp = card.isLinkUp
    if isUp != wasUp {
      wasUp = isUp
      say("net: link \(isUp ? "up" : "down")")
    }
    guard card.isToAnnounce else { return }
    if send(Frame.shortest, to: Frame.broadcast, 0, session, Frame.Kind.announcement) {
      card.notify()
      card.acknowledgeAnnouncement()
      say("net: announced")
    }
  }

  private func report() {
    guard interval > 0, series.received >= reported + interval else { return }
    reported = series.received
    say(
      "net: received \(series.received) lost \(series.lost) doubled \(series.doubled) damaged \(damaged) late \(series.late)"
    )
  }
}
