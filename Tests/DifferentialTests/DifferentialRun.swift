import CSoftCPU
import NativeProcess
import X86

@testable import SoftAccelerator

/// Batches of cases for both CPUs, and what came of them.
final class DifferentialRun {
  private(set) var mismatches = 0
  private(set) var compared = 0
  private(set) var faults = 0
  var rowsCompared: Int { counts.count { $0 > 0 } }
  var rows: Int { generator.operations.count }

  private let mode: CodeMode
  private let seed: UInt64
  private let arena: UnsafeMutablePointer<native_arena>
  private let child: Int32
  private let soft: SoftSide
  private var generator: CaseGenerator
  private var instructions = [[Instruction]](repeating: [], count: 2)
  private var counts = [Int](repeating: 0, count: X86.Operation.count)
  private var reports: [String: (count: Int, samples: [String])] = [:]
  private var excluded: [String: Set<String>] = [:]

  struct ChildEnded: Error {
    var status: Int32
    var seed: UInt64
  }

  /// nil, with the reason printed, where the host cannot tell.
  init?(mode: CodeMode, seed: UInt64, only: Set<String>?) {
    self.mode = mode
    self.seed = seed
    var pid: Int32 = 0
    var reason: UnsafePointer<CChar>?
    guard let started = native_start(&pid, &reason) else {
      print("skipped: \(reason.map { String(cString: $0) } ?? "?")")
      return nil
    }
    arena = started
    child = pid
    soft = SoftSide(mode: mode)
    var random = Random(state: seed)
    CaseGenerator.makeData(&random, native_data(arena))
    soft.setData(native_data(arena))
    let features = soft.processor.features
    var excluded: [String: Set<String>] = [:]
    generator = CaseGenerator(mode: mode, seed: seed, data: native_data(arena)) { operation in
      guard operation != .invalid else { return false }
      if let only { return only.contains(operation.mnemonic.text) }
      let reason =
        features.has(operation.feature) ? Freedom.exclusion(operation) : "the software CPU has no \(operation.feature)"
      if let reason { excluded[reason, default: []].insert(operation.mnemonic.text) }
      return reason == nil
    }
    self.excluded = excluded
  }

  deinit { native_stop(arena, child) }

  /// Runs them, half of the memory at a time: the child executes one batch while the other is compared.
  func run(cases: Int) throws {
    let batches = (cases + Int(NATIVE_CASES) - 1) / Int(NATIVE_CASES)
    for batch in 1...batches + 1 {
      if batch <= batches { make(batch) }
      if batch > 1 {
        let status = native_await(arena, child, UInt32(batch - 1))
        guard status == 0 else { throw ChildEnded(status: status, seed: seed) }
      }
      if batch <= batches { native_submit(arena, UInt32(batch), UInt32(NATIVE_CASES)) }
      if batch > 1 { compare(batch - 1) }
    }
  }

  private func make(_ batch: Int) {
    let cases = native_cases(arena, batch)
    let features = soft.processor.features
    instructions[batch & 1].removeAll(keepingCapacity: true)
    for index in 0..<Int(NATIVE_CASES) {
      let instruction = generator.make(cases + index) {
        features.has($0.feature) && Freedom.exclusion($0) == nil
      }
      instructions[batch & 1].append(instruction)
    }
  }

  private func compare(_ batch: Int) {
    let cases = native_cases(arena, batch)
    let results = native_results(arena, batch)
    var result = native_result()
    for index in 0..<Int(NATIVE_CASES) {
      let instruction = instructions[batch & 1][index]
      soft.run(cases + index, before: native_data(arena), &result)
      compared += 1
      counts[Int(instruction.operation.rawValue)] += 1
      if result.vector != 1 { faults += 1 }
      let differences = Comparison.differences(instruction, cases + index, &result, results + index)
      if !differences.isEmpty { report(instruction, cases + index, differences) }
    }
  }

  private func report(_ i: Instruction, _ c: UnsafeMutablePointer<native_case>, _ differences: String) {
    mismatches += 1
    var entry = reports[i.operation.mnemonic.text] ?? (0, [])
    entry.count += 1
    if entry.samples.count < 4 {
      let bytes = (0..<Int(i.length)).map { Comparison.hex(UInt64(native_code(c)[$0])) }.joined(separator: " ")
      let before = Comparison.state(i, &c.pointee.registers)
      entry.samples.append("    \(bytes): \(i.text(at: c.pointee.registers.rip)) [\(before)]\(differences)")
    }
    reports[i.operation.mnemonic.text] = entry
  }

  var summary: String {
    var text =
      "\(mode), seed \(seed): \(compared) cases of \(rowsCompared) rows of \(rows), \(faults) faults, "
      + "\(mismatches) mismatches"
    for (reason, names) in excluded.sorted(by: { $0.key < $1.key }) {
      text += "\n  not compared, \(reason): \(names.sorted().joined(separator: " "))"
    }
    for (name, entry) in reports.sorted(by: { $0.value.count > $1.value.count }) {
      text += "\n  \(name): \(entry.count)\n" + entry.samples.joined(separator: "\n")
    }
    for operation in generator.operations where counts[Int(operation.rawValue)] == 0 {
      text += "\n  never: \(operation)"
    }
    return text
  }
}
