import Accelerator
import GuestMemory
import Host
import JSON
import Machine

/// `--report`: what the run was, as JSON.
struct RunReport {
  let json: JSONValue

  init(_ machine: Machine, engine: String, outcome: Outcome, started: UInt64) {
    let wall = Double(monotonicNanoseconds() - started) / 1e9
    var report: JSONObject = [
      "version": .string(Version.text), "engine": .string(engine), "outcome": .string(outcome.name),
      "status": JSONValue(outcome.status), "wall-seconds": .number(wall),
      "memory-bytes": JSONValue(machine.memory.size), "cpus": JSONValue(machine.vcpus.count),
    ]
    var total = JSONObject()
    for reason in ExitCounters.Reason.allCases {
      let count = machine.counters.reduce(0) { $0 + $1[reason] }
      if count > 0 { total[reason.name] = JSONValue(count) }
    }
    report["exits"] = .object(total)
    report["exits-by-vcpu"] = .array(machine.counters.map { JSONValue($0.total) })
    if case .crashed(let crash) = outcome {
      var fields: JSONObject = [
        "reason": .string(crash.reason.name), "vcpu": JSONValue(crash.vcpu),
        "rip": .string("0x" + String(crash.general.rip, radix: 16)),
        "lines": .array(crash.lines.map { .string($0) }),
      ]
      if let instruction = crash.instruction { fields["instruction"] = .string(instruction) }
      report["crash"] = .object(fields)
    }
    json = .object(report)
  }
}
