import Foundation
import Testing
import X86

@Suite struct OpcodeTableTests {
  @Test func operationNumbersAreDense() {
    for number in 0..<Operation.count {
      let operation = Operation(rawValue: UInt16(number))
      #expect(operation.map { Int($0.rawValue) } == number)
    }
    #expect(Operation(rawValue: UInt16(Operation.count)) == nil)
    #expect(Operation.invalid.rawValue == 0)
  }

  @Test func properties() {
    #expect(Operation.wrmsr.isPrivileged && !Operation.rdtsc.isPrivileged)
    #expect(Operation.inAlDx.isIOPrivileged)
    #expect(Operation.addEvGv.isLockable && !Operation.cmpEvGv.isLockable)
    #expect(Operation.scasAlYb.isRepeatedByZF && Operation.movsYbXb.isString && !Operation.movsYbXb.isRepeatedByZF)
    #expect(Operation.tzcntGvEv.feature == .bmi1 && Operation.bsfGvEv.feature == .base)
    #expect(Operation.lldtEw.isProtectedModeOnly)
    #expect(Operation.cmpxchg16bMdq.mnemonic.text == "cmpxchg16b")
  }

  @Test func generatedFilesAreUpToDate() throws {
    let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
      .deletingLastPathComponent()
    let process = Process()
    process.executableURL = URL(fileURLWithPath: "/usr/bin/env")
    process.arguments = ["python3", root.appendingPathComponent("scripts/generate-opcodes").path, "--check"]
    process.standardOutput = FileHandle.nullDevice
    try process.run()
    process.waitUntilExit()
    #expect(process.terminationStatus == 0)
  }
}
