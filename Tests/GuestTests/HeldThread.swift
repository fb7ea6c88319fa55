import Foundation

/// A thread of another process that is held while the process's other threads go on (ptrace(2)). Only the thread that has made it may use it.
final class HeldThread {
  private let identifier: Int32

  /// The thread that has given more than a mebibyte to write calls since `before`; nil where there is none.
  init?(of process: Int32, since before: [Int32: Int]) {
    guard let writer = Self.written(by: process).first(where: { $1 > (before[$0] ?? 0) + 1 << 20 })?.key
    else { return nil }
    identifier = writer
  }

  /// Stops it: where it is in a call, once that is done.
  func stop() -> Bool { Self.ptrace(.seize, identifier) && Self.ptrace(.interrupt, identifier) }

  /// Waits until it has stopped.
  func waitUntilStopped() -> Bool {
    var status: Int32 = 0
    return waitpid(identifier, &status, Self.anyThread) == identifier
  }

  /// Lets it go on.
  func release() { _ = Self.ptrace(.detach, identifier) }

  /// Bytes that each thread has given to write calls: /proc/PID/task/TID/io.
  static func written(by process: Int32) -> [Int32: Int] {
    let names = (try? FileManager.default.contentsOfDirectory(atPath: "/proc/\(process)/task")) ?? []
    var result: [Int32: Int] = [:]
    for name in names {
      let text = (try? String(contentsOfFile: "/proc/\(process)/task/\(name)/io", encoding: .utf8)) ?? ""
      guard let line = text.split(separator: "\n").first(where: { $0.hasPrefix("wchar:") }),
        let thread = Int32(name), let count = Int(line.dropFirst("wchar: ".count))
      else { continue }
      result[thread] = count
    }
    return result
  }

  private enum Request: Int {
    case detach = 17
    case seize = 0x4206
    case interrupt = 0x4207
  }

  /// __WALL.
  private static let anyThread: Int32 = 0x4000_0000

  /// The call has variable arguments, which do not import.
  private static func ptrace(_ request: Request, _ thread: Int32) -> Bool {
    typealias Call = @convention(c) (Int, Int32, Int, Int) -> Int
    guard let symbol = dlsym(nil, "ptrace") else { return false }
    return unsafeBitCast(symbol, to: Call.self)(request.rawValue, thread, 0, 0) == 0
  }
}
