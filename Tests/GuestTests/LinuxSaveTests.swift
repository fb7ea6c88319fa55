import Foundation
import Testing

private let linux = VMM.checkout + "/build/linux/"
private let isFetched: Bool = ["vmlinuz", "initramfs.gz"].allSatisfy { access(linux + $0, R_OK) == 0 }

/// Debian's kernel, saved while it works.
@Suite(
  .enabled(if: isFetched, "needs scripts/fetch-linux"),
  .enabled(if: VMM.isBuilt, "needs the release build and scripts/build-guests"), .serialized)
struct LinuxSaveTests {
  /// Its ACPI interpreter runs the method of the generation's event in each copy, which finds an id of its own; nothing of the kind comes to
  /// the machine that was saved, nor where it moves.
  @Test(arguments: [1, 2]) func eachCopyIsToldOfItsID(cpus: Int) throws {
    let folder = try TemporaryFolder()
    let file = folder.path + "/saved"
    let look = "dd if=/dev/mem bs=16 skip=$((0xef000 / 16)) count=1 2>/dev/null | hexdump -C | head -n 1"
    let commands = [
      "cat /sys/bus/acpi/devices/SWVM0001:00/modalias", "dd if=/dev/urandom of=/tmp/a bs=1k count=2048 2>/dev/null",
      "md5sum /tmp/a > /tmp/sum",
      "while md5sum -c /tmp/sum > /tmp/log && read n rest < /sys/firmware/acpi/interrupts/gpe05; do echo id $(\(look)) events $n.; done",
      "echo BROKEN",
    ]
    let arguments = [
      linux + "vmlinuz", "--initrd", linux + "initramfs.gz", "--engine", "soft", "--cpus", "\(cpus)", "--memory",
      "256M",
      "--time-limit", "300", "--append", "console=ttyS0 quiet virtio run=\"\(commands.joined(separator: "; "))\"",
    ]
    /// The id that Linux reads, which is what the control socket says.
    func id(_ machine: RunningVMM, events: Int) throws -> String {
      #expect(machine.waitFor("events \(events).", count: 2), "\(machine.text)")
      let line = machine.text.split(whereSeparator: \.isNewline).last { $0.hasPrefix("id ") && $0.hasSuffix(".") }
      let words = try #require(line).split(separator: " ")
      #expect(words.last == "\(events)." && !machine.text.contains("BROKEN"), "\(machine.text)")
      let bytes = words[2..<18].map(String.init)
      let guid = [[3, 2, 1, 0], [5, 4], [7, 6], [8, 9], [10, 11, 12, 13, 14, 15]]
        .map { $0.map { bytes[$0] }.joined() }.joined(separator: "-")
      let told = try #require(try machine.execute("query-vm-generation-id") as? [String: String])
      #expect(told["guid"] == guid)
      return guid
    }
    let machine = try RunningVMM(arguments)
    let own = try id(machine, events: 0)
    #expect(machine.text.contains("VM_GEN_COUNTER"), "\(machine.text)")
    try machine.execute("x-swiftvmm-save", ["file": file])
    #expect(try id(machine, events: 0) == own)
    let uri = "unix:\(folder.path)/move"
    let next = try RunningVMM(arguments + ["--incoming", uri])
    #expect(try hostTool(VMM.path, "migrate", machine.socket, uri).status == 0)
    #expect(try id(next, events: 0) == own)
    let copies = try (0..<2).map { _ in try id(RunningVMM(arguments + ["--restore", file]), events: 1) }
    #expect(Set(copies + [own]).count == 3)
  }
}
