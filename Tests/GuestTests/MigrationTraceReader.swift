import Foundation

/// Reads a trace on its own account: what was sent how often, and in which order.
struct MigrationTraceReader {
  private struct Line: Decodable {
    let round: Int
    let iteration: Int
    let first: Int
    let count: Int
    let `class`: String
  }

  /// How often each page was sent.
  private(set) var sent: [Int]
  /// How often each page was sent after the first round.
  private(set) var sentAgain: [Int]
  /// The first round's iterations rise, and each has the classes that docs/migration.md says.
  private(set) var firstRoundIsInOrder = true
  /// Pages that it sent, by class.
  private(set) var first: [String: Int] = [:]
  /// The class of each page that it sent.
  private(set) var classes: [Int: String] = [:]

  init(_ path: String, pages: Int) throws {
    sent = [Int](repeating: 0, count: pages)
    sentAgain = sent
    let iterations = [1: ["readOnly"], 2: ["prioritized"], 3: ["other", "deprioritized"]]
    var last = (iteration: 0, isDeprioritized: false)
    for line in try String(contentsOfFile: path, encoding: .utf8).split(separator: "\n") {
      let run = try JSONDecoder().decode(Line.self, from: Data(line.utf8))
      for page in run.first..<run.first + run.count {
        sent[page] += 1
        if run.round > 1 { sentAgain[page] += 1 } else { classes[page] = run.class }
      }
      guard run.round == 1 else { continue }
      first[run.class, default: 0] += run.count
      let isDeprioritized = run.class == "deprioritized"
      let isRight =
        run.iteration >= last.iteration && iterations[run.iteration]?.contains(run.class) == true
        && !(last.isDeprioritized && run.iteration == last.iteration && !isDeprioritized)
      if !isRight { firstRoundIsInOrder = false }
      last = (run.iteration, isDeprioritized)
    }
  }
}

/// RAM in a saved machine's file: docs/state.md.
func savedMemory(_ path: String) throws -> Data {
  let data = try Data(contentsOf: URL(fileURLWithPath: path))
  func number(_ place: Int) -> Int { (0..<8).reduce(0) { $0 | Int(data[place + $1]) << ($1 * 8) } }
  return data[number(48)..<number(48) + number(56)]
}
