import Foundation
import Testing

/// `--trace` on the software engine.
@Suite(.enabled(if: VMM.isBuilt, "needs the release build and scripts/build-guests"), .serialized)
struct TraceTests {
  private typealias Line = [String: Any]

  /// A run's traces, by subject, and its report without the host's time.
  private func run(
    _ guest: String, tracing subjects: [String], _ more: String...
  ) throws -> (result: VMM, traces: [String: [Line]], report: Line) {
    let folder = try TemporaryFolder()
    let path = folder.path + "/report.json"
    var arguments = ["run", guest, "--engine", "soft", "--time-limit", "120", "--report", path] + more
    for subject in subjects { arguments += ["--trace", "\(subject):\(folder.path)/\(subject)"] }
    let result = try VMM.run(arguments)
    var traces: [String: [Line]] = [:]
    for subject in subjects {
      let text = try String(contentsOfFile: "\(folder.path)/\(subject)", encoding: .utf8)
      traces[subject] = try text.split(separator: "\n").map { line in
        try #require(try JSONSerialization.jsonObject(with: Data(line.utf8)) as? Line, "\(line)")
      }
    }
    var report = try #require(
      try JSONSerialization.jsonObject(with: Data(contentsOf: URL(fileURLWithPath: path))) as? Line)
    report["wall-seconds"] = nil
    return (result, traces, report)
  }

  private func number(_ line: Line, _ key: String) throws -> UInt64 {
    let text = try #require(line[key] as? String, "\(key) in \(line)")
    return try #require(UInt64(text.dropFirst(2), radix: 16))
  }

  @Test(arguments: [[], ["--deterministic"]]) func instructionsAreAllThereAndFollowEachOther(_ more: [String]) throws {
    let (result, traces, report) =
      more.isEmpty
      ? try run("hello", tracing: ["instructions"]) : try run("hello", tracing: ["instructions"], "--deterministic")
    #expect(result.status == 0, "\(result.errors)")
    let lines = try #require(traces["instructions"])
    #expect(lines.count > 1000)
    #expect(report["instructions"] as? Int == lines.count)
    // The guest meets no interrupts or exceptions: only branches and repetitions lead elsewhere.
    for (line, next) in zip(lines, lines.dropFirst()) {
      let text = try #require(line["text"] as? String)
      let bytes = try #require(line["bytes"] as? String)
      let rip = try number(line, "rip")
      let leaves = ["j", "call", "ret", "iret", "loop", "rep", "int"].contains { text.hasPrefix($0) }
      if !leaves { #expect(try number(next, "rip") == rip + UInt64(bytes.count / 2), "\(line) \(next)") }
    }
    if !more.isEmpty { #expect(lines.enumerated().allSatisfy { $1["ns"] as? Int == $0 }) }
  }

  @Test(arguments: ["smp", "ring3"]) func tracesChangeNothing(_ guest: String) throws {
    let subjects = guest == "smp" ? ["exits", "instructions", "interrupts"] : ["exits", "exceptions", "interrupts"]
    let traced = try run(guest, tracing: subjects, "--deterministic", "--cpus", "2")
    let plain = try run(guest, tracing: [], "--deterministic", "--cpus", "2")
    #expect(traced.result.output == plain.result.output)
    #expect(traced.report as NSDictionary == plain.report as NSDictionary)
    let exits = try #require(traced.report["exits"] as? [String: Int])
    #expect(traced.traces["exits"]?.count == exits.values.reduce(0, +))
  }

  @Test func exceptionsTellWhatHandlersAreTold() throws {
    let lines = try #require(try run("ring3", tracing: ["exceptions"]).traces["exceptions"])
    let vectors = Set(lines.compactMap { $0["vector"] as? Int })
    #expect(vectors.isSuperset(of: [0, 6, 13, 14]), "\(vectors)")
    for line in lines {
      let vector = line["vector"] as? Int
      #expect((line["cr2"] != nil) == (vector == 14), "\(line)")
      #expect((line["error"] != nil) == [8, 10, 11, 12, 13, 14, 17, 21].contains(vector), "\(line)")
      #expect(try number(line, "rip") > 0)
    }
  }

  @Test func theWayToATripleFaultIsThere() throws {
    let folder = try TemporaryFolder()
    // ud2, in protected mode with the empty IDT that a flat binary starts with
    let image = try folder.file("crash.bin", [0x0f, 0x0b])
    let (result, traces, _) = try run(image, tracing: ["exceptions"], "--load-address", "0x100000")
    #expect(result.status == 134)
    let lines = try #require(traces["exceptions"])
    #expect(lines.compactMap { $0["vector"] as? Int } == [6, 13, 8])
    #expect(try lines.map { try number($0, "rip") } == [0x100000, 0x100000, 0x100000])
    // Vector 6 of the IDT, not the program's own doing.
    #expect(lines[1]["error"] as? String == "0x33")
  }

  @Test func interruptsTellWhereTheyComeFrom() throws {
    let lines = try #require(try run("ring3", tracing: ["interrupts"]).traces["interrupts"])
    let sources = Set(lines.compactMap { $0["source"] as? String })
    #expect(sources == ["external", "software"])
    #expect(lines.contains { $0["vector"] as? Int == 3 && $0["source"] as? String == "software" })
    #expect(lines.allSatisfy { $0["source"] as? String == "software" || ($0["vector"] as? Int ?? 0) >= 16 })
  }

  @Test(
    arguments: [
      (
        ["--engine", "kvm", "--trace", "instructions:FILE"],
        "--trace instructions: engine kvm cannot do that; use --engine soft"
      ),
      (
        ["--engine", "kvm", "--trace", "exceptions:FILE"],
        "--trace exceptions: engine kvm cannot do that; use --engine soft"
      ),
      (
        ["--engine", "kvm", "--trace", "interrupts:FILE"],
        "--trace interrupts: engine kvm cannot do that; use --engine soft"
      ),
      (
        ["--trace", "views:FILE"],
        "--trace views:FILE: expected WHAT:FILE with exits, instructions, exceptions or interrupts"
      ),
      (["--trace", "exits:FILE", "--trace", "exits:OTHER"], "--trace exits:OTHER: expected one file for exits"),
    ])
  func whatCannotBeTracedIsSaidInOneLine(_ arguments: [String], error: String) throws {
    let result = try VMM.run(["run", "hello"] + arguments)
    #expect(result.status == 64)
    #expect(result.errors == "swiftvmm: \(error)\n")
  }
}
