import Foundation
import FoundationXML
import Testing

/// What `swiftvmm migrate` shows and writes.
@Suite(
  .enabled(if: VMM.isBuilt, "needs the release build and scripts/build-guests"),
  .enabled(if: access("/usr/bin/script", X_OK) == 0, "needs script(1)"))
struct MigrateCommandTests {
  /// On a terminal it shows how far it is. The report is one page that needs nothing else, and its numbers are
  /// those of `query-migrate`.
  @Test func progressAndReport() throws {
    let folder = try TemporaryFolder()
    let guest = ["dirty", "--engine", "soft", "--memory", "64M", "--time-limit", "600", "--append", "set=8 seconds=0"]
    let machine = try RunningVMM(guest)
    #expect(machine.waitFor("dirty: pass"), "\(machine.text)")
    let uri = "unix:\(folder.path)/move"
    let next = try RunningVMM(guest + ["--incoming", uri])
    let (page, json) = (folder.path + "/page.html", folder.path + "/json")
    let command = "'\(VMM.path)' migrate '\(machine.socket)' '\(uri)' --report '\(page)' --json > '\(json)'"
    let shown = try hostTool("script", "--quiet", "--return", "--command", command, "/dev/null")
    #expect(shown.status == 0, "\(shown.output)")
    #expect(shown.output.contains("\rround ") && shown.output.contains("MiB left"), "\(shown.output)")
    #expect(machine.waitUntilExit() == 0, "\(machine.text)")
    #expect(next.waitFor("dirty: pass"), "\(next.text)")

    let parsed = try JSONSerialization.jsonObject(with: Data(contentsOf: URL(fileURLWithPath: json)))
    let result = try #require(parsed as? [String: Any])
    let own = try #require(result["x-swiftvmm"] as? [String: Any])
    let rounds = try #require(own["rounds"] as? [[String: Any]])
    let table = try PageTable(page)
    #expect(table.references.isEmpty, "\(table.references)")
    #expect(table.rows.first == ["Status", "completed"])
    #expect(table.rows.contains(["Order", "classed"]))
    let sent = try #require((result["ram"] as? [String: Any])?["transferred"] as? Int)
    #expect(table.rows.contains(["Sent", "\(sent >> 20) MiB"]), "\(table.rows)")
    let wanted = rounds.map { round in
      ["round", "pages", "zeros", "whole", "changed", "dirty"].map { "\(round[$0] as? Int ?? -1)" }
    }
    // Round, time, pages, zeros, whole, changes, KiB, MB/s, written.
    let written = table.rows.filter { $0.count == 10 }.map { row in [0, 2, 3, 4, 5, 8].map { row[$0] } }
    #expect(!rounds.isEmpty && written == wanted, "\(written) \(wanted)")
  }

  /// The cells of a page's tables, and what it would have to fetch.
  private final class PageTable: NSObject, XMLParserDelegate {
    private(set) var rows: [[String]] = []
    private(set) var references: [String] = []
    private var isCell = false

    init(_ path: String) throws {
      super.init()
      // The rest of these pages is XML, too.
      let text = try String(contentsOfFile: path, encoding: .utf8)
        .replacingOccurrences(of: "<!DOCTYPE html>", with: "")
        .replacingOccurrences(of: #"<meta charset="utf-8">"#, with: "")
      if text.contains("url(") || text.contains("@import") { references.append("style") }
      let parser = XMLParser(data: Data(text.utf8))
      parser.delegate = self
      try #require(parser.parse(), "line \(parser.lineNumber): \(String(describing: parser.parserError))")
    }

    func parser(
      _ parser: XMLParser, didStartElement name: String, namespaceURI: String?, qualifiedName: String?,
      attributes: [String: String]
    ) {
      references += attributes.filter { ["src", "href", "xlink:href"].contains($0.key) }.map(\.value)
      if ["script", "link", "img", "iframe"].contains(name) { references.append(name) }
      if name == "tr" { rows.append([]) }
      isCell = name == "td"
      if isCell { rows[rows.count - 1].append("") }
    }

    func parser(_ parser: XMLParser, foundCharacters text: String) {
      guard isCell, let row = rows.indices.last, let cell = rows[row].indices.last else { return }
      rows[row][cell] += text
    }

    func parser(_ parser: XMLParser, didEndElement name: String, namespaceURI: String?, qualifiedName: String?) {
      isCell = false
    }
  }
}
