import BlockLayer
import Glibc
import Host
import JSON
import Monitor

/// Live snapshots: what the command takes while the guest rests, and how long a guest that writes waits for its slowest
/// request; ours and QEMU's with the same guest in turns.
struct SnapshotBenchmark {
  let runs: Int
  private static let size: UInt64 = 4 << 30
  private static let hasKVM = access("/dev/kvm", R_OK | W_OK) == 0

  /// A peer, or us.
  struct VMM {
    let name: String
    var isOurs = false
    let command: (_ isOnKVM: Bool, _ image: String, _ socket: String, _ append: String) -> [String]
  }

  func measure() throws(Failure) -> BenchTable {
    var table = BenchTable([.init(name: "swiftvmm", unit: "ms", digits: 2), .init(name: "QEMU", unit: "ms", digits: 2)])
    let guest = try GuestCatalogue.path(of: "disk")
    table.notes = [
      "images without the host's cache; the idle VM on \(Self.hasKVM ? "KVM" : "the software engines"), the writer on these"
    ]
    var figures: [[[Double]]] = []
    for vmm in Self.vmms(guest) {
      do {
        figures.append(try idle(vmm) + writing(vmm))
      } catch {
        table.notes.append("\(vmm.name) left out: \(error)")
        figures.append([])
      }
    }
    let names = [
      "blockdev-snapshot-sync, idle VM", "blockdev-snapshot of an open overlay, idle VM",
      "slowest request of a writer at rest", "slowest request of a writer over a snapshot",
    ]
    for (row, name) in names.enumerated() {
      table.add(name, figures.map { row < $0.count && !$0[row].isEmpty ? Samples($0[row]) : nil })
    }
    return table
  }

  /// Both, with the sample guest `disk` at this path.
  static func vmms(_ guest: String) -> [VMM] {
    [
      VMM(name: "swiftvmm", isOurs: true) { isOnKVM, image, socket, append in
        [
          "/proc/self/exe", "run", guest, "--engine", isOnKVM ? "kvm" : "soft", "--memory", "256M", "--disk",
          "\(image),id=d0,cache=none", "--control", "unix:\(socket)", "--append", append,
        ]
      },
      VMM(name: "QEMU") { isOnKVM, image, socket, append in
        [
          "qemu-system-x86_64", "-M", "q35", "-accel", isOnKVM ? "kvm" : "tcg", "-m", "256", "-nodefaults", "-display",
          "none", "-no-reboot", "-serial", "stdio", "-kernel", guest, "-append", append, "-qmp",
          "unix:\(socket),server=on,wait=off", "-blockdev",
          "driver=qcow2,node-name=d0,file.driver=file,file.filename=\(image),file.cache.direct=on", "-device",
          "virtio-blk-pci,drive=d0,disable-legacy=on",
        ]
      },
    ]
  }

  /// A machine with one disk, and a conversation with it; both end with `body`.
  func withMachine<Result>(
    _ vmm: VMM, isOnKVM: Bool, _ append: String, _ body: (inout QMPClient, _ folder: String) throws -> Result
  ) throws -> Result {
    let folder = try TemporaryDirectory()
    let (image, socket) = (folder.path + "/base", folder.path + "/socket")
    try Self.makeImage(image)
    let server = try ServerProcess(
      vmm.command(isOnKVM, image, socket, append), socket: socket, output: folder.path + "/output")
    defer { server.end() }
    var client = try QMPClient.connect(to: .unix(path: socket))
    // The guest has begun by then.
    sleep(2)
    return try body(&client, folder.path)
  }

  static func makeImage(_ path: String) throws(BlockError) {
    try HostFile.create(path)
    let file = try HostFile(path: path, access: FileAccess(writable: true), queue: makeIOQueue())
    defer { file.close() }
    try Qcow2Image.create(Qcow2CreateOptions(size: Self.size), in: file)
  }

  private func timed(_ body: () throws -> Void) throws -> Double {
    let start = monotonicNanoseconds()
    try body()
    return Double(monotonicNanoseconds() - start) / 1e6
  }

  /// A guest that writes a record a second.
  private func idle(_ vmm: VMM) throws -> [[Double]] {
    try withMachine(vmm, isOnKVM: Self.hasKVM, "mode=write passes=1000 records=1000 rate=1 flush=1") { client, folder in
      var synchronous: [Double] = []
      var open: [Double] = []
      var node = "d0"
      for index in 0..<runs {
        let arguments: JSONObject = [
          "node-name": .string(node), "snapshot-file": .string("\(folder)/s\(index)"),
          "snapshot-node-name": .string("s\(index)"), "format": "qcow2",
        ]
        synchronous.append(
          try timed { _ = try client.execute("blockdev-snapshot-sync", arguments) })
        node = "s\(index)"
      }
      for index in 0..<runs {
        try Self.makeImage("\(folder)/o\(index)")
        let layer: JSONObject = [
          "driver": "qcow2", "node-name": .string("o\(index)"), "backing": .null,
          "file": ["driver": "file", "filename": .string("\(folder)/o\(index)"), "cache": ["direct": true]],
        ]
        _ = try client.execute("blockdev-add", layer)
        let arguments: JSONObject = ["node": .string(node), "overlay": .string("o\(index)")]
        open.append(try timed { _ = try client.execute("blockdev-snapshot", arguments) })
        node = "o\(index)"
      }
      return [synchronous, open]
    }
  }

  /// A guest that writes as fast as it can, on an engine on which that is fast, and tells its slowest request every 32 records.
  private func writing(_ vmm: VMM) throws -> [[Double]] {
    let append = "mode=write passes=1000000 records=4096 flush=32 timed=1"
    return try withMachine(vmm, isOnKVM: false, append) { client, folder in
      var node = "d0"
      var rest: [Double] = []
      var over: [Double] = []
      for index in 0..<runs {
        if let time = slowest(in: folder, from: Self.length(of: folder)) { rest.append(time) }
        let start = Self.length(of: folder)
        let arguments: JSONObject = [
          "node-name": .string(node), "snapshot-file": .string("\(folder)/s\(index)"),
          "snapshot-node-name": .string("s\(index)"), "format": "qcow2",
        ]
        _ = try client.execute("blockdev-snapshot-sync", arguments)
        if let time = slowest(in: folder, from: start) { over.append(time) }
        node = "s\(index)"
      }
      return [rest, over]
    }
  }

  static func length(of folder: String) -> Int {
    var status = stat()
    return stat(folder + "/output", &status) == 0 ? Int(status.st_size) : 0
  }

  /// What a machine has printed, from and up to these places; all of it where there is no end.
  static func output(of folder: String, from start: Int, to end: Int? = nil) -> String {
    var bytes = [UInt8](repeating: 0, count: max(0, (end ?? length(of: folder)) - start))
    let file = open(folder + "/output", O_RDONLY)
    let count = pread(file, &bytes, bytes.count, off_t(start))
    close(file)
    return String(decoding: bytes.prefix(max(0, count)), as: UTF8.self)
  }

  /// The guest's slowest requests, in microseconds, of whole lines.
  static func times(_ text: String) -> [Double] {
    text.split(separator: "\n", omittingEmptySubsequences: false).dropLast().compactMap { line -> Double? in
      let words = line.split(separator: " ")
      return words.count == 3 && words[0] == "slowest" ? Double(words[1]) : nil
    }
  }

  /// The longest of what the guest tells in its next two lines, in milliseconds: the second one's time began after the call.
  private func slowest(in folder: String, from start: Int) -> Double? {
    for _ in 0..<500 {
      usleep(10_000)
      let times = Self.times(Self.output(of: folder, from: start))
      if times.count >= 2 { return max(times[0], times[1]) / 1000 }
    }
    return nil
  }
}
