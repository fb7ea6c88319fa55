import JSON
import PageClasses

/// The answer to one `page-hints` (docs/agent.md): what an agent says of the guest-physical pages from a first one on.
public struct PageHintChunk: Equatable, Sendable {
  /// What was said, as it was said: the ranges may overlap, and need not be RAM.
  public var hints: [PageHint]
  /// The page that the next answer begins with; nil: that was all.
  public var next: UInt64?

  /// Ranges of an answer at most.
  public static let longest = 4096

  /// Reads the result of `page-hints`: `{"ignored": [FIRST, COUNT, ...], "next": PAGE}`, with `deprioritized` and
  /// `prioritized` in the same way; what is missing is empty.
  ///
  /// - Parameters:
  ///   - result: the agent's answer, which may be anything.
  ///   - first: the page that was asked for; an answer whose `next` is not beyond it is refused.
  /// - Throws: `AgentError.member` with the name of what is wrong.
  public init(result: JSONValue, from first: UInt64) throws(AgentError) {
    guard let object = result.objectValue else { throw .notAnObject }
    hints = []
    for kind in PageHint.Kind.allCases {
      guard let value = object[kind.agentName] else { continue }
      guard let numbers = value.arrayValue, numbers.count % 2 == 0,
        hints.count + numbers.count / 2 <= Self.longest
      else { throw .member(kind.agentName) }
      for index in stride(from: 0, to: numbers.count, by: 2) {
        guard let page = numbers[index].unsignedValue, let count = numbers[index + 1].unsignedValue else {
          throw .member(kind.agentName)
        }
        hints.append(PageHint(firstPage: page, count: count, kind: kind))
      }
    }
    if let value = object["next"], value != .null {
      guard let page = value.unsignedValue, page > first else { throw .member("next") }
      next = page
    }
  }
}

/// Asks an agent for all of its hints, an answer after the other, and no more than somebody who moves a machine can wait for.
public struct PageHintCollector: Sendable {
  /// All hints so far.
  public private(set) var hints: [PageHint] = []
  private var next: UInt64? = 0
  private var answers = 0

  /// The name of the request.
  public static let request = "page-hints"
  /// Answers at most: beyond these, what was said counts and nothing more is asked.
  public static let mostAnswers = 256

  /// Nothing has been asked.
  public init() {}

  /// The arguments of the next request; nil where there is nothing more to ask.
  public var arguments: JSONObject? {
    guard let next, answers < Self.mostAnswers else { return nil }
    return ["from": JSONValue(next)]
  }

  /// Takes the result of the request whose arguments were the last.
  public mutating func add(_ result: JSONValue) throws(AgentError) {
    guard let first = next else { return }
    let chunk = try PageHintChunk(result: result, from: first)
    hints += chunk.hints
    next = chunk.next
    answers += 1
  }
}

extension PageHint.Kind {
  fileprivate var agentName: String {
    switch self {
    case .prioritized: "prioritized"
    case .deprioritized: "deprioritized"
    case .ignored: "ignored"
    }
  }
}
