/// An audit as a page of HTML with a drawing: a row a vCPU, the loader's view as bars, violations as marks.
public struct AuditTimeline {
  private let events: [AuditEvent]
  private static let width = 1000.0
  private static let rowHeight = 40
  /// More marks than these tell nobody more.
  private static let rowLimit = 2000

  /// A page about these events, in the order of their times.
  public init(_ events: [AuditEvent]) { self.events = events.sorted { $0.time < $1.time } }

  /// The page, without anything beside it.
  public var html: String {
    let denied = events.filter { $0.kind == .denied }
    let vcpus = Array(Set(events.compactMap(\.vcpu))).sorted()
    let entries = events.count { $0.kind == .enter }
    var rows = ""
    for event in events.prefix(Self.rowLimit) where ![.enter, .leave].contains(event.kind) {
      let cells = [
        Self.milliseconds(event.time), event.kind.rawValue, event.vcpu.map { "\($0)" } ?? "device",
        Self.hex(event.rip), Self.hex(event.address), event.view, event.rights ?? "", event.reason ?? "",
        event.reaction ?? "",
      ]
      let mark = event.kind == .denied ? " class=\"denied\"" : ""
      rows += "<tr\(mark)>" + cells.map { "<td>\(Self.escaped($0))</td>" }.joined() + "</tr>\n"
    }
    return """
      <!DOCTYPE html>
      <html lang="en"><head><meta charset="utf-8"><title>swiftvmm: audit</title>
      <style>
      body { font: 14px sans-serif; margin: 2em; color: #222 }
      table { border-collapse: collapse; font: 12px monospace; margin-top: 1em }
      td, th { border: 1px solid #ccc; padding: 2px 6px; text-align: left }
      .denied { background: #fdd } .kernel { fill: #cde } .loader { fill: #e90 } .mark { fill: #c00 }
      </style></head><body>
      <h1>Audit</h1>
      <p>\(events.count) events, \(entries) visits of the loader, \(denied.count) denied.
      Blue: the kernel's view; orange: the loader's; red: a violation.</p>
      \(drawing(vcpus))
      <table><tr><th>ms</th><th>event</th><th>vCPU</th><th>RIP</th><th>address</th><th>view</th><th>rights</th>\
      <th>reason</th><th>reaction</th></tr>
      \(rows)</table></body></html>

      """
  }

  private func drawing(_ vcpus: [Int]) -> String {
    let first = events.first?.time ?? 0
    let span = max(1, (events.last?.time ?? 0) - first)
    func x(_ time: UInt64) -> Double { 60 + Double(time - first) / Double(span) * Self.width }
    var shapes = ""
    for (row, vcpu) in vcpus.enumerated() {
      let top = row * Self.rowHeight + 10
      shapes += "<text x=\"0\" y=\"\(top + 17)\">vCPU \(vcpu)</text>\n"
      shapes += "<rect class=\"kernel\" x=\"60\" y=\"\(top)\" width=\"\(Self.width)\" height=\"24\"/>\n"
      var since: UInt64?
      for event in events where event.vcpu == vcpu {
        switch event.kind {
        case .enter, .resume: since = event.time
        case .leave, .suspend:
          if let start = since {
            let width = max(0.5, x(event.time) - x(start))
            shapes += "<rect class=\"loader\" x=\"\(x(start))\" y=\"\(top)\" width=\"\(width)\" height=\"24\"/>\n"
          }
          since = nil
        case .denied:
          shapes += "<circle class=\"mark\" cx=\"\(x(event.time))\" cy=\"\(top + 12)\" r=\"5\"><title>"
          shapes += "\(Self.escaped(event.reason ?? ""))</title></circle>\n"
        default: break
        }
      }
    }
    return """
      <svg xmlns="http://www.w3.org/2000/svg" width="\(Self.width + 80)" height="\(vcpus.count * Self.rowHeight + 20)">
      \(shapes)</svg>
      """
  }

  private static func milliseconds(_ time: UInt64) -> String {
    let thousandths = "\(time / 1000 % 1000)"
    return "\(time / 1_000_000)." + String(repeating: "0", count: 3 - thousandths.count) + thousandths
  }

  private static func hex(_ value: UInt64?) -> String { value.map { "0x" + String($0, radix: 16) } ?? "" }

  /// A guest chooses some of the text.
  private static func escaped(_ text: String) -> String {
    var result = ""
    for character in text {
      switch character {
      case "&": result += "&amp;"
      case "<": result += "&lt;"
      case ">": result += "&gt;"
      case "\"": result += "&quot;"
      default: result.append(character)
      }
    }
    return result
  }
}
