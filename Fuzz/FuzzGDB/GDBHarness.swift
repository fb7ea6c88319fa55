import Foundation
import GDBStub

/// One input is lines: 0xff and bytes as they are, 0xfe and a report of the target (kind, thread), or a packet's content,
/// which gets its frame and checksum here, for libFuzzer does not find checksums.
enum GDBHarness {
  private static let target = FakeTarget(executes: false)

  static func run(_ input: UnsafeBufferPointer<UInt8>) {
    var session = GDBSession(target)
    for line in input.split(separator: UInt8(ascii: "\n")) {
      let output: GDBSession.Output
      switch line.first {
      case 0xff: output = session.receive(line.dropFirst())
      case 0xfe: output = session.stopped(stop(Array(line.dropFirst())))
      default:
        let sum = line.reduce(UInt8(0)) { $0 &+ $1 }
        output = session.receive([0x24] + line + Array("#\(sum < 16 ? "0" : "")\(String(sum, radix: 16))".utf8))
      }
      check(output.bytes)
      if output.isOver { session = GDBSession(target) }
    }
    session.disconnect()
  }

  private static func stop(_ bytes: [UInt8]) -> DebugStop {
    let thread = Int(bytes.dropFirst().first ?? 0) % 4 - 1
    return switch (bytes.first ?? 0) % 6 {
    case 0: .breakpoint(thread: thread)
    case 1: .step(thread: thread)
    case 2: .watchpoint(thread: thread, address: FakeTarget.data)
    case 3: .crash(thread: thread)
    case 4: .paused
    default: .exited(status: 1)
    }
  }

  /// What goes out is acknowledgements and whole packets.
  private static func check(_ bytes: [UInt8]) {
    var rest = bytes[...]
    while let first = rest.popFirst() {
      if first == UInt8(ascii: "+") || first == UInt8(ascii: "-") { continue }
      precondition(first == UInt8(ascii: "$"))
      guard let end = rest.firstIndex(of: UInt8(ascii: "#")) else { preconditionFailure("a packet without end") }
      precondition(rest.distance(from: end, to: rest.endIndex) >= 3)
      rest = rest[(end + 3)...]
    }
  }

  static func writeSeeds(to directory: String) throws {
    try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true)
    let conversations = [
      "qSupported:swbreak+;hwbreak+\nQStartNoAckMode\nqXfer:features:read:target.xml:0,400\n?\ng\nqfThreadInfo\nqsThreadInfo",
      "Hg2\np0\nP0=0000000000000000\np22\nm1000,40\nM1000,2:0102\nX1000,1:a\nx1000,10\nT1\nqC\nqThreadExtraInfo,2",
      "Z0,1010,1\nZ1,1020,1\nZ2,2000,8\nZ3,2000,4\nvCont?\nvCont;s:1;c\nz0,1010,1\nHc1\ns1000\nC05;1000\nD",
      "qRcmd,67726565742061\nqAttached\nvKill;1\nk",
    ]
    for (index, text) in conversations.enumerated() {
      try Data(text.utf8).write(to: URL(fileURLWithPath: "\(directory)/\(index)"))
    }
    for kind in 0..<6 as Range<UInt8> {
      let bytes = Array("c\n".utf8) + [0xfe, kind, 2, 0x0a, 0xff, 0x03, 0x0a] + Array("?\nc".utf8)
      try Data(bytes).write(to: URL(fileURLWithPath: "\(directory)/stop\(kind)"))
    }
  }
}
