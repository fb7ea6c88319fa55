import GuestAgent
import JSON
import Testing

/// Lines of an agent's, good and bad.
struct AgentMessageTests {
  private func messages(_ text: String) -> [Result<AgentMessage, AgentError>] {
    var lines = AgentLines()
    var found: [Result<AgentMessage, AgentError>] = []
    lines.feed(Array(text.utf8)) { found.append($0) }
    return found
  }

  @Test func everyKindIsReadAsItIsWritten() throws {
    let all: [AgentMessage] = [
      .request(id: 7, name: "fs-freeze", arguments: ["path": "/data", "depth": 2]), .result(id: .max, ["frozen": 2]),
      .result(id: 0, .null), .failure(id: 1, "a \"quoted\" \n text"), .event(name: "hello", arguments: ["version": 1]),
    ]
    var lines = AgentLines()
    var found: [AgentMessage] = []
    for message in all {
      // A byte at a time, so that no line's place in a buffer matters.
      for byte in message.line {
        lines.feed([byte]) { line in if case .success(let message) = line { found.append(message) } }
      }
    }
    #expect(found == all)
  }

  @Test(arguments: [
    ("nonsense", "no JSON"), ("[1]", "no JSON object"), ("{}", "id is missing"), (#"{"id": -1}"#, "id is missing"),
    (#"{"id": 1}"#, "request, result or error"), (#"{"id": 1, "request": "../etc"}"#, "request is missing or wrong"),
    (#"{"id": 1, "request": ""}"#, "request is missing or wrong"), (#"{"event": "x", "id": 1}"#, "event is missing"),
    (#"{"id": 1, "result": 1} {"#, "no JSON"), (#"{"id": 1, "error": 5}"#, "request, result or error"),
    (#"{"id": 1, "result": [[[[[[[[[1]]]]]]]]]}"#, "nested deeper"), (#"{"id": 1, "id": 2}"#, "duplicate key"),
  ])
  func whatIsWrongIsSaid(line: String, reason: String) throws {
    let found = messages(line + "\n\n" + #"{"id": 3, "result": 4}"# + "\n")
    #expect(found.count == 2)
    guard case .failure(let error) = try #require(found.first) else {
      Issue.record("\(line) was taken")
      return
    }
    #expect("\(error)".contains(reason), "\(error)")
    #expect(try found[1].get() == .result(id: 3, 4))
  }

  @Test func aLineWithoutAnEndKeepsNothing() throws {
    let long = String(repeating: "x", count: 3 * AgentMessage.longestLine)
    let found = messages(long + "\n" + #"{"event": "hello"}"# + "\n")
    #expect(found.count == 2)
    #expect(throws: AgentError.tooLong(limit: AgentMessage.longestLine)) { try found[0].get() }
    #expect(try found[1].get() == .event(name: "hello", arguments: [:]))
  }

  /// A good line with a few bytes changed is refused or is some message, and the next line is read as if nothing had been.
  @Test func malformedLinesChangeNothing() throws {
    var random = Steps(state: 20_261_123)
    let good = AgentMessage.request(id: 12, name: "snapshots", arguments: ["before": "2026-11-23T21:00:00Z"]).line
    let last = AgentMessage.result(id: 99, ["done": true])
    var refused = 0
    for _ in 0..<10_000 {
      var line = Array(good.dropLast())
      for _ in 0...Int(random.next() % 6) {
        let place = Int(random.next() % UInt64(line.count))
        switch random.next() % 3 {
        case 0: line[place] = UInt8(truncatingIfNeeded: random.next())
        case 1: line.insert(UInt8(truncatingIfNeeded: random.next()), at: place)
        default: if line.count > 1 { line.remove(at: place) }
        }
      }
      line.removeAll { $0 == 0x0a }
      var lines = AgentLines()
      var found: [Result<AgentMessage, AgentError>] = []
      lines.feed(line + [0x0a] + last.line) { found.append($0) }
      if case .failure? = found.first { refused += 1 }
      #expect(try found.last?.get() == last)
    }
    #expect(refused > 5000)
  }

  /// Numbers that are the same in every run (SplitMix64).
  private struct Steps {
    var state: UInt64

    mutating func next() -> UInt64 {
      state &+= 0x9e37_79b9_7f4a_7c15
      var mixed = state
      mixed = (mixed ^ mixed >> 30) &* 0xbf58_476d_1ce4_e5b9
      mixed = (mixed ^ mixed >> 27) &* 0x94d0_49bb_1331_11eb
      return mixed ^ mixed >> 31
    }
  }
}
