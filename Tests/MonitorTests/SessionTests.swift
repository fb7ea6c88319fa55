import JSON
import Monitor
import Testing

@Suite struct QMPSessions {
  let target = FakeTarget()

  func session(negotiated: Bool = true) -> QMPSession {
    var session = QMPSession(.init(target: target, commands: QMPCommand.standard, package: "swiftvmm 1.2.3"))
    if negotiated { _ = replies(to: #"{"execute":"qmp_capabilities"}"#, &session) }
    return session
  }

  func replies(to text: String, _ session: inout QMPSession) -> [String] {
    text.utf8.compactMap { session.receive($0) }.map { $0.serialized() }
  }

  func replies(to text: String) -> [String] {
    var session = session()
    return replies(to: text, &session)
  }

  @Test func greet() throws {
    #expect(
      session(negotiated: false).greeting.serialized()
        == #"{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "swiftvmm 1.2.3"}, "capabilities": []}}"#
    )
  }

  @Test func negotiateOnce() {
    var session = session(negotiated: false)
    #expect(
      replies(to: #"{"execute":"query-status"}"#, &session) == [
        #"{"error": {"class": "CommandNotFound", "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}}"#
      ])
    #expect(
      replies(to: #"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#, &session) == [
        #"{"error": {"class": "GenericError", "desc": "Capability 'oob' is not available"}}"#
      ])
    #expect(!session.isNegotiated)
    #expect(replies(to: #"{"execute":"qmp_capabilities","id":1}"#, &session) == [#"{"return": {}, "id": 1}"#])
    #expect(session.isNegotiated)
    #expect(replies(to: #"{"execute":"qmp_capabilities"}"#, &session).first?.contains("already complete") == true)
  }

  @Test func echoAnyID() {
    for id in ["1", "-1.5", "null", "true", #""x""#, "[1, {}]", #"{"a": [null]}"#] {
      #expect(
        replies(to: #"{"execute": "query-kvm", "id": \#(id)}"#)
          == [#"{"return": {"enabled": true, "present": true}, "id": \#(id)}"#])
      #expect(
        replies(to: #"{"id": \#(id), "execute": "nope"}"#) == [
          #"{"error": {"class": "CommandNotFound", "desc": "The command nope has not been found"}, "id": \#(id)}"#
        ])
    }
  }

  @Test func takeCommandsWithoutNewlinesAndOverSeveral() {
    let all = replies(
      to: #"{"execute":"stop","id":1}{"execute":"cont","id":2} {"# + "\n\"execute\":\n\"stop\",\"id\":3}")
    #expect(all == [#"{"return": {}, "id": 1}"#, #"{"return": {}, "id": 2}"#, #"{"return": {}, "id": 3}"#])
    #expect(target.calls == ["resume", "pause"])
  }

  @Test(arguments: [
    "{\"execute\":\"stop\"\n", "{\"execute\":\"stop\n", "nonsense and more {\"execute\":\"stop\"}\n",
    "{'execute':'stop'}\n",
    "\u{fffd}\n", "{\"execute\":\"stop\"]\n", "[[[[}\n",
  ])
  func goOnAfterAMalformedLine(_ line: String) throws {
    let all = replies(to: line + "\n{\"execute\":\"query-kvm\",\"id\":7}\n")
    // A line that could go on is found out by the next one, which is lost with it.
    #expect(all.first?.hasPrefix(#"{"error": {"class": "GenericError", "desc": "JSON parse error, "#) == true)
    var session = session()
    _ = replies(to: line + "\n}\n", &session)
    #expect(replies(to: "{\"execute\":\"stop\",\"id\":8}\n", &session).last == #"{"return": {}, "id": 8}"#)
  }

  @Test func answerQueries() {
    #expect(replies(to: #"{"execute":"query-status"}"#) == [#"{"return": {"running": false, "status": "prelaunch"}}"#])
    #expect(
      replies(to: #"{"execute":"x-swiftvmm-query-exits"}"#) == [
        #"{"return": [{"reason": "port-io", "count": 7}, {"reason": "halt", "count": 18446744073709551615}]}"#
      ])
    #expect(
      replies(to: #"{"execute":"query-cpus-fast"}"#).first?.hasPrefix(
        #"{"return": [{"cpu-index": 0, "qom-path": "/machine/cpu[0]", "thread-id": 100, "target": "x86_64"}"#) == true)
  }

  @Test func tellTheMachine() {
    #expect(
      replies(to: #"{"execute":"system_powerdown"}"#) == [
        #"{"error": {"class": "GenericError", "desc": "the guest is not running"}}"#
      ])
    _ = replies(
      to: ["cont", "system_powerdown", "system_reset", "stop", "quit"].map { #"{"execute":"\#($0)"}"# }.joined())
    #expect(target.calls == ["resume", "powerDown", "reset", "pause", "quit"])
  }

  /// Every type that the schema names is in it, once; every command and event is.
  @Test func describeThemselves() throws {
    var session = session()
    var schema: [JSONValue] = []
    for byte in #"{"execute":"query-qmp-schema"}"#.utf8 {
      if let reply = session.receive(byte) { schema = reply["return"]?.arrayValue ?? [] }
    }
    let names = schema.compactMap { $0["name"]?.stringValue }
    #expect(Set(names).count == names.count)
    #expect(Set(names).isSuperset(of: QMPCommand.standard.map(\.name)))
    #expect(Set(names).isSuperset(of: ["STOP", "RESUME", "SHUTDOWN", "RESET", "POWERDOWN", "GUEST_PANICKED"]))
    for entry in schema {
      var references = ["arg-type", "ret-type", "element-type"].compactMap { entry[$0]?.stringValue }
      if entry["meta-type"] == "object" {
        references += try #require(entry["members"]?.arrayValue).compactMap { $0["type"]?.stringValue }
      }
      for reference in references { #expect(names.contains(reference), "\(entry.serialized())") }
    }
  }

  @Test func checkArguments() {
    let members: [QMPType.Member] = [
      .required("name", .string), .optional("count", .integer), .optional("on", .bool), .optional("value", .any),
      .optional("mode", .enumeration("Mode", values: ["a", "b"])), .optional("list", .array(.integer)),
      .optional("inner", .object("Inner", members: [.required("x", .integer)])),
    ]
    let commands =
      QMPCommand.standard + [QMPCommand("test", members, returns: .any) { _, arguments in .object(arguments) }]
    func reply(_ arguments: String) -> String {
      var session = QMPSession(.init(target: target, commands: commands, package: ""))
      _ = replies(to: #"{"execute":"qmp_capabilities"}"#, &session)
      let reply = replies(to: #"{"execute":"test","arguments":\#(arguments)}"#, &session).first ?? ""
      return (try? JSONValue(parsing: reply))?["error"]?["desc"]?.stringValue ?? reply
    }
    #expect(reply("{}") == "Parameter 'name' is missing")
    #expect(reply(#"{"name": 1}"#) == "Invalid parameter type for 'name', expected: string")
    #expect(reply(#"{"name": "", "count": 1.5}"#) == "Invalid parameter type for 'count', expected: integer")
    #expect(reply(#"{"name": "", "count": 9223372036854775808}"#).contains("expected: integer"))
    #expect(reply(#"{"name": "", "on": 1}"#) == "Invalid parameter type for 'on', expected: boolean")
    #expect(reply(#"{"name": "", "mode": "c"}"#) == "Parameter 'mode' does not accept value 'c'")
    #expect(reply(#"{"name": "", "list": [1, "x"]}"#) == "Invalid parameter type for 'list[1]', expected: integer")
    #expect(reply(#"{"name": "", "inner": {}}"#) == "Parameter 'inner.x' is missing")
    #expect(reply(#"{"name": "", "inner": {"x": 1, "y": 2}}"#) == "Parameter 'inner.y' is unexpected")
    #expect(reply(#"{"name": "", "other": 1}"#) == "Parameter 'other' is unexpected")
    let whole = #"{"name": "n", "count": 1, "on": true, "value": [null], "mode": "a", "list": [], "inner": {"x": 1}}"#
    #expect(reply(whole) == #"{"return": \#(whole)}"#)
  }

  /// Whatever comes, each reply is JSON of the right shape, and a good command afterwards is answered.
  @Test func surviveRandomInput() {
    var random = SplitMix(state: 2)
    let pieces = [
      "{", "}", "[", "]", ":", ",", "\"", "\\", "\n", " ", "\"execute\"", "\"arguments\"", "\"id\"", "\"stop\"", "1",
      "-", "e9",
      "\"query-qmp-schema\"", "{\"execute\":\"stop\"}", "null", "\u{0}", "\u{7f}", "\\ud800", "\"enable\"",
      "{\"execute\":\"qmp_capabilities\"}",
    ]
    for _ in 0..<2000 {
      var session = session(negotiated: random.next(below: 2) == 0)
      for _ in 0..<random.next(below: 40) {
        var bytes = Array(pieces[random.next(below: pieces.count)].utf8)
        if random.next(below: 20) == 0 { bytes = [UInt8(random.next(below: 256))] }
        for byte in bytes {
          guard let reply = session.receive(byte) else { continue }
          #expect((reply["return"] != nil) != (reply["error"] != nil))
        }
      }
      // No value goes on after this byte, so that the next line is a fresh one.
      _ = replies(to: "\n\u{1}\n", &session)
      #expect(replies(to: "{\"execute\":\"nope\",\"id\":9}\n", &session).last?.hasSuffix(#""id": 9}"#) == true)
    }
  }
}

/// SplitMix64: small, and the same on every run.
struct SplitMix {
  var state: UInt64

  mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var z = state
    z = (z ^ (z >> 30)) &* 0xbf58_476d_1ce4_e5b9
    z = (z ^ (z >> 27)) &* 0x94d0_49bb_1331_11eb
    return z ^ (z >> 31)
  }

  mutating func next(below bound: Int) -> Int { Int(next() % UInt64(bound)) }
}
