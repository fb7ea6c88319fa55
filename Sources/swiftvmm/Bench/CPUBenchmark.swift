import Boot
import Glibc
import Host
import JSON

/// The guest `cpu` on our software engine, on QEMU's and on Bochs, timed by the host's clock from the line that begins a loop
/// to the one that ends it (Bochs' own time is made of instructions); and the same loops on the physical CPU.
struct CPUBenchmark {
  let runs: Int

  private typealias Rates = [String: [Double]]

  /// What one round does. The slowest takes some seconds on the slowest emulator.
  private static let sizes = [
    ("alu", 10_000_000), ("calls", 30), ("branchy", 2_000_000), ("chase", 65536), ("copy", 65536),
    ("rep-movsq", 65536), ("cr3", 10000),
  ]
  private static let oneRound = sizes.map { "\($0.0)=\($0.1)" }.joined(separator: " ")
  private static let append = oneRound + " milliseconds=500"

  func measure() throws(Failure) -> BenchTable {
    var notes: [String] = []
    let guest = try GuestCatalogue.path(of: "cpu")
    var checksums: [String: String] = [:]
    let ours = try rates(.soft(kernel: guest, append: Self.append), &checksums, &notes)
    let qemu = try rates(.qemu(kernel: guest, append: Self.append), &checksums, &notes)
    let bochs = try bochs(guest, &checksums, &notes)
    var native: Rates = [:]
    do {
      let loops = try NativeLoops()
      for _ in 0..<min(runs, 3) {
        for (name, size) in Self.sizes {
          if let rate = loops.rate(name, size: size) { native[name, default: []].append(rate) }
        }
      }
    } catch {
      throw .host(error)
    }

    var table = BenchTable([
      .init(name: "swiftvmm-soft", unit: "", digits: 2), .init(name: "qemu-tcg", unit: "", digits: 2),
      .init(name: "bochs", unit: "", digits: 2), .init(name: "physical", unit: "", digits: 2),
      .init(name: "soft/qemu", unit: "", digits: 2),
    ])
    for (name, _) in Self.sizes {
      let figures = [ours, qemu, bochs, native].map { $0[name].map { Samples($0) } }
      var ratio: Samples?
      if let ours = figures[0], let qemu = figures[1] { ratio = Samples([ours.median / qemu.median]) }
      table.add(Self.isCopy(name) ? "\(name), GB/s" : name, figures + [ratio])
    }
    table.notes = notes
    return table
  }

  static func isCopy(_ loop: String) -> Bool { loop == "rep-movsq" }

  private func rates(
    _ process: BenchProcess, _ checksums: inout [String: String], _ notes: inout [String]
  ) throws(Failure) -> Rates {
    var rates: Rates = [:]
    for _ in 0..<min(runs, 3) {
      guard let child = try process.run({ notes.append($0) }) else { break }
      for (loop, _) in Self.sizes {
        guard let row = row(loop, child), let begin = child.nanoseconds(until: "{\"begin\":\"\(loop)\"}"),
          let end = child.nanoseconds(until: "{\"loop\":\"\(loop)\""), end > begin,
          let work = row[Self.isCopy(loop) ? "bytes" : "instructions"]?.numberValue
        else {
          notes.append("\(process.name) has no figure for \(loop)")
          continue
        }
        let nanoseconds = Double(end - begin)
        rates[loop, default: []].append(Self.isCopy(loop) ? work / nanoseconds : work / nanoseconds * 1000)
        let checksum = row["checksum"]?.stringValue ?? ""
        if loop != "chase", checksums[loop, default: checksum] != checksum {
          notes.append("\(process.name) computes another checksum for \(loop): \(checksum)")
        }
        checksums[loop] = checksum
      }
    }
    return rates
  }

  private func row(_ loop: String, _ child: ChildProcess) -> JSONValue? {
    String(decoding: child.output, as: UTF8.self).split(whereSeparator: \.isNewline)
      .first { $0.hasPrefix("{\"loop\":\"\(loop)\"") }
      .flatMap { try? JSONValue(parsing: String($0)) }
  }

  /// Debian's Bochs: a build with a debugger, several times slower than an optimised one. It loads no kernels, so the guest
  /// comes on a disk; and its milliseconds are so many instructions, so each loop has one round.
  private func bochs(
    _ guest: String, _ checksums: inout [String: String], _ notes: inout [String]
  ) throws(Failure) -> Rates {
    let roms = ["/usr/share/bochs/BIOS-bochs-latest", "/usr/share/bochs/VGABIOS-lgpl-latest"]
    guard roms.allSatisfy({ access($0, R_OK) == 0 }) else {
      notes.append("bochs left out: Debian's packages bochs, bochsbios and vgabios are not installed")
      return [:]
    }
    let bytes: [UInt8]
    do {
      bytes = try BootDisk.image(kernel: BootImage(path: guest), commandLine: Self.oneRound)
    } catch {
      throw .input("\(error)")
    }
    let disk = try TemporaryFile(bytes)
    let commands = try TemporaryFile(Array("continue\nquit\n".utf8))
    let configuration = try TemporaryFile(
      Array(
        """
        plugin_ctrl: unmapped=1
        config_interface: textconfig
        display_library: rfb, options="timeout=0"
        romimage: file=\(roms[0])
        vgaromimage: file=\(roms[1])
        memory: guest=256, host=256
        cpu: model=corei7_haswell_4770, count=1, ips=100000000, reset_on_triple_fault=0
        ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
        ata0-master: type=disk, mode=flat, path=\(disk.path), cylinders=\(bytes.count / 32768), heads=4, spt=16
        boot: disk
        com1: enabled=1, mode=file, dev=/dev/stdout
        clock: sync=none, time0=1
        log: /dev/null
        panic: action=fatal
        error: action=ignore
        info: action=ignore
        debug: action=ignore
        sound: waveoutdrv=dummy
        speaker: enabled=0

        """.utf8))
    notes.append("bochs: Debian's build, which has a debugger and is several times slower than one without")
    // It ends by a panic when the guest powers off.
    return try rates(
      BenchProcess(
        name: "bochs",
        command: ["timeout", "300", "bochs", "-q", "-f", configuration.path, "-rc", commands.path], statuses: [0, 1]),
      &checksums, &notes)
  }
}
