import Foundation
import NativeProcess
import SoftAccelerator
import Testing
import X86

/// Random instructions and states of all user-mode rows of the opcode table, on the physical CPU and on the software
/// one: registers, defined flags, vectors, memory and faults must agree.
///
/// DIFFERENTIAL_SEED is another run's seed, DIFFERENTIAL_CASES is the number of cases, DIFFERENTIAL_ONLY names mnemonics.
@Suite(.serialized)
struct DifferentialTests {
  private static let environment = ProcessInfo.processInfo.environment
  private static let seed = environment["DIFFERENTIAL_SEED"].flatMap { UInt64($0) } ?? 1
  private static let cases = environment["DIFFERENTIAL_CASES"].flatMap { Int($0) } ?? 200_000
  private static let only = environment["DIFFERENTIAL_ONLY"].map { Set($0.split(separator: ",").map(String.init)) }

  @Test(arguments: [CodeMode.code64, .code32])
  func everyRow(mode: CodeMode) throws {
    guard let run = DifferentialRun(mode: mode, seed: Self.seed, only: Self.only) else { return }
    try run.run(cases: Self.cases / 2)
    print(run.summary)
    #expect(run.mismatches == 0, "seed \(Self.seed)")
    #expect(run.compared > Self.cases / 2 * 9 / 10)
    // Every row that can be generated was.
    if Self.cases >= 100_000, Self.only == nil { #expect(run.rowsCompared == run.rows) }
  }
}
