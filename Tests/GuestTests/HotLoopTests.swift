import Foundation
import Testing

/// What the software CPU's loop over blocks calls in the release build: nothing that counts references or allocates.
@Suite(.enabled(if: VMM.isBuilt, "needs the release build and scripts/build-guests"))
struct HotLoopTests {
  private static let loop = "$s15SoftAccelerator9ProcessorC9runBlocksyyAA12InterruptionOYKF"
  /// Where the loop is left, or an instruction needs more than a fast operation.
  private static let known = ["find", "follow", "fill", "stepOut", "executeGeneric", "executeLast"]

  @Test func countsNoReferencesAndAllocatesNothing() throws {
    let process = Process()
    let output = Pipe()
    process.executableURL = URL(fileURLWithPath: "/usr/bin/objdump")
    process.arguments = ["-d", "--no-show-raw-insn", "--disassemble=\(Self.loop)", VMM.path]
    process.standardOutput = output
    try process.run()
    let text = String(decoding: output.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
    process.waitUntilExit()
    let lines = text.split(separator: "\n")
    #expect(lines.count > 5000, "the loop was not found in \(VMM.path)")
    let calls = lines.filter { $0.contains("call ") && $0.contains("<") }.map { $0.drop { $0 != "<" } }
    // With its length before it, a name is a whole one in Swift's mangling.
    let unknown = calls.filter { call in
      !Self.known.contains { call.hasPrefix("<$s15SoftAccelerator9ProcessorC\($0.count)\($0)") }
    }
    #expect(unknown.isEmpty)
    #expect(calls.contains { $0.contains("4find") })
  }
}
