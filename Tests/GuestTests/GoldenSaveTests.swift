import Foundation
import Testing

/// Saved machines that earlier versions of swiftvmm have written go on.
///
/// `Fixtures/saved-VERSION.gz` were written by `swiftvmm save --stop` while the sample guest `ticks` ran on the software
/// engine with two vCPUs and 16 MiB, before its local APIC's ticks, and packed by `gzip -9n`. They are never written again:
/// a version of the file (docs/state.md), of the tree or of a node that changes must go on reading what is in them.
@Suite(.enabled(if: VMM.isBuilt, "needs the release build and scripts/build-guests"))
struct GoldenSaveTests {
  @Test(arguments: ["1", "2", "2-description-3"]) func aSavedMachineOfEachVersionGoesOn(version: String) throws {
    try goOn(version, [])
  }

  /// From version 4 of its description on a machine has its processor's CPUID, which here is one that every host has.
  @Test func aSavedProcessorGoesOn() throws {
    try goOn("2-description-4", ["--cpu", "common"])
  }

  /// With a disk, a network card and an agent's channel.
  @Test func savedDevicesGoOn() throws {
    let folder = try TemporaryFolder()
    // A saved machine goes on with the disks that it names.
    let disk = "/tmp/swiftvmm-golden.raw"
    try Data(count: 1 << 20).write(to: URL(fileURLWithPath: disk))
    defer { unlink(disk) }
    let network = try TestSwitch()
    try goOn(
      "2-description-5",
      [
        "--cpu", "common", "--agent", "--control", "unix:\(folder.path)/control", "--disk",
        "\(disk),format=raw,id=d0", "--net", "switch=\(network.path),id=n0",
      ])
  }

  private func goOn(_ version: String, _ more: [String]) throws {
    let folder = try TemporaryFolder()
    let packed = VMM.checkout + "/Tests/GuestTests/Fixtures/saved-\(version).gz"
    let path = folder.path + "/saved"
    let unpacked = try hostTool("sh", "-c", "gzip -dc '\(packed)' > '\(path)'")
    try #require(unpacked.status == 0, "\(unpacked.output)")
    let result = try VMM.run(
      ["run", "ticks", "--engine", "soft", "--cpus", "2", "--memory", "16M", "--restore", path, "--verify"] + more
        + ["--time-limit", "120"])
    #expect(result.status == 0, "\(result.output) \(result.errors)")
    #expect(result.output.contains("local apic one-shot: ok"), "\(result.output)")
    #expect(result.output.contains("ticks: all passed"), "\(result.output)")
    #expect(!result.output.contains("pit periodic through pic"), "it has begun anew: \(result.output)")
  }
}
