import Accelerator
import Boot
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
    if let boot = machine.booted { report["boot"] = Self.boot(boot) }
    var total = JSONObject()
    for reason in ExitCounters.Reason.allCases {
      let count = machine.counters.reduce(0) { $0 + $1[reason] }
      if count > 0 { total[reason.name] = JSONValue(count) }
    }
    report["exits"] = .object(total)
    report["exits-by-vcpu"] = .array(machine.counters.map { JSONValue($0.total) })
    let instructions = machine.vcpus.compactMap(\.instructions)
    if !instructions.isEmpty { report["instructions"] = JSONValue(instructions.reduce(0, &+)) }
    if let time = machine.virtualTime { report["virtual-nanoseconds"] = JSONValue(time) }
    if case .crashed(let crash) = outcome {
      var fields: JSONObject = [
        "reason": .string(crash.reason.name), "vcpu": JSONValue(crash.vcpu),
        "rip": .string(Self.hexadecimal(crash.general.rip)),
        "lines": .array(crash.lines.map { .string($0) }),
      ]
      if let instruction = crash.instruction { fields["instruction"] = .string(instruction) }
      report["crash"] = .object(fields)
    }
    json = .object(report)
  }

  private static func boot(_ boot: BootEntry) -> JSONValue {
    let parts = boot.placements.map { placement -> JSONValue in
      [
        "part": .string("\(placement.part)"), "address": .string(hexadecimal(placement.range.start.rawValue)),
        "bytes": JSONValue(placement.range.size),
      ]
    }
    return [
      "kind": .string(boot.kind?.rawValue ?? "firmware"), "entry": .string(hexadecimal(boot.general.rip)),
      "placements": .array(parts),
    ]
  }

  private static func hexadecimal(_ value: UInt64) -> String { "0x" + String(value, radix: 16) }
}
