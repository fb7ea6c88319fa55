import CDirty
import CGuest

/// Tells a host that moves the machine what its pages are to this guest (docs/agent.md, `page-hints`): free ones are ignored, those that
/// are written all the time prioritized, those that are looked at now and then deprioritized.
final class Hints {
  private static let vector: UInt8 = 0x52

  private let agent = Agent(vector: vector)
  private let areas: Areas

  init(_ areas: Areas) { self.areas = areas }

  /// Answers what has been asked; `taken` pages of the free ones are in use again.
  func look(taken: UInt64) {
    while let line = agent.line() {
      guard let id = line.member("id"), let request = line.member("request") else { continue }
      agent.add(#"{"id": "#)
      agent.add(id)
      if request.equals("page-hints") {
        agent.add(#", "result": {"ignored": ["#)
        add(Int(DIRTY_FREE), from: taken)
        agent.add(#"], "prioritized": ["#)
        add(Int(DIRTY_SET))
        agent.add(#"], "deprioritized": ["#)
        add(Int(DIRTY_FILL))
        agent.add("]}}")
      } else if request.equals("ping") {
        agent.add(#", "result": {}}"#)
      } else {
        agent.add(#", "error": "a sample guest knows ping and page-hints"}"#)
      }
      agent.end()
    }
  }

  private func add(_ area: Int, from start: UInt64 = 0) {
    let (first, pages) = areas.place(area)
    if pages <= start { return }
    agent.add(first + start)
    agent.add(", ")
    agent.add(pages - start)
  }
}
