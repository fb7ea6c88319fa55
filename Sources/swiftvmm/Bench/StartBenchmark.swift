import Glibc
import Host

/// Whole processes from start to end: the smallest guest (a ROM whose first instructions write the debug-exit port),
/// the hello guest, more memory; beside QEMU with the same ROM.
struct StartBenchmark {
  let runs: Int

  func measure() throws(Failure) -> BenchTable {
    var table = BenchTable([
      .init(name: "wall", unit: "ms", digits: 2), .init(name: "cpu", unit: "ms", digits: 2),
      .init(name: "resident", unit: "MiB", digits: 1),
    ])
    let file = try TemporaryFile(Self.rom)
    let rom = file.path
    let hello = try GuestCatalogue.path(of: "hello")
    let ours = ["/proc/self/exe", "run", "--engine", "kvm", "--serial", "none"]
    try add(&table, "/bin/true", ["/bin/true"], status: 0)
    try add(&table, "swiftvmm --version", ["/proc/self/exe", "--version"], status: 0)
    try add(&table, "swiftvmm kvm, smallest", ours + ["--firmware", rom], status: 33)
    for size in ["1G", "4G", "16G"] {
      try add(&table, "swiftvmm kvm, \(size)", ours + ["--firmware", rom, "--memory", size], status: 33)
    }
    try add(&table, "swiftvmm kvm, hello", ours + [hello], status: 0)
    for (engine, size) in [("kvm", nil), ("kvm", "16G"), ("tcg", nil)] as [(String, String?)] {
      let peer = [
        "qemu-system-x86_64", "-M", "microvm", "-accel", engine, "-m", size ?? "256M", "-nodefaults", "-display",
        "none",
        "-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-bios", rom,
      ]
      try add(&table, "qemu microvm \(engine), \(size ?? "smallest")", peer, status: 33)
    }
    return table
  }

  private func add(
    _ table: inout BenchTable, _ name: String, _ command: [String], status: Int32
  ) throws(Failure) {
    var wall: [Double] = []
    var cpu: [Double] = []
    var resident: [Double] = []
    do throws(HostError) {
      for round in 0...runs {
        let child = try ChildProcess.run(command)
        guard child.status == status else {
          table.notes.append("\(name) left out: it exited with \(child.status) instead of \(status)")
          return
        }
        guard round > 0 else { continue }
        wall.append(Double(child.wallNanoseconds) / 1e6)
        cpu.append(Double(child.cpuMicroseconds) / 1e3)
        resident.append(Double(child.maximumResidentKiB) / 1024)
      }
    } catch .path(_, _, ENOENT) {
      table.notes.append("\(name) left out: \(command[0]) is not installed")
      return
    } catch {
      throw .host(error)
    }
    table.add(name, [Samples(wall), Samples(cpu), Samples(resident)])
  }

  /// 64 KiB of HLT whose reset vector writes 0x10 to port 0xf4: exit status 33 on both VMMs.
  private static let rom: [UInt8] =
    [UInt8](repeating: 0xf4, count: 0xfff0) + [0xb0, 0x10, 0xe6, 0xf4] + [UInt8](repeating: 0xf4, count: 12)
}
