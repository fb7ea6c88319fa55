import BlockLayer
import Glibc
import Host

/// Requests of 4 KiB all over an image, without the host's cache: ours in this process, QEMU's by `qemu-img bench`, in turns,
/// on the same files. Each request is 1 MiB and 4 KiB behind the one before, around the disk's end.
struct DiskRequestsBenchmark {
  let runs: Int
  private static let size: UInt64 = 1 << 30
  private static let count = 8000
  private static let requestSize: UInt64 = 4096
  private static let step: UInt64 = 1_052_672
  private static let depths = [1, 32]

  /// One row's image, and how it is made anew before each run.
  private struct Subject {
    var name: String
    var path: String
    var format: ImageFormat
    var isWrite: Bool
    var depth: Int
    var backing: String?
  }

  func measure() throws(Failure) -> BenchTable {
    var table = BenchTable([
      .init(name: "swiftvmm", unit: "k/s", digits: 1), .init(name: "qemu-img", unit: "k/s", digits: 1),
    ])
    let folder = try TemporaryDirectory()
    do throws(BlockError) {
      try DiskBenchmark.makeImages(folder.path)
    } catch {
      throw .disk(error)
    }
    for isWrite in [false, true] {
      for depth in Self.depths {
        let what = "\(isWrite ? "write" : "read") depth \(depth)"
        for (name, path, format, backing) in [
          ("raw", "raw", ImageFormat.raw, nil), ("qcow2, 6 layers", "c5", .qcow2, nil),
          ("fresh overlay over 6 layers", "fresh", .qcow2, "c5"),
        ] as [(String, String, ImageFormat, String?)] {
          let subject = Subject(
            name: "\(name), \(what)", path: "\(folder.path)/\(path)", format: format, isWrite: isWrite, depth: depth,
            backing: backing)
          try add(&table, subject, in: folder.path)
        }
      }
    }
    return table
  }

  private func add(_ table: inout BenchTable, _ subject: Subject, in folder: String) throws(Failure) {
    var figures: [[Double]] = [[], []]
    var note = ""
    for _ in 0..<runs {
      try prepare(subject, in: folder, extendedL2: true)
      do throws(BlockError) { figures[0].append(try measure(subject)) } catch { throw .disk(error) }
      guard note.isEmpty else { continue }
      try prepare(subject, in: folder)
      if let rate = try peer(subject, { note = $0 }) { figures[1].append(rate) }
    }
    table.add(subject.name, figures.map { $0.isEmpty ? nil : Samples($0) }, note: note)
  }

  /// An overlay is as each side's `blockdev-snapshot-sync` makes it: ours has extended L2 entries.
  private func prepare(_ subject: Subject, in folder: String, extendedL2: Bool = false) throws(Failure) {
    if let backing = subject.backing {
      unlink(subject.path)
      do throws(BlockError) {
        try DiskBenchmark.makeLayer(subject.path, over: backing, extendedL2: extendedL2, makeIOQueue())
      } catch {
        throw .disk(error)
      }
    }
    sync()
    // A host's cache that is not to be used must not be in the way either.
    for name in ["raw", "c0", "c1", "c2", "c3", "c4", "c5", "fresh"] {
      let file = open("\(folder)/\(name)", O_RDONLY)
      guard file >= 0 else { continue }
      posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED)
      close(file)
    }
  }

  /// Thousand requests a second.
  private func measure(_ subject: Subject) throws(BlockError) -> Double {
    let queue = try makeIOQueue()
    let access = FileAccess(writable: subject.isWrite, direct: true)
    let chain = try BlockChain(path: subject.path, format: subject.format, access: access, queue: queue)
    let started = monotonicNanoseconds()
    let load = Load(chain.top, depth: subject.depth, isWrite: subject.isWrite)
    try load.run(queue)
    let nanoseconds = monotonicNanoseconds() - started
    try chain.close()
    return Double(Self.count) * 1e6 / Double(nanoseconds)
  }

  /// Keeps `depth` requests under way.
  private final class Load {
    private let node: any BlockNode
    private var requests: [BlockRequest] = []
    private let buffer: DiskBuffer
    private var started = 0
    private var ended = 0
    private var failure: BlockError?

    init(_ node: any BlockNode, depth: Int, isWrite: Bool) {
      self.node = node
      buffer = DiskBuffer(count: depth * Int(DiskRequestsBenchmark.requestSize), zeroed: true)
      for slot in 0..<depth {
        let request = BlockRequest(isWrite ? .write : .read, length: DiskRequestsBenchmark.requestSize) { _ in }
        request.memory.append(
          buffer.start + slot * Int(DiskRequestsBenchmark.requestSize), Int(DiskRequestsBenchmark.requestSize))
        requests.append(request)
      }
      for request in requests {
        request.completion = { [unowned self, unowned request] error in
          ended += 1
          if failure == nil { failure = error }
          begin(request)
        }
      }
    }

    func run(_ queue: any IOQueue) throws(BlockError) {
      for request in requests { begin(request) }
      queue.run { ended == DiskRequestsBenchmark.count }
      if let failure { throw failure }
    }

    private func begin(_ request: BlockRequest) {
      guard started < DiskRequestsBenchmark.count else { return }
      request.offset = UInt64(started) * DiskRequestsBenchmark.step % DiskRequestsBenchmark.size
      started += 1
      node.submit(request)
    }
  }

  private func peer(_ subject: Subject, _ note: (String) -> Void) throws(Failure) -> Double? {
    let command =
      [
        "qemu-img", "bench", "-c", "\(Self.count)", "-d", "\(subject.depth)", "-f", subject.format.rawValue, "-t",
        "none",
        "-n", "-s", "\(Self.requestSize)", "-S", "\(Self.step)",
      ] + (subject.isWrite ? ["-w"] : []) + [subject.path]
    let process = BenchProcess(name: "qemu-img", command: command)
    guard let child = try process.run(note) else { return nil }
    // Run completed in 0.123 seconds.
    let words = String(decoding: child.output, as: UTF8.self).split(whereSeparator: { $0 == " " || $0 == "\n" })
    guard let index = words.firstIndex(of: "completed"), index + 2 < words.count, let seconds = Double(words[index + 2])
    else {
      note("qemu-img left out: it does not say how long it took")
      return nil
    }
    return Double(Self.count) / seconds / 1000
  }
}
