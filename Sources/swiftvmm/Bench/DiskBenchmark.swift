import BlockLayer
import Glibc
import Host

/// Work on images as whole commands, ours and qemu-img's in turns, on the same files.
struct DiskBenchmark {
  let runs: Int
  private static let mebibytes: UInt64 = 1024
  private static let layers = 6

  func measure() throws(Failure) -> BenchTable {
    var table = BenchTable([
      .init(name: "swiftvmm", unit: "ms", digits: 0), .init(name: "qemu-img", unit: "ms", digits: 0),
    ])
    let folder = try TemporaryDirectory()
    let images: ScatteredImages
    do throws(BlockError) { images = try ScatteredImages(in: folder.path) } catch { throw .disk(error) }
    func path(_ name: String) -> String { "\(folder.path)/\(name)" }
    let (raw, chain, copy, overlay) = (path("raw"), path("l5"), path("copy"), path("overlay"))
    let remove = { _ = unlink(copy) }
    try add(&table, "flatten 6 images to raw", ["convert", "-q", "-O", "raw", chain, copy], before: remove)
    try add(&table, "flatten 6 images to qcow2", ["convert", "-q", "-O", "qcow2", chain, copy], before: remove)
    try add(
      &table, "convert raw to qcow2", ["convert", "-q", "-f", "raw", "-O", "qcow2", raw, copy], before: remove)
    remove()
    try add(&table, "map", ["map", "--output", "json", chain])
    try add(&table, "compare raw with qcow2", ["compare", "-q", raw, path("base")])
    try add(&table, "commit 32 MiB", ["commit", "-q", overlay]) { () throws(BlockError) in
      try images.makeLayer(4, as: "below", over: "l3")
      try images.makeLayer(5, as: "overlay", over: "below")
    }
    try add(
      &table, "safe rebase over two layers less", ["rebase", "-b", path("l2"), "-F", "qcow2", overlay]
    ) { () throws(BlockError) in
      try images.makeLayer(5, as: "overlay", over: "l4")
    }
    return table
  }

  /// The same bytes in a raw file and, a mebibyte in turn, in the layers c0 to c5.
  static func makeImages(_ folder: String) throws(BlockError) {
    let queue = try makeIOQueue()
    let buffer = DiskBuffer(count: 1 << 20)
    var generator = SystemRandomNumberGenerator()
    for index in 0..<(1 << 17) {
      buffer.start.storeBytes(of: generator.next(), toByteOffset: index * 8, as: UInt64.self)
    }
    func write(_ chain: BlockChain, _ indices: StrideTo<UInt64>) throws(BlockError) {
      for index in indices {
        buffer.start.storeBytes(of: index, as: UInt64.self)
        try chain.top.perform(.write, at: index << 20, memory: buffer.bytes, on: queue)
      }
      try chain.close()
    }
    let access = FileAccess(writable: true)
    try HostFile.create("\(folder)/raw", length: Self.mebibytes << 20)
    try write(
      BlockChain(path: "\(folder)/raw", format: .raw, access: access, queue: queue),
      stride(from: 0, to: Self.mebibytes, by: 1))
    for layer in 0..<Self.layers {
      try makeLayer("\(folder)/c\(layer)", over: layer == 0 ? nil : "c\(layer - 1)", queue)
      try write(
        BlockChain(path: "\(folder)/c\(layer)", access: access, queue: queue),
        stride(from: UInt64(layer), to: Self.mebibytes, by: Self.layers))
    }
  }

  static func makeLayer(
    _ path: String, over backing: String?, extendedL2: Bool = false, _ queue: any IOQueue
  ) throws(BlockError) {
    var options = Qcow2CreateOptions(size: Self.mebibytes << 20)
    options.extendedL2 = extendedL2
    options.backingName = backing
    options.backingFormat = backing == nil ? nil : "qcow2"
    try HostFile.create(path)
    let file = try HostFile(path: path, access: FileAccess(writable: true), queue: queue)
    defer { file.close() }
    try Qcow2Image.create(options, in: file)
  }

  private func add(
    _ table: inout BenchTable, _ name: String, _ arguments: [String],
    before prepare: () throws(BlockError) -> Void = {}
  ) throws(Failure) {
    var figures: [[Double]] = [[], []]
    var note = ""
    let programs = [(index: 0, command: ["/proc/self/exe", "disk"]), (index: 1, command: ["qemu-img"])]
    for run in 0..<min(runs, 9) {
      // Whoever begins finds memory that the host has taken back meanwhile: each does in turn.
      let order = run % 2 == 0 ? programs : programs.reversed()
      for (index, program) in order where note.isEmpty || index == 0 {
        do throws(BlockError) { try prepare() } catch { throw .disk(error) }
        // Else one command would wait for what the one before has written.
        sync()
        let process = BenchProcess(name: program[0], command: program + arguments)
        let child = try process.run { note = $0 }
        if let child { figures[index].append(Double(child.wallNanoseconds) / 1e6) }
      }
    }
    table.add(name, figures.map { $0.isEmpty ? nil : Samples($0) }, note: note)
  }
}

/// A folder in /tmp that goes away with its owner, with the files in it.
struct TemporaryDirectory: ~Copyable {
  let path: String

  init() throws(Failure) {
    var template = Array("/tmp/swiftvmm-bench-XXXXXX".utf8CString)
    let made = mkdtemp(&template)
    path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    guard made != nil else { throw .output(path: path, reason: HostError.reason(errno)) }
  }

  deinit {
    if let folder = opendir(path) {
      while let entry = readdir(folder) {
        let name = withUnsafeBytes(of: &entry.pointee.d_name) { bytes in
          String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
        }
        unlink("\(path)/\(name)")
      }
      closedir(folder)
    }
    rmdir(path)
  }
}
