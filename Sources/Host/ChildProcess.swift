import Glibc

/// A program run to its end, with what the kernel accounted to it.
public struct ChildProcess: Sendable {
  /// Exit status, or 128 plus the signal that ended it.
  public let status: Int32
  /// From before the start to after the end, nanoseconds.
  public let wallNanoseconds: UInt64
  /// User and system time, microseconds.
  public let cpuMicroseconds: UInt64
  /// Largest resident set, KiB.
  public let maximumResidentKiB: Int
  /// Standard output, where it was asked for.
  public let output: [UInt8]
  /// When output came: its length, and nanoseconds since the start, after each read.
  let arrivals: [(count: Int, nanoseconds: UInt64)]

  /// Nanoseconds from the start until `text` had come whole for the first time; nil where it never came.
  public func nanoseconds(until text: String) -> UInt64? {
    let sought = Array(text.utf8)
    guard let start = output.firstRange(of: sought)?.lowerBound else { return nil }
    return arrivals.first { $0.count >= start + sought.count }?.nanoseconds
  }

  /// Runs `arguments` (the first is looked up in PATH) with no standard input, standard error thrown away, and standard
  /// output thrown away or kept.
  ///
  /// It is started by posix_spawn(3): a fork would carry this program's own memory into the child's account.
  public static func run(_ arguments: [String], keepingOutput: Bool = false) throws(HostError) -> ChildProcess {
    var actions = posix_spawn_file_actions_t()
    posix_spawn_file_actions_init(&actions)
    defer { posix_spawn_file_actions_destroy(&actions) }
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
    posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0)
    var ends: [Int32] = [-1, -1]
    if keepingOutput {
      _ = try check("pipe", pipe(&ends))
      for end in ends { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
      posix_spawn_file_actions_adddup2(&actions, ends[1], 1)
    } else {
      posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0)
    }
    let reader = keepingOutput ? FileDescriptor(owning: ends[0]) : nil
    var words: [UnsafeMutablePointer<CChar>?] = arguments.map { strdup($0) }
    defer { for word in words { free(word) } }
    words.append(nil)
    let start = monotonicNanoseconds()
    var process = pid_t()
    let code = posix_spawnp(&process, arguments[0], &actions, nil, words, environ)
    if keepingOutput { close(ends[1]) }
    guard code == 0 else { throw .path("run", path: arguments[0], errno: code) }
    var output: [UInt8] = []
    var arrivals: [(count: Int, nanoseconds: UInt64)] = []
    if let reader {
      var chunk = [UInt8](repeating: 0, count: 65536)
      while true {
        let count = Glibc.read(reader.rawValue, &chunk, chunk.count)
        if count < 0 && errno == EINTR { continue }
        guard count > 0 else { break }
        output += chunk[..<count]
        arrivals.append((output.count, monotonicNanoseconds() - start))
      }
    }
    var usage = rusage()
    var status: Int32 = 0
    while wait4(process, &status, 0, &usage) < 0 {
      let code = errno
      guard code == EINTR else { throw .systemCall("wait4", errno: code) }
    }
    let end = monotonicNanoseconds()
    let signal = status & 0x7f
    let microseconds =
      (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1_000_000 + usage.ru_utime.tv_usec + usage.ru_stime.tv_usec
    return ChildProcess(
      status: signal == 0 ? status >> 8 & 0xff : 128 + signal, wallNanoseconds: end - start,
      cpuMicroseconds: UInt64(microseconds), maximumResidentKiB: usage.ru_maxrss, output: output, arrivals: arrivals)
  }
}
