import DeviceTesting
import PlatformDevices
import Testing

/// A device under the conformance tests.
struct CatalogueEntry: Sendable, CustomTestStringConvertible {
  var name: String
  /// A battery or the like keeps part of the state over a reset.
  var survivesReset = false
  var make: @Sendable (Fixture) throws -> any PlatformDevice

  var testDescription: String { name }
}

/// Every device; a new one is one line.
let catalogue: [CatalogueEntry] = [
  CatalogueEntry(name: "serial") { Serial16550(name: "serial0", line: $0.line(4), output: $0.output) },
  CatalogueEntry(name: "debug exit") { DebugExit(machine: $0.machine) },
  CatalogueEntry(name: "debug console") { DebugConsole(output: $0.output) },
  CatalogueEntry(name: "i8042") { I8042(line: $0.line(1), machine: $0.machine) },
  CatalogueEntry(name: "reset control") { ResetControl(machine: $0.machine) },
  CatalogueEntry(name: "RTC", survivesReset: true) { fixture in
    RealTimeClock(
      line: fixture.line(8), clock: fixture.clock,
      contents: .init(lowMemory: 1 << 30, highMemory: 1 << 30, cpus: 4), epoch: 1_700_000_000, onAlarm: {})
  },
  CatalogueEntry(name: "ACPI PM") {
    ACPIPowerManagement(line: $0.line(9), clock: $0.clock, machine: $0.machine)
  },
  CatalogueEntry(name: "fw_cfg") {
    FirmwareConfiguration(
      memory: $0.memory, items: [FirmwareConfiguration.Key.cpus: [4, 0]],
      files: [("etc/e820", [UInt8](repeating: 7, count: 300)), ("empty", [])])
  },
]
