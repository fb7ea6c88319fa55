import Accelerator
import GDBStub
import Synchronization
import Testing

/// A conversation without a socket: content of packets in and out.
struct Conversation {
  let target: FakeTarget
  var session: GDBSession
  private(set) var isOver = false

  init(_ target: FakeTarget = FakeTarget(executes: false), acknowledges: Bool = false) {
    self.target = target
    session = GDBSession(target)
    if !acknowledges { _ = send("QStartNoAckMode") }
  }

  static func frame(_ content: String) -> String {
    let sum = content.utf8.reduce(UInt8(0)) { $0 &+ $1 }
    return "$\(content)#\(sum < 16 ? "0" : "")\(String(sum, radix: 16))"
  }

  mutating func sendRaw(_ text: String) -> String {
    let output = session.receive(text.utf8)
    isOver = output.isOver
    return String(decoding: output.bytes, as: UTF8.self)
  }

  /// The reply's content, without acknowledgement and frame.
  mutating func send(_ content: String) -> String {
    Self.content(sendRaw(Self.frame(content)))
  }

  mutating func stopped(_ stop: DebugStop) -> String {
    Self.content(String(decoding: session.stopped(stop).bytes, as: UTF8.self))
  }

  private static func content(_ text: String) -> String {
    text.split(separator: "$").last.map { String($0.split(separator: "#", omittingEmptySubsequences: false)[0]) } ?? ""
  }
}

@Suite struct Packets {
  @Test func areAcknowledgedUntilToldOtherwise() {
    var talk = Conversation(acknowledges: true)
    #expect(talk.sendRaw("+$qC#b4") == "+$QC1#c5")
    #expect(talk.sendRaw("-") == "$QC1#c5")
    #expect(talk.sendRaw("$qC#b5") == "-")
    #expect(talk.sendRaw("$qC#zz") == "-")
    #expect(talk.sendRaw("junk$q$qC#b4") == "+$QC1#c5")
    #expect(talk.sendRaw("$QStartNoAckMode#b0") == "+$OK#9a")
    #expect(talk.sendRaw("$qC#b4") == "$QC1#c5")
    #expect(talk.sendRaw("$qC#b5") == "")
    #expect(talk.sendRaw("-") == "")
  }

  @Test func comeInPieces() {
    var talk = Conversation()
    var output = ""
    for character in Conversation.frame("qC") { output += talk.sendRaw(String(character)) }
    #expect(output == "$QC1#c5")
  }

  @Test func haveALimit() {
    var talk = Conversation(acknowledges: true)
    #expect(talk.sendRaw(Conversation.frame(String(repeating: "m", count: 0x4001))) == "-")
    #expect(talk.sendRaw(Conversation.frame(String(repeating: "!", count: 0x4000))) == "+$#00")
    #expect(talk.send("qSupported").contains("PacketSize=4000;"))
  }

  @Test(arguments: [
    "g1", "m", "m1000", "m1000,", "m,1", "m10000000000000000,1", "M1000,2:0", "M1000,2:00", "X1000,2:a", "p", "pzz",
    "pffff",
    "P1", "P1=00", "Z1", "Z0,1000", "Z2,1001,4", "Z2,1000,3", "Hx1", "H", "vCont;", "vCont;x", "vCont", "vCont;c:9",
    "Hg9", "T9",
    "C", "sxyz", "qXfer:features:read:target.xml:", "qXfer:features:read:target.xml:ffffffffffffffff,1", "qRcmd,1",
    "qThreadExtraInfo,", "G00",
  ])
  func malformedAreErrors(_ content: String) {
    var talk = Conversation()
    let reply = talk.send(content)
    // `g` takes no more to read than it says: gdb's stubs differ here, so either will do.
    #expect(reply.hasPrefix("E") && reply.utf8.count == 3 || content == "g1", "\(reply)")
    #expect(talk.send("qC") == "QC1")
  }

  @Test(arguments: [
    "", "!", "R00", "b", "vRun", "vMustReplyEmpty", "qTStatus", "qSymbol::", "Z9,1000,1", "QPassSignals:",
  ])
  func unknownAreEmpty(_ content: String) {
    var talk = Conversation()
    #expect(talk.send(content) == "")
  }
}

@Suite struct Sessions {
  @Test func readAndWriteMemory() {
    var talk = Conversation()
    #expect(talk.send("m1020,2") == "f490")
    #expect(talk.send("x1020,2") == "b" + "\u{fffd}\u{fffd}")
    #expect(talk.send("M1020,2:0102") == "OK")
    #expect(talk.send("m101f,4") == "90010290")
    // `}\u{3}` is an escaped `#`.
    #expect(talk.send("X1020,2:}\u{3}a") == "OK")
    #expect(talk.send("m1020,2") == "2361")
    #expect(talk.send("x1020,2") == "b}\u{3}a")
    #expect(talk.send("m2ffe,10") == "9090")
    #expect(talk.send("m3000,1") == "E0e")
    #expect(talk.send("M2fff,2:0000") == "E0e")
    #expect(talk.send("m0,0") == "")
  }

  @Test func readAndWriteRegisters() throws {
    var talk = Conversation()
    let all = talk.send("g")
    #expect(all.hasPrefix("4444333322221111"))
    #expect(talk.send("p0") == "4444333322221111")
    #expect(talk.send("P0=8877665544332211") == "OK")
    #expect(try talk.target.readRegisters(of: 0).general.rax == 0x1122_3344_5566_7788)
    #expect(try talk.target.readRegisters(of: 1).general.rax == 0x1111_2222_3333_4445)
    #expect(talk.send("G" + all) == "OK")
    #expect(talk.send("g") == all)
    #expect(talk.send("Hg2") == "OK")
    #expect(talk.send("p0") == "4544333322221111")
    // ftag: all empty but the register on the stack's top.
    #expect(talk.send("p22") == "ff3f0000")
    #expect(talk.send("P22=fffd0000") == "OK")
    #expect(try talk.target.readRegisters(of: 1).extended[4] == 0x10 | 0)
  }

  /// What is read and written back changes nothing, and every byte of every register can be changed on its own.
  @Test func loseNoRegister() throws {
    var talk = Conversation()
    var random = SplitMix(state: 3)
    let size = talk.send("g").utf8.count
    for _ in 0..<50 {
      let bytes = (0..<size / 2).map { _ in UInt8(random.next(below: 256)) }
      let text = bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
      #expect(talk.send("G" + text) == "OK")
      let before = try talk.target.readRegisters(of: 0)
      let shown = talk.send("g")
      #expect(talk.send("G" + shown) == "OK")
      #expect(talk.send("g") == shown)
      var after = try talk.target.readRegisters(of: 0)
      // Selectors in real mode give the base, so that only the first write may change it.
      after.system.es.base = before.system.es.base
      #expect(after.general == before.general)
      #expect(after.extended == before.extended)
      #expect(after.kernelGSBase == before.kernelGSBase)
    }
  }

  @Test func describeTheRegisters() {
    var talk = Conversation()
    var xml = ""
    while true {
      let part = talk.send("qXfer:features:read:target.xml:\(String(xml.utf8.count, radix: 16)),400")
      xml += part.dropFirst()
      if part.hasPrefix("l") { break }
      #expect(part.hasPrefix("m") && part.utf8.count == 0x401)
      if !part.hasPrefix("m") { break }
    }
    #expect(xml.hasPrefix("<?xml"))
    #expect(xml.hasSuffix("</target>\n"))
    let bits = xml.split(separator: "bitsize=\"").dropFirst().compactMap { Int($0.prefix { $0.isNumber }) }
    #expect(bits.reduce(0, +) / 4 == talk.send("g").utf8.count)
    for number in bits.indices {
      #expect(talk.send("p" + String(number, radix: 16)).utf8.count == bits[number] / 4)
    }
  }

  @Test func knowTheirThreads() {
    var talk = Conversation()
    #expect(talk.send("qfThreadInfo") == "m1,2")
    #expect(talk.send("qsThreadInfo") == "l")
    #expect(talk.send("qThreadExtraInfo,2") == "76435055203120617420" + "72657374")
    #expect(talk.send("T2") == "OK")
    #expect(talk.send("T3") == "E03")
    #expect(talk.send("qAttached") == "1")
    #expect(talk.send("Hg0") == "OK")
    #expect(talk.send("?") == "T02thread:1;")
  }

  @Test func goOnAndStop() {
    var talk = Conversation()
    #expect(talk.send("vCont?") == "vCont;c;C;s;S")
    #expect(talk.send("vCont;s:2;c") == "")
    #expect(talk.target.state.withLock { $0.actions } == [.run, .step])
    #expect(talk.send("g") == "E10")
    #expect(talk.stopped(.step(thread: 1)) == "T05thread:2;")
    #expect(talk.send("qC") == "QC2")
    #expect(talk.send("vCont;s:1") == "")
    #expect(talk.target.state.withLock { $0.actions } == [.step, .stay])
    #expect(talk.sendRaw("\u{3}") == Conversation.frame("T02thread:2;"))
    #expect(talk.sendRaw("\u{3}") == "")
    #expect(talk.send("Hc1") == "OK")
    #expect(talk.send("s1234") == "")
    #expect(talk.target.state.withLock { $0.registers[0].general.rip } == 0x1234)
    #expect(talk.stopped(.crash(thread: 0)) == "T06thread:1;")
    #expect(talk.send("C05") == "")
    #expect(talk.stopped(.exited(status: 66)) == "W42")
  }

  @Test func stayWhereTheTargetCannotGoOn() {
    var talk = Conversation()
    talk.target.state.withLock { $0.isStuck = true }
    #expect(talk.send("vCont;s:1") == "E05")
    #expect(talk.send("c") == "E05")
    // Not running: packets other than an interrupt are answered.
    #expect(talk.send("?") == "T02thread:1;")
    talk.target.state.withLock { $0.isStuck = false }
    #expect(talk.send("c") == "")
    #expect(talk.stopped(.step(thread: 0)) == "T05thread:1;")
  }

  @Test func keepWhatHappensWhileAllIsStopped() {
    var talk = Conversation()
    #expect(talk.send("Z2,2000,8") == "OK")
    #expect(talk.stopped(.watchpoint(thread: 1, address: 0x2004)) == "")
    #expect(talk.stopped(.breakpoint(thread: 0)) == "")
    let resumes = talk.target.state.withLock { $0.resumes }
    #expect(talk.send("c") == "T05thread:2;watch:2004;")
    #expect(talk.target.state.withLock { $0.resumes } == resumes)
    #expect(talk.send("c") == "")
    #expect(talk.target.state.withLock { $0.resumes } == resumes + 1)
  }

  @Test func setBreakpoints() {
    var talk = Conversation()
    #expect(talk.send("qSupported:swbreak+;hwbreak+").contains("hwbreak+"))
    #expect(talk.send("Z0,1010,1") == "OK")
    #expect(talk.send("Z0,1010,1") == "OK")
    #expect(talk.send("Z1,1000,1") == "OK")
    #expect(talk.send("Z4,2000,4") == "OK")
    #expect(talk.send("Z3,2000,4") == "")
    #expect(
      talk.target.state.withLock { $0.breakpoints } == [
        DebugBreakpoint(kind: .software, address: 0x1010, length: 1),
        DebugBreakpoint(kind: .hardware, address: 0x1000, length: 1),
        DebugBreakpoint(kind: .access, address: 0x2000, length: 4),
      ])
    #expect(talk.send("Z0,1011,1") == "OK")
    #expect(talk.send("Z0,1012,1") == "E1c")
    #expect(talk.send("c") == "")
    #expect(talk.stopped(.breakpoint(thread: 0)) == "T05thread:1;hwbreak:;")
    #expect(talk.send("c1010") == "")
    #expect(talk.stopped(.breakpoint(thread: 0)) == "T05thread:1;swbreak:;")
    #expect(talk.send("c") == "")
    #expect(talk.stopped(.watchpoint(thread: 1, address: 0x2003)) == "T05thread:2;awatch:2003;")
    #expect(talk.send("z1,1000,1") == "OK")
    #expect(talk.send("z1,1000,1") == "OK")
    #expect(talk.target.state.withLock { $0.breakpoints.count } == 3)
    #expect(talk.send("D") == "OK")
    #expect(talk.isOver)
    #expect(talk.target.state.withLock { $0.breakpoints.isEmpty && $0.actions == [.run, .run] })
  }

  @Test func endTheMachine() {
    var talk = Conversation()
    #expect(talk.send("k") == "")
    #expect(talk.isOver)
    #expect(talk.target.state.withLock { $0.hasQuit })
    var other = Conversation()
    #expect(other.send("vKill;1") == "OK")
    #expect(other.target.state.withLock { $0.hasQuit })
  }

  @Test func runMonitorCommands() {
    func hex(_ text: String) -> String { text.utf8.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined() }
    var talk = Conversation()
    let reply = talk.sendRaw(Conversation.frame("qRcmd," + hex("greet a b")))
    #expect(reply == Conversation.frame("O" + hex("hello a+b\n")) + Conversation.frame("OK"))
    let help = talk.sendRaw(Conversation.frame("qRcmd," + hex("nothing")))
    #expect(help.contains(hex("greet: says hello")))
    let long = talk.sendRaw(Conversation.frame("qRcmd," + hex("long"))).split(separator: "$")
    #expect(long.count == 5)
    #expect(long.allSatisfy { $0.utf8.count <= 0x4000 })
  }

  /// 100 000 packets of random content, framed rightly or wrongly, with reports and interrupts between.
  @Test func surviveRandomPackets() {
    var random = SplitMix(state: 4)
    let pieces = [
      "?", "g", "G", "p", "P", "m", "M", "x", "X", "Z0,", "Z1,", "Z2,", "Z3,", "z0,", "z2,", "c", "C", "s", "S", "Hg",
      "Hc", "T",
      "vCont", ";c", ";s", ":1", ":2", ":-1", "vCont?", "vKill", "qSupported:", "qXfer:features:read:target.xml:", "qC",
      "qAttached", "qfThreadInfo", "qsThreadInfo", "qThreadExtraInfo,", "qRcmd,", "67726565742061", "D", "k", "1000,4",
      "2000,8",
      "0", "1", "ffffffffffffffff", ",", ":", ";", "=", "-1", "}", "*", "#", "$", "\u{3}", "+", "-", "00",
      "QStartNoAckMode",
    ]
    let target = FakeTarget(executes: false)
    var session = GDBSession(target)
    for _ in 0..<100_000 {
      var content: [UInt8] = []
      for _ in 0..<1 + random.next(below: 5) { content += Array(pieces[random.next(below: pieces.count)].utf8) }
      if random.next(below: 8) == 0 { content[random.next(below: content.count)] = UInt8(random.next(below: 256)) }
      var bytes = content
      if random.next(below: 10) > 0 {
        let sum = content.reduce(UInt8(0)) { $0 &+ $1 }
        bytes = [0x24] + content + Array("#\(sum < 16 ? "0" : "")\(String(sum, radix: 16))".utf8)
      }
      let isOver = session.receive(bytes).isOver
      if random.next(below: 3) == 0 {
        let thread = random.next(below: 4) - 1
        let stops: [DebugStop] = [
          .breakpoint(thread: thread), .step(thread: thread), .watchpoint(thread: thread, address: random.next()),
          .crash(thread: thread), .paused, .exited(status: 1),
        ]
        _ = session.stopped(stops[random.next(below: stops.count)])
      }
      if isOver { session = GDBSession(target) }
    }
    session = GDBSession(target)
    #expect(String(decoding: session.receive("$qC#b4".utf8).bytes, as: UTF8.self) == "+$QC1#c5")
  }
}
