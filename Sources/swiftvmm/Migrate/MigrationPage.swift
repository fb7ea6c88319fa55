import Glibc
import Host
import JSON

/// A page about a migration that has ended: HTML with SVG, in one file, from `query-migrate`'s result.
enum MigrationPage {
  private static let width = 800.0
  private static let colors = [
    "readOnly": "steelblue", "prioritized": "firebrick", "other": "olivedrab", "deprioritized": "goldenrod",
    "ignored": "gray",
  ]

  /// Writes the page.
  static func write(_ result: JSONValue, to path: String) throws(Failure) {
    var text = html(result)
    let outcome = text.withUTF8 { buffer in
      Result { () throws(HostError) in
        try FileDescriptor.open(path, O_WRONLY | O_CREAT | O_TRUNC).writeAll(UnsafeRawBufferPointer(buffer))
      }
    }
    do { try outcome.get() } catch { throw .output(path: path, reason: HostError.reason(error.errno)) }
  }

  static func html(_ result: JSONValue) -> String {
    let own = result["x-swiftvmm"]
    let rounds = own?["rounds"]?.arrayValue ?? []
    let figures: [(String, String)] = [
      ("Status", result["status"]?.stringValue ?? ""), ("Order", own?["order"]?.stringValue ?? ""),
      ("Total", "\(milliseconds(own?["total-us"])) ms"), ("Downtime", "\(milliseconds(own?["downtime-us"])) ms"),
      ("Sent", "\((result["ram"]?["transferred"]?.unsignedValue ?? 0) >> 20) MiB"),
      ("Pages sent again", "\(own?["resent"]?.unsignedValue ?? 0)"),
      ("Pages left out", "\(own?["ignored"]?.unsignedValue ?? 0)"),
      ("Pages that the guest waited for", waits(own?["postcopy"])),
      ("Error", result["error-desc"]?.stringValue ?? "none"),
    ]
    var page = """
      <!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Migration</title>
      <style>body{font:14px sans-serif;max-width:860px;margin:2em auto}td,th{padding:2px 10px;text-align:right}
      th:first-child,td:first-child{text-align:left}svg text{font-size:11px}</style><h1>Migration</h1><table>

      """
    for (name, value) in figures { page += "<tr><td>\(escaped(name))</td><td>\(escaped(value))</td></tr>\n" }
    page += "</table><h2>Rounds over time</h2>\n" + timeline(rounds, own) + "<h2>Pages by class</h2>\n" + bars(rounds)
    page += "<h2>Rounds</h2><table><tr><th>Round</th><th>Time, ms</th><th>Pages</th><th>Zeros</th><th>Whole</th>"
    page += "<th>Changes</th><th>KiB</th><th>MB/s</th><th>Written, pages</th><th>Written, MB/s</th></tr>\n"
    for round in rounds { page += row(round) }
    return page + "</table></html>\n"
  }

  private static func number(_ value: JSONValue?) -> Double { Double(value?.unsignedValue ?? 0) }

  private static func waits(_ postCopy: JSONValue?) -> String {
    guard let postCopy else { return "none: all were there when it went on" }
    let (faults, pages) = (postCopy["faults"]?.unsignedValue ?? 0, postCopy["pages"]?.unsignedValue ?? 0)
    return "\(faults) of \(pages), \(milliseconds(postCopy["longest-stall-us"])) ms at most"
  }

  private static func milliseconds(_ value: JSONValue?) -> String { rounded(number(value) / 1000) }

  private static func rounded(_ value: Double) -> String { "\((value * 10).rounded() / 10)" }

  private static func row(_ round: JSONValue) -> String {
    let time = max(1, number(round["time-us"]))
    let cells = [
      "\(round["round"]?.unsignedValue ?? 0)", milliseconds(round["time-us"]), "\(round["pages"]?.unsignedValue ?? 0)",
      "\(round["zeros"]?.unsignedValue ?? 0)", "\(round["whole"]?.unsignedValue ?? 0)",
      "\(round["changed"]?.unsignedValue ?? 0)", "\((round["bytes"]?.unsignedValue ?? 0) >> 10)",
      rounded(number(round["bytes"]) / time), "\(round["dirty"]?.unsignedValue ?? 0)",
      rounded(number(round["dirty"]) * 4096 / time),
    ]
    return "<tr>" + cells.map { "<td>\($0)</td>" }.joined() + "</tr>\n"
  }

  /// A bar a round, as high as it is fast; what the guest stood still is red.
  private static func timeline(_ rounds: [JSONValue], _ own: JSONValue?) -> String {
    let total = max(1, number(own?["total-us"]))
    let speed = { (round: JSONValue) in number(round["bytes"]) / max(1, number(round["time-us"])) }
    let most = max(1e-9, rounds.map(speed).max() ?? 1)
    var svg = #"<svg width="\#(Int(width))" height="150" role="img">"#
    for round in rounds {
      let height = speed(round) / most * 120
      let x = number(round["start-us"]) / total * width
      let size = max(1, number(round["time-us"]) / total * width)
      svg += #"<rect x="\#(rounded(x))" y="\#(rounded(125 - height))" width="\#(rounded(size))" "#
      svg += #"height="\#(rounded(height))" fill="steelblue" stroke="white"><title>round "#
      svg += #"\#(round["round"]?.unsignedValue ?? 0): \#(rounded(speed(round))) MB/s</title></rect>"#
    }
    let down = number(own?["downtime-us"]) / total * width
    svg += #"<rect x="\#(rounded(width - down))" y="128" width="\#(rounded(max(1, down)))" "#
    svg += #"height="6" fill="firebrick"/><text x="0" y="147">0</text>"#
    return svg + #"<text x="\#(Int(width) - 70)" y="147">\#(rounded(total / 1000)) ms</text></svg>"#
  }

  private static func bars(_ rounds: [JSONValue]) -> String {
    let most = max(1, rounds.map { number($0["pages"]) }.max() ?? 1)
    var svg = #"<svg width="\#(Int(width))" height="\#(rounds.count * 18 + 20)" role="img">"#
    for (index, round) in rounds.enumerated() {
      var x = 60.0
      svg += #"<text x="0" y="\#(index * 18 + 12)">\#(round["round"]?.unsignedValue ?? 0)</text>"#
      for (name, color) in colors.sorted(by: { $0.key < $1.key }) {
        let size = number(round["classes"]?[name]) / most * (width - 60)
        guard size > 0 else { continue }
        svg += #"<rect x="\#(rounded(x))" y="\#(index * 18 + 2)" width="\#(rounded(size))" height="13" "#
        svg += #"fill="\#(color)">"# + "<title>\(name)</title></rect>"
        x += size
      }
    }
    var x = 60
    for (name, color) in colors.sorted(by: { $0.key < $1.key }) {
      svg += #"<text x="\#(x)" y="\#(rounds.count * 18 + 14)" fill="\#(color)">\#(name)</text>"#
      x += 100
    }
    return svg + "</svg>\n"
  }

  private static func escaped(_ text: String) -> String {
    var result = ""
    for character in text {
      switch character {
      case "<": result += "&lt;"
      case ">": result += "&gt;"
      case "&": result += "&amp;"
      default: result.append(character)
      }
    }
    return result
  }
}
