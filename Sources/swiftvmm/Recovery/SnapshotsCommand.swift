import ArgumentParser
import JSON
import Monitor

/// `swiftvmm snapshots`: what snapshots a running machine's disks have.
struct SnapshotsCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "snapshots",
    abstract: "List the snapshots of a running machine's disks, the oldest first.",
    discussion: "Example: swiftvmm snapshots /run/vm.sock")

  @OptionGroup var control: ControlSocket

  @Flag(help: "Also what a backup has made, which is gone at its end.")
  var all = false

  @Flag(help: "Print JSON.")
  var json = false

  func run() throws {
    let arguments: JSONObject = ["all": .bool(all)]
    let answer = try control.withClient { client in try client.execute("x-swiftvmm-query-snapshots", arguments) }
    if json { return print(answer.serialized(pretty: true)) }
    for snapshot in answer["snapshots"]?.arrayValue ?? [] {
      let words = ["utc", "disk", "id", "name"].compactMap { snapshot[$0]?.stringValue }
      print(words.filter { !$0.isEmpty }.joined(separator: "  "))
    }
    for layer in answer["temporary"]?.arrayValue ?? [] {
      print("\(layer["kind"]?.stringValue ?? "")  \(layer["file"]?.stringValue ?? "")")
    }
  }
}
