import Accelerator

// One method a kind of packet.
extension GDBSession {
  mutating func handle(_ content: [UInt8]) {
    var packet = PacketScanner(content)
    guard let kind = content.first.map({ UnicodeScalar($0) }) else { return send("") }
    if isRunning, !content.starts(with: "vKill".utf8), kind != "k", kind != "D" { return send(.running) }
    if kind == "v" || kind == "q" || kind == "Q" { return handleNamed(&packet) }
    _ = packet.skip(String(kind))
    switch kind {
    case "?": sendStop()
    case "g": readAllRegisters()
    case "G": writeAllRegisters(&packet)
    case "p": readRegister(&packet)
    case "P": writeRegister(&packet)
    case "m", "x": readMemory(&packet, isBinary: kind == "x")
    case "M", "X": writeMemory(&packet, isBinary: kind == "X")
    case "Z", "z": changeBreakpoint(&packet, isInsertion: kind == "Z")
    case "c", "C", "s", "S": resume(&packet, isStep: kind == "s" || kind == "S", hasSignal: kind == "C" || kind == "S")
    case "H": selectThread(&packet)
    case "T": acknowledge((thread(&packet) ?? nil) != nil, else: .noThread)
    case "D": detach()
    case "k": kill()
    default: send("")
    }
  }

  private mutating func handleNamed(_ packet: inout PacketScanner) {
    if packet.skip("vCont?") { return send("vCont;c;C;s;S") }
    if packet.skip("vCont") { return resumeMany(&packet) }
    if packet.skip("vKill") {
      send("OK")
      return kill()
    }
    if packet.skip("qSupported") { return negotiate(&packet) }
    if packet.skip("QStartNoAckMode") { return startNoAcknowledgements() }
    if packet.skip("qXfer:features:read:target.xml:") { return sendDescription(&packet) }
    if packet.skip("qAttached") { return send("1") }
    if packet.skip("qC"), packet.isAtEnd { return send("QC" + name(generalThread)) }
    if packet.skip("qfThreadInfo") { return send("m" + (0..<target.threadCount).map(name).joined(separator: ",")) }
    if packet.skip("qsThreadInfo") { return send("l") }
    if packet.skip("qThreadExtraInfo,") { return sendThreadInfo(&packet) }
    if packet.skip("qRcmd,") { return runMonitorCommand(&packet) }
    send("")
  }

  // MARK: Sessions

  private mutating func negotiate(_ packet: inout PacketScanner) {
    _ = packet.skip(":")
    while !packet.isAtEnd {
      let feature = packet.text(upTo: ";")
      if feature == "swbreak+" || feature == "hwbreak+" { tellsBreakpointKinds = true }
    }
    let size = String(PacketReader.limit, radix: 16)
    send(
      "PacketSize=\(size);QStartNoAckMode+;qXfer:features:read+;vContSupported+;swbreak+;hwbreak+;binary-upload+")
  }

  private mutating func sendDescription(_ packet: inout PacketScanner) {
    guard let (offset, length) = packet.pair(), offset <= description.count else { return send(.invalid) }
    let part = description.dropFirst(Int(offset)).prefix(Int(min(length, UInt64(PacketReader.limit / 2))))
    let isLast = part.endIndex == description.endIndex
    send([UInt8(ascii: isLast ? "l" : "m")] + PacketReader.escape(part))
  }

  private mutating func detach() {
    try? target.setBreakpoints([])
    breakpoints = []
    send("OK")
    output.isOver = true
    if !isRunning { try? target.resume(Array(repeating: .run, count: target.threadCount)) }
  }

  private mutating func kill() {
    output.isOver = true
    target.quit()
  }

  private mutating func runMonitorCommand(_ packet: inout PacketScanner) {
    guard let line = Hex.decode(packet.rest) else { return send(.invalid) }
    let words = String(decoding: line, as: UTF8.self).split(separator: " ")
    let commands = target.monitorCommands
    var text: String
    if let command = commands.first(where: { $0.name == words.first ?? "" }) {
      text = command.run(Array(words.dropFirst()))
    } else {
      text = words.first == nil || words.first == "help" ? "" : "no command '\(words.first ?? "")'; there are:\n"
      text += commands.map { "\($0.name): \($0.help)\n" }.joined() + "help: this list\n"
    }
    let output = Array(text.utf8)
    let part = PacketReader.limit / 2 - 8
    for start in stride(from: 0, to: output.count, by: part) {
      send([UInt8(ascii: "O")] + Hex.encode(output[start..<min(start + part, output.count)]))
    }
    send("OK")
  }

  // MARK: Threads

  private func name(_ thread: Int) -> String { String(thread + 1, radix: 16) }

  /// A thread's index; the inner nil for all threads or any (-1, 0), the outer one for what is no thread of ours.
  private func thread(_ packet: inout PacketScanner) -> Int?? {
    if packet.skip("-1") { return .some(nil) }
    guard let number = packet.number() else { return nil }
    if number == 0 { return .some(nil) }
    guard number <= UInt64(target.threadCount) else { return nil }
    return Int(number) - 1
  }

  private mutating func selectThread(_ packet: inout PacketScanner) {
    let isResume = packet.skip("c")
    guard isResume || packet.skip("g") else { return send(.invalid) }
    guard let thread = thread(&packet) else { return send(.noThread) }
    if isResume { resumeThread = thread } else { generalThread = thread ?? generalThread }
    acknowledge()
  }

  private mutating func sendThreadInfo(_ packet: inout PacketScanner) {
    guard let thread = thread(&packet) ?? nil else { return send(.noThread) }
    send(Hex.encode(target.summary(of: thread).utf8))
  }

  // MARK: Going on

  /// `c`, `s`, and with a signal, which a machine has no use for, `C`, `S`; all with an address or without.
  private mutating func resume(_ packet: inout PacketScanner, isStep: Bool, hasSignal: Bool) {
    if hasSignal {
      guard packet.number() != nil else { return send(.invalid) }
      _ = packet.skip(";")
    }
    let thread = resumeThread ?? generalThread
    if !packet.isAtEnd {
      guard let address = packet.number(), packet.isAtEnd else { return send(.invalid) }
      guard change(thread, { $0.general.rip = address }) else { return }
    }
    var actions = [ResumeAction](repeating: isStep ? .stay : .run, count: target.threadCount)
    if isStep { actions[thread] = .step }
    resume(actions)
  }

  /// `vCont`: of the actions that fit a thread the first counts; a thread that none fits stays.
  private mutating func resumeMany(_ packet: inout PacketScanner) {
    var actions = [ResumeAction?](repeating: nil, count: target.threadCount)
    while packet.skip(";") {
      let action: ResumeAction
      if packet.skip("c") || packet.skip("C") {
        action = .run
      } else if packet.skip("s") || packet.skip("S") {
        action = .step
      } else {
        return send(.invalid)
      }
      _ = packet.number()
      var chosen = Array(actions.indices)
      if packet.skip(":") {
        guard let thread = thread(&packet) else { return send(.noThread) }
        if let thread { chosen = [thread] }
      }
      for index in chosen where actions[index] == nil { actions[index] = action }
    }
    guard packet.isAtEnd, actions.contains(where: { $0 != nil }) else { return send(.invalid) }
    resume(actions.map { $0 ?? .stay })
  }

  // MARK: Registers

  private mutating func readAllRegisters() {
    guard let registers = registers() else { return }
    send(Hex.encode(layout.bytes(of: registers)))
  }

  private mutating func writeAllRegisters(_ packet: inout PacketScanner) {
    guard let bytes = Hex.decode(packet.rest), bytes.count == layout.size else { return send(.invalid) }
    if change(generalThread, { [layout] in layout.store(bytes, in: &$0) }) { acknowledge() }
  }

  private mutating func readRegister(_ packet: inout PacketScanner) {
    guard let number = packet.number(), packet.isAtEnd, number < layout.registers.count else { return send(.invalid) }
    guard let registers = registers() else { return }
    let register = layout.registers[Int(number)]
    send(Hex.encode(layout.bytes(of: registers)[register.offset..<register.offset + register.size]))
  }

  private mutating func writeRegister(_ packet: inout PacketScanner) {
    guard let number = packet.number(), packet.skip("="), number < layout.registers.count,
      let value = Hex.decode(packet.rest), value.count == layout.registers[Int(number)].size
    else { return send(.invalid) }
    let offset = layout.registers[Int(number)].offset
    let isDone = change(generalThread) { [layout] registers in
      var bytes = layout.bytes(of: registers)
      bytes.replaceSubrange(offset..<offset + value.count, with: value)
      layout.store(bytes, in: &registers)
    }
    if isDone { acknowledge() }
  }

  /// The chosen thread's registers; where the target has none to give, the debugger is told.
  private mutating func registers() -> DebuggerRegisters? {
    guard let registers = try? target.readRegisters(of: generalThread) else {
      send(.accelerator)
      return nil
    }
    return registers
  }

  /// Changes a thread's registers; where the target fails, the debugger is told.
  private mutating func change(_ thread: Int, _ body: (inout DebuggerRegisters) -> Void) -> Bool {
    do throws(DebugError) {
      var registers = try target.readRegisters(of: thread)
      body(&registers)
      try target.writeRegisters(registers, of: thread)
      return true
    } catch {
      send(.accelerator)
      return false
    }
  }

  // MARK: Memory

  private mutating func readMemory(_ packet: inout PacketScanner, isBinary: Bool) {
    guard let (address, length) = packet.pair(), packet.isAtEnd else { return send(.invalid) }
    let count = Int(min(length, UInt64(PacketReader.limit / 2 - 2)))
    let bytes = target.readMemory(at: address, count: count, of: generalThread)
    if bytes.isEmpty, count > 0 { return send(.badAddress) }
    if isBinary { send([UInt8(ascii: "b")] + PacketReader.escape(bytes)) } else { send(Hex.encode(bytes)) }
  }

  private mutating func writeMemory(_ packet: inout PacketScanner, isBinary: Bool) {
    guard let (address, length) = packet.pair(), packet.skip(":") else { return send(.invalid) }
    guard let bytes = isBinary ? Array(packet.rest) : Hex.decode(packet.rest), bytes.count == length else {
      return send(.invalid)
    }
    let written = bytes.isEmpty ? 0 : target.writeMemory(bytes, at: address, of: generalThread)
    acknowledge(written == bytes.count, else: .badAddress)
  }

  // MARK: Breakpoints

  private mutating func changeBreakpoint(_ packet: inout PacketScanner, isInsertion: Bool) {
    guard let number = packet.number(), packet.skip(","), let (address, length) = packet.pair() else {
      return send(.invalid)
    }
    guard let kind = UInt8(exactly: number).flatMap(DebugBreakpoint.Kind.init) else { return send("") }
    let isWatchpoint = kind.rawValue > 1
    guard !isWatchpoint || ([1, 2, 4, 8].contains(length) && address.isMultiple(of: length)) else {
      return send(.invalid)
    }
    let breakpoint = DebugBreakpoint(kind: kind, address: address, length: isWatchpoint ? Int(length) : 1)
    // Both are idempotent, as the manual wants them.
    var changed = breakpoints.filter { $0 != breakpoint }
    if isInsertion { changed.append(breakpoint) }
    do throws(DebugError) {
      if changed.count != breakpoints.count { try target.setBreakpoints(changed) }
      breakpoints = changed
      acknowledge()
    } catch {
      switch error {
      case .unsupported: send("")
      case .noRoom: send(.noRoom)
      case .accelerator: send(.accelerator)
      }
    }
  }
}
