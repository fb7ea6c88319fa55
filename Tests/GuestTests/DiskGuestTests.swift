import Foundation
import Testing

private let hasQemu: Bool = access("/usr/bin/qemu-img", X_OK) == 0
private let engines: [String] = {
  if VMM.hasKVM { return ["soft", "kvm"] }
  print("the guest disk runs on the software engine only: no /dev/kvm")
  return ["soft"]
}()

/// The guest `disk` on virtio disks: what it wrote is read by qemu-img, what it flushed survives the end of the VMM.
@Suite(
  .enabled(if: VMM.isBuilt && hasQemu, "needs the release build, scripts/build-guests and qemu-utils"), .serialized)
struct DiskGuestTests {
  /// An empty image, made by qemu-img.
  private func image(_ folder: TemporaryFolder, _ name: String, format: String, size: String = "8M") throws -> String {
    let path = folder.path + "/" + name
    let made = try hostTool("qemu-img", "create", "-q", "-f", format, path, size)
    try #require(made.status == 0, "\(made.output)")
    return path
  }

  private func arguments(_ engine: String, _ append: String, _ disks: [String], cpus: Int) -> [String] {
    ["run", "disk", "--engine", engine, "--cpus", "\(cpus)", "--time-limit", "120", "--append", append]
      + disks.flatMap { ["--disk", $0] }
  }

  private func run(_ engine: String, _ append: String, _ disks: String..., cpus: Int = 1) throws -> VMM {
    try VMM.run(arguments(engine, append, disks, cpus: cpus))
  }

  private func passes(_ result: VMM, _ lines: String..., location: SourceLocation = #_sourceLocation) {
    #expect(result.status == 0, "\(result.output) \(result.errors)", sourceLocation: location)
    for line in lines {
      #expect(result.output.contains(line), "\(result.output)", sourceLocation: location)
    }
  }

  /// The image's content as QEMU reads it.
  private func content(_ path: String, format: String) throws -> Data {
    let raw = path + ".content"
    let made = try hostTool("qemu-img", "convert", "-f", format, "-O", "raw", path, raw)
    try #require(made.status == 0, "\(made.output)")
    return try Data(contentsOf: URL(fileURLWithPath: raw), options: .alwaysMapped)
  }

  /// Whether a sector is that of a record, as guests/disk/Record.swift says.
  private func isSector(
    _ data: Data, record: UInt64, sector: UInt64, generation: UInt64, disk: UInt64
  ) -> Bool {
    let start = Int(((record - 1) * 8 + sector) * 512)
    let words = data[(data.startIndex + start)..<(data.startIndex + start + 512)].withUnsafeBytes { bytes in
      (0..<64).map { UInt64(littleEndian: bytes.loadUnaligned(fromByteOffset: $0 * 8, as: UInt64.self)) }
    }
    let place = generation | sector << 32 | disk << 48
    let mixed = record &* 0x9e37_79b9_7f4a_7c15 ^ place &* 0xbf58_476d_1ce4_e5b9
    let sum = mixed ^ mixed >> 29 ^ words[0]
    return words[0] == 0x3143_4552_4b53_4944 && words[1] == record && words[2] == place
      && words[3...].allSatisfy { $0 == sum }
  }

  @Test(arguments: engines, ["raw", "qcow2"])
  func qemuReadsWhatTheGuestWroteAndTheGuestAgain(engine: String, format: String) throws {
    let folder = try TemporaryFolder()
    for queue in ["split", "packed"] {
      let disk = try image(folder, queue, format: format)
      let options = "queue=\(queue) records=200 flush=50"
      passes(
        try run(engine, "mode=write \(options)", disk + ",format=" + format), "\(queue) queue",
        "flushed 200 generation 1", "disk: all passed")
      passes(
        try run(engine, "mode=verify \(options) expect=200", disk + ",format=" + format),
        "found 200 of 200 records, last 200 generation 1")
      let data = try content(disk, format: format)
      let wrong = (UInt64(0)..<1600).first {
        !isSector(data, record: $0 / 8 + 1, sector: $0 % 8, generation: 1, disk: 0)
      }
      #expect(wrong == nil)
      #expect(data[(data.startIndex + 200 * 4096)...].allSatisfy { $0 == 0 })
      if format == "qcow2" {
        let checked = try hostTool("qemu-img", "check", disk)
        #expect(checked.status == 0, "\(checked.output)")
      }
      // The other way: an image that QEMU wrote.
      let copy = folder.path + "/copy"
      #expect(try hostTool("qemu-img", "convert", "-c", "-f", format, "-O", "qcow2", disk, copy).status == 0)
      passes(try run(engine, "mode=verify \(options) expect=200", copy + ",readonly=on"), "found 200 of 200 records")
    }
  }

  @Test(
    arguments: engines,
    [
      "indirect=0", "events=0", "indirect=0 events=0 depth=64", "interrupts=poll", "interrupts=poll events=0",
      "queues=4 depth=64", "sectors=2048 records=16 depth=4", "sectors=1 depth=200",
    ])
  func everyWayToUseAQueue(engine: String, options: String) throws {
    let folder = try TemporaryFolder()
    for queue in ["split", "packed"] {
      let disk = try image(folder, queue, format: "qcow2", size: "16M")
      let append = "queue=\(queue) records=300 \(options)".replacingOccurrences(
        of: "records=300 sectors=2048", with: "sectors=2048")
      passes(try run(engine, "mode=write \(append)", disk, cpus: 4), "disk: all passed")
      passes(try run(engine, "mode=verify \(append)", disk, cpus: 4), "generation 1", "disk: all passed")
    }
  }

  @Test(arguments: engines, ["split", "packed"])
  func twoDisksHoldWhatBelongsToEach(engine: String, queue: String) throws {
    let folder = try TemporaryFolder()
    let first = try image(folder, "first", format: "raw")
    let second = try image(folder, "second", format: "qcow2")
    let options = "disks=2 queue=\(queue) records=300 flush=32"
    passes(try run(engine, "mode=write \(options)", first + ",format=raw", second), "flushed 300 generation 1")
    passes(
      try run(engine, "mode=rewrite passes=3 expect=300 \(options)", first + ",format=raw", second, cpus: 2),
      "found 300 of 300", "flushed 32 generation 2", "flushed 300 generation 4")
    passes(
      try run(engine, "mode=verify expect=300 generation=4 \(options)", first + ",format=raw", second),
      "found 300 of 300 records, last 300 generation 4")
    let contents = [try content(first, format: "raw"), try content(second, format: "qcow2")]
    for disk in UInt64(0)..<2 {
      let wrong = (1...300).first {
        ($0 % 3 == 2 || $0 % 3 == disk)
          && !isSector(contents[Int(disk)], record: $0, sector: 7, generation: 4, disk: disk)
      }
      #expect(wrong == nil, "on disk \(disk)")
    }
    let exchanged = try run(engine, "mode=verify \(options)", second, first + ",format=raw")
    #expect(exchanged.status == 3 && exchanged.output.contains("neither a record nor empty"), "\(exchanged.output)")
  }

  /// A format, how the host's cache is used, and a queue's layout.
  static let ways = [
    ("raw", "writeback", "split"), ("qcow2", "writeback", "packed"), ("qcow2", "none", "split"),
    ("raw", "none", "packed"),
  ]

  /// Kills a case: `SWIFTVMM_KILLS=63` makes more than 500 in all.
  private static let kills = ProcessInfo.processInfo.environment["SWIFTVMM_KILLS"].flatMap(Int.init) ?? 4

  /// The VMM is killed again and again while the guest writes: all that was flushed is there, nothing is torn, and QEMU finds
  /// no corruption.
  @Test(arguments: engines, ways)
  func whatWasFlushedSurvivesAKill(engine: String, way: (format: String, cache: String, queue: String)) throws {
    let folder = try TemporaryFolder()
    let paths = [
      try image(folder, "first", format: way.format), try image(folder, "second", format: way.format),
    ]
    let disks = paths.map { $0 + ",format=\(way.format),cache=\(way.cache)" }
    let options = "disks=2 queue=\(way.queue) records=400 flush=8 depth=16"
    var known = (record: 0, generation: 1)
    for round in 0..<Self.kills {
      let process = Process()
      let output = Pipe()
      process.executableURL = URL(fileURLWithPath: VMM.path)
      process.arguments = arguments(
        engine, "mode=rewrite passes=1000 expect=\(known.record) generation=\(known.generation) \(options)", disks,
        cpus: 1)
      process.standardInput = FileHandle.nullDevice
      process.standardOutput = output
      try process.run()
      var text = ""
      while text.split(separator: "\n").count(where: { $0.hasPrefix("flushed") }) < 3 + round % 4 * 7 {
        let data = output.fileHandleForReading.availableData
        if data.isEmpty { break }
        text += String(decoding: data, as: UTF8.self)
      }
      // Between two flushes too.
      if round >= 4 { usleep(.random(in: 0..<20_000)) }
      kill(process.processIdentifier, SIGKILL)
      text += String(decoding: output.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
      process.waitUntilExit()
      #expect(process.terminationStatus == SIGKILL, "\(text)")
      // The last line may be cut off.
      let whole = text.split(separator: "\n", omittingEmptySubsequences: false).dropLast()
      let last = try #require(whole.last { $0.hasPrefix("flushed") }, "\(text)").split(separator: " ")
      known = (try #require(Int(last[1])), try #require(Int(last[3])))
      for path in paths where way.format == "qcow2" {
        // QEMU does not wait until the kernel has ended the dead process's transfers.
        try #require(hostTool(VMM.path, "disk", "info", path).status == 0)
        // Leaked clusters are no corruption.
        let checked = try hostTool("qemu-img", "check", path)
        #expect(checked.status == 0 || checked.status == 3, "\(checked.output)")
      }
    }
    let verified = try VMM.run(
      arguments(
        engine, "mode=verify expect=\(known.record) generation=\(known.generation) \(options)", disks, cpus: 1))
    passes(verified, "disk: all passed")
  }

  @Test(arguments: engines) func aRateIsKept(engine: String) throws {
    let folder = try TemporaryFolder()
    let disk = try image(folder, "disk", format: "qcow2")
    let clock = ContinuousClock()
    let taken = try clock.measure {
      passes(try run(engine, "mode=write records=100 rate=100", disk), "flushed 100 generation 1")
    }
    // The last record is due 0.99 s after the first.
    #expect(taken > .milliseconds(980))
  }

  @Test func damageIsFound() throws {
    let folder = try TemporaryFolder()
    let path = try image(folder, "disk", format: "raw")
    let disk = path + ",format=raw"
    let empty = try run("soft", "mode=verify", disk)
    passes(empty, "found 0 of 256 records, last 0 generation 0")
    let missing = try run("soft", "mode=verify expect=1", disk)
    #expect(missing.status == 3)
    #expect(missing.output.contains("FAIL disk 0 record 1: generation 0 to 0, not 1 to 0"), "\(missing.output)")
    passes(try run("soft", "mode=write", disk))
    let file = try FileHandle(forUpdating: URL(fileURLWithPath: path))
    func poke(_ offset: UInt64, _ bytes: [UInt8]) throws {
      try file.seek(toOffset: offset)
      try file.write(contentsOf: Data(bytes))
    }
    // A record of the last interval may be missing; one before it may not.
    try poke(255 * 4096, [UInt8](repeating: 0, count: 512))
    passes(try run("soft", "mode=verify", disk), "found 255 of 256 records")
    try poke(99 * 4096 + 512, [UInt8](repeating: 0, count: 512))
    let zeroed = try run("soft", "mode=verify", disk)
    #expect(zeroed.status == 3)
    #expect(zeroed.output.contains("FAIL disk 0 record 100: generation 0 to 1, not 1 to 1"), "\(zeroed.output)")
    try poke(41 * 4096 + 700, [1])
    let damaged = try run("soft", "mode=verify", disk)
    #expect(damaged.status == 3)
    #expect(damaged.output.contains("FAIL disk 0 record 42: it is neither a record nor empty"), "\(damaged.output)")
  }

  @Test func aReadOnlyDiskRefusesToBeWritten() throws {
    let folder = try TemporaryFolder()
    let disk = try image(folder, "disk", format: "qcow2")
    let refused = try run("soft", "mode=write", disk + ",readonly=on")
    #expect(refused.status == 3)
    #expect(refused.output.contains("FAIL disk 0 record 1: the device answers status 1"), "\(refused.output)")
    #expect(try hostTool("qemu-io", "-c", "read -P 0 0 8M", disk).status == 0)
  }

  /// The host's file system fills up: by default the machine stops, and loses nothing when there is room again.
  @Test(.enabled(if: getuid() == 0, "needs root, to mount a small tmpfs"), arguments: engines, ["raw", "qcow2"])
  func aFullHostStopsTheMachine(engine: String, format: String) throws {
    let folder = try TemporaryFolder()
    let small = folder.path + "/small"
    try FileManager.default.createDirectory(atPath: small, withIntermediateDirectories: true)
    let mounted = try hostTool("mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", small)
    try #require(mounted.status == 0, "\(mounted.output)")
    defer { _ = try? hostTool("umount", "-l", small) }
    let disk = small + "/disk"
    #expect(try hostTool("qemu-img", "create", "-q", "-f", format, disk, "8M").status == 0)
    let socket = folder.path + "/control"
    let process = Process()
    let output = Pipe()
    process.executableURL = URL(fileURLWithPath: VMM.path)
    process.arguments =
      arguments(engine, "mode=write records=1000 flush=10 depth=16", ["\(disk),format=\(format)"], cpus: 1)
      + ["--control", "unix:\(socket)"]
    process.standardInput = FileHandle.nullDevice
    process.standardOutput = output
    try process.run()
    func status() throws -> String { try hostTool(VMM.path, "ctl", "unix:\(socket)", "query-status").output }
    while process.isRunning, try !status().contains("io-error") { usleep(20_000) }
    try #require(process.isRunning, "\(output.fileHandleForReading.availableData)")
    // Again, while there still is no room.
    #expect(try hostTool(VMM.path, "ctl", "unix:\(socket)", "cont").status == 0)
    while process.isRunning, try !status().contains("io-error") { usleep(20_000) }
    try #require(process.isRunning)
    #expect(try hostTool("mount", "-o", "remount,size=64M", small).status == 0)
    #expect(try hostTool(VMM.path, "ctl", "unix:\(socket)", "cont").status == 0)
    let text = String(decoding: output.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
    process.waitUntilExit()
    #expect(process.terminationStatus == 0 && text.contains("disk: all passed"), "\(text)")
    passes(try run(engine, "mode=verify records=1000 flush=10 expect=1000", "\(disk),format=\(format)"))
    if format == "qcow2" { #expect(try hostTool("qemu-img", "check", disk).status == 0) }

    // With werror=report the guest hears of it.
    #expect(try hostTool("mount", "-o", "remount,size=12M", small).status == 0)
    let second = small + "/second"
    #expect(try hostTool("qemu-img", "create", "-q", "-f", format, second, "16M").status == 0)
    let reported = try run(
      engine, "mode=write records=4000 flush=10 depth=16", "\(second),format=\(format),werror=report")
    #expect(reported.status == 3 && reported.output.contains("the device answers status 1"), "\(reported.output)")
    if format == "qcow2" {
      let checked = try hostTool("qemu-img", "check", second)
      #expect(checked.status == 0 || checked.status == 3, "\(checked.output)")
    }
  }
}
