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
    #expect(Operation.lldtEw.isProtectedModeOnly && Operation.andnGyByEy.isProtectedModeOnly)
    #expect(!Operation.lgdtMs.isProtectedModeOnly)
    #expect(Operation.cmpxchg16bMdq.mnemonic.text == "cmpxchg16b")
  }

  /// No row of the table is hidden by others or lies where the decoder never looks.
  @Test func everyOperationHasAnEncoding() {
    var isReached = [Bool](repeating: false, count: Operation.count)
    isReached[0] = true
    var encodings: [(prefix: [UInt8], mode: CodeMode)] = []
    for map in [[], [0x0f], [0x0f, 0x38], [0x0f, 0x3a]] as [[UInt8]] {
      for prefix in [[], [0x66], [0xf3], [0xf2]] as [[UInt8]] {
        encodings += [(prefix + map, .code16), (prefix + map, .code32), (prefix + map, .code64)]
        encodings.append((prefix + [0x48] + map, .code64))
      }
    }
    encodings.append(([0x67], .code64))
    for map in UInt8(1)...3 {
      // vvvv 1111; W, L and pp in all combinations.
      for fields in UInt8(0)..<16 {
        encodings.append(([0xc4, 0xe0 | map, 0x78 | fields << 4 & 0x80 | fields & 7], .code64))
      }
    }
    for (prefix, mode) in encodings {
      // Whole ModRM bytes are opcodes only in the two oldest maps; elsewhere reg and whether it is memory decide.
      let hasWholeModRM = mode == .code64 && prefix.count < 3 && !prefix.contains(0x48)
      // SIB names index 4, which a gather's destination and mask (0) differ from.
      var bytes = prefix + [0, 0, 0x20] + [UInt8](repeating: 0, count: 12 - prefix.count)
      bytes.withUnsafeMutableBytes { bytes in
        for opcode in UInt8.min ... .max {
          bytes[prefix.count] = opcode
          for modRM in UInt8.min ... .max where hasWholeModRM || (modRM & 7 == 4 && [0, 0xc0].contains(modRM & 0xc0)) {
            bytes[prefix.count + 1] = modRM
            let instruction = try? Instruction(decoding: UnsafeRawBufferPointer(bytes), mode: mode)
            if let instruction { isReached[Int(instruction.operation.rawValue)] = true }
          }
        }
      }
    }
    let missing = isReached.indices.filter { !isReached[$0] }.compactMap { Operation(rawValue: UInt16($0)) }
    #expect(missing.isEmpty)
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
