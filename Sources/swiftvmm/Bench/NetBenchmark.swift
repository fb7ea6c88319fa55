import Glibc
import Host

/// Frames from one stream peer to another, through our switch and through QEMU's hub in turns.
struct NetBenchmark {
  let runs: Int
  /// How long the sender sends, nanoseconds.
  private static let time: UInt64 = 300_000_000

  func measure() throws(Failure) -> BenchTable {
    var table = BenchTable([
      .init(name: "swiftvmm", unit: "k/s", digits: 0), .init(name: "qemu hub", unit: "k/s", digits: 0),
    ])
    table.notes = ["thousand frames a second that arrive, while the sender sends as many as its socket takes"]
    let folder = try TemporaryDirectory()
    for length in [64, 1514, 9014] {
      var figures: [[Double]] = [[], []]
      var note = ""
      for _ in 0..<min(runs, 9) {
        do throws(HostError) {
          figures[0].append(try ours(length, folder.path))
        } catch {
          throw .host(error)
        }
        guard note.isEmpty else { continue }
        do throws(HostError) {
          figures[1].append(try theirs(length, folder.path))
        } catch {
          note = "QEMU left out: \(error)"
        }
      }
      table.add("\(length) bytes", figures.map { $0.isEmpty ? nil : Samples($0) }, note: note)
    }
    return table
  }

  private func ours(_ length: Int, _ folder: String) throws(HostError) -> Double {
    let socket = folder + "/switch"
    let server = try ServerProcess(["/proc/self/exe", "switch", socket], socket: socket)
    defer { server.end() }
    let receiver = try StreamEndpoint.unix(path: socket).connect()
    return try measure(length, from: StreamEndpoint.unix(path: socket).connect(), to: receiver)
  }

  private func theirs(_ length: Int, _ folder: String) throws(HostError) -> Double {
    let paths = ["a", "b"].map { folder + "/" + $0 }
    let left = try StreamListener(.unix(path: paths[0]))
    let right = try StreamListener(.unix(path: paths[1]))
    func end(_ id: String, _ path: String) -> [String] {
      [
        "-netdev", "stream,id=\(id),server=off,addr.type=unix,addr.path=\(path)",
        "-netdev", "hubport,id=h\(id),hubid=0,netdev=\(id)",
      ]
    }
    let server = try ServerProcess(
      ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"] + end("a", paths[0])
        + end("b", paths[1]), socket: paths[1])
    defer { server.end() }
    return try measure(length, from: left.accept(), to: right.accept())
  }

  /// Thousand frames a second.
  private func measure(
    _ length: Int, from sender: consuming FileDescriptor, to receiver: consuming FileDescriptor
  ) throws(HostError) -> Double {
    let one = Self.frame(length, from: 2, to: 4)
    // The receiver's station is known, and then its port has seen it arrive.
    try Self.send(Self.frame(60, from: 4, to: 2), to: receiver)
    let counted = Condition<Double?>(nil)
    let size = length + 4
    var limit = timeval(tv_sec: 1, tv_usec: 0)
    setsockopt(receiver.rawValue, SOL_SOCKET, SO_RCVTIMEO, &limit, socklen_t(MemoryLayout<timeval>.size))
    let socket = receiver.rawValue
    let thread = try HostThread(name: "receiver") {
      var buffer = [UInt8](repeating: 0, count: 256 << 10)
      var bytes = 0
      var first: UInt64 = 0
      var last: UInt64 = 0
      while true {
        let count = read(socket, &buffer, buffer.count)
        if count < 0, errno == EINTR { continue }
        guard count > 0 else { break }
        last = monotonicNanoseconds()
        if bytes == 0 { first = last }
        bytes += count
      }
      counted.withLock { $0 = Double(bytes / size) / Double(max(last - first, 1)) * 1e6 }
    }
    let series = [[UInt8]](repeating: one, count: max(1, 65536 / size)).flatMap { $0 }
    let end = monotonicNanoseconds() + Self.time
    while monotonicNanoseconds() < end { try Self.send(series, to: sender) }
    let result = counted.wait { $0 }
    thread.join()
    return result
  }

  private static func frame(_ length: Int, from source: UInt8, to destination: UInt8) -> [UInt8] {
    let head = withUnsafeBytes(of: UInt32(length).bigEndian) { Array($0) }
    let addresses: [UInt8] = [0, 0, 0, 0, 0, destination, 0, 0, 0, 0, 0, source, 0x88, 0xb5]
    return head + addresses + [UInt8](repeating: 0, count: length - addresses.count)
  }

  private static func send(_ bytes: [UInt8], to socket: borrowing FileDescriptor) throws(HostError) {
    var failure: HostError?
    bytes.withUnsafeBytes { bytes in
      do throws(HostError) { try socket.sendAll(bytes) } catch { failure = error }
    }
    if let failure { throw failure }
  }
}
