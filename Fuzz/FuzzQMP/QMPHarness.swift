import Foundation
import JSON
import Monitor

/// One input is what a client sends; it is parsed as one JSON text too.
enum QMPHarness {
  private static let context = QMPCommand.Context(target: FakeTarget(), commands: QMPCommand.standard, package: "fuzz")

  static func run(_ input: UnsafeBufferPointer<UInt8>) {
    if let value = try? JSONValue(parsing: input) {
      precondition((try? JSONValue(parsing: value.serialized())) == value)
      precondition((try? JSONValue(parsing: value.serialized(pretty: true))) == value)
    }
    var session = QMPSession(context)
    for byte in Array("{\"execute\":\"qmp_capabilities\"}".utf8) + Array(input) {
      guard let reply = session.receive(byte) else { continue }
      precondition((reply["return"] != nil) != (reply["error"] != nil))
      precondition((try? JSONValue(parsing: reply.serialized())) == reply)
    }
  }

  static func writeSeeds(to directory: String) throws {
    try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true)
    for command in QMPCommand.standard {
      let request = "{\"execute\": \"\(command.name)\", \"arguments\": {}, \"id\": [1, null]}\n"
      try Data(request.utf8).write(to: URL(fileURLWithPath: "\(directory)/\(command.name)"))
    }
    let texts = [
      #"{"a":[1,-2.5e3,true,false,null,"\u00e9\ud834\udd1e\n"],"b":{"c":{}}}"#, "[18446744073709551615,1e400]\n{",
      #"{"execute":"human-monitor-command","arguments":{"command-line":"x","cpu-index":1}}"#,
      #"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#,
    ]
    for (index, text) in texts.enumerated() {
      try Data(text.utf8).write(to: URL(fileURLWithPath: "\(directory)/text\(index)"))
    }
  }
}
