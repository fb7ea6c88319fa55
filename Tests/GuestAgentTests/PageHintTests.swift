import GuestAgent
import JSON
import PageClasses
import Testing

/// Answers to `page-hints`, right and wrong.
struct PageHintTests {
  @Test func rangesOfEveryKindAreRead() throws {
    let chunk = try PageHintChunk(
      result: [
        "ignored": [1, 2, JSONValue(UInt64.max), 3], "prioritized": [4096, 1], "deprioritized": [],
        "more": "is nothing", "next": 8192,
      ], from: 8191)
    #expect(
      chunk.hints == [
        PageHint(firstPage: 4096, count: 1, kind: .prioritized), PageHint(firstPage: 1, count: 2, kind: .ignored),
        PageHint(firstPage: .max, count: 3, kind: .ignored),
      ])
    #expect(chunk.next == 8192)
    #expect(try PageHintChunk(result: [:], from: 0) == PageHintChunk(result: ["next": .null], from: 5))
  }

  static let wrong: [(JSONValue, String)] = [
    (["ignored": [1]], "ignored"), (["ignored": 1], "ignored"), (["ignored": [1, -1]], "ignored"),
    (["deprioritized": [1.5, 2]], "deprioritized"), (["prioritized": ["1", 2]], "prioritized"),
    (["prioritized": [[1, 2]]], "prioritized"), (["next": 7], "next"), (["next": "9"], "next"), (["next": -9], "next"),
    (["ignored": .array([JSONValue](repeating: 1, count: 2 * PageHintChunk.longest + 2))], "ignored"),
  ]

  @Test(arguments: wrong.indices) func whatIsWrongIsNamed(_ index: Int) {
    let (value, name) = Self.wrong[index]
    #expect(throws: AgentError.member(name)) { try PageHintChunk(result: value, from: 7) }
  }

  @Test func anAnswerThatIsNoObjectIsRefused() {
    #expect(throws: AgentError.notAnObject) { try PageHintChunk(result: [1, 2], from: 0) }
  }

  @Test func theCollectorAsksUntilTheEnd() throws {
    var collector = PageHintCollector()
    #expect(collector.arguments == ["from": 0])
    try collector.add(["ignored": [0, 5], "next": 100])
    #expect(collector.arguments == ["from": 100])
    #expect(throws: AgentError.member("next")) { try collector.add(["next": 100]) }
    #expect(collector.arguments == ["from": 100])
    try collector.add(["deprioritized": [100, 5]])
    #expect(collector.arguments == nil)
    #expect(collector.hints.map(\.firstPage) == [0, 100])
  }

  @Test func anAgentThatNeverEndsIsLeft() throws {
    var collector = PageHintCollector()
    var page: UInt64 = 0
    while collector.arguments != nil {
      page += 1
      try collector.add(["ignored": [1, 1], "next": JSONValue(page)])
    }
    #expect(page == UInt64(PageHintCollector.mostAnswers))
    #expect(collector.hints.count == PageHintCollector.mostAnswers)
  }
}
