import GuestAgent
import Host
import PageClasses

extension AgentControl {
  /// What the agent says of the guest's pages, for `PageClassMap`; nothing where no agent answers, and what there is so far
  /// where it stops answering. Whoever leaves out ignored pages tracks writes before this is called.
  ///
  /// - Parameter milliseconds: for all answers together.
  /// - Returns: what was said, as it was said.
  func pageHints(milliseconds: UInt64) -> [PageHint] {
    let deadline = monotonicNanoseconds() + milliseconds * 1_000_000
    var collector = PageHintCollector()
    while let arguments = collector.arguments {
      let now = monotonicNanoseconds()
      guard now < deadline,
        let answer = try? ask(
          PageHintCollector.request, arguments, milliseconds: max(1, (deadline - now) / 1_000_000)),
        (try? collector.add(answer)) != nil
      else { break }
    }
    return collector.hints
  }
}
