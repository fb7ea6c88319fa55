import Foundation
import GuestAgent
import JSON

/// What a guest's agent sends, cut into pieces by its first byte: each line is a message or an error, and a message that was
/// read is read again from what it is written as.
enum AgentHarness {
  static func run(_ input: UnsafeBufferPointer<UInt8>) {
    guard let first = input.first else { return }
    let bytes = Array(input.dropFirst())
    var lines = AgentLines()
    var offset = 0
    while offset < bytes.count {
      let end = min(offset + Int(first) + 1, bytes.count)
      lines.feed(Array(bytes[offset..<end])) { line in
        guard case .success(let message) = line else { return }
        let written = message.line
        // What is written escaped may be longer than a line may be.
        guard written.count <= AgentMessage.longestLine else { return }
        let again = try? AgentMessage(line: written.dropLast())
        precondition(again == message, "a message is not what it was written as")
      }
      offset = end
    }
  }

  /// Valid conversations.
  static func writeSeeds(to folder: String) throws {
    let messages: [AgentMessage] = [
      .event(name: "hello", arguments: ["version": 1]), .request(id: 1, name: "ping", arguments: ["a": [1, "b", nil]]),
      .result(id: 2, ["frozen": 3]), .failure(id: 3, "no"),
    ]
    for (number, message) in messages.enumerated() {
      try Data([200] + message.line + messages[0].line).write(to: URL(fileURLWithPath: "\(folder)/\(number)"))
    }
  }
}
