import Foundation
import Host

/// The real executable, run to its end.
struct VMM {
  let status: Int32
  let output: String
  let errors: String

  /// The executable under test: `$SWIFTVMM`, or the checkout's release build.
  static let path = ProcessInfo.processInfo.environment["SWIFTVMM"] ?? checkout + "/.build/release/swiftvmm"
  static let checkout = String(#filePath.dropLast("/Tests/GuestTests/VMM.swift".count))
  static let hasKVM = access("/dev/kvm", R_OK | W_OK) == 0
  static let isBuilt = access(path, X_OK) == 0 && access(checkout + "/build/guests/index.txt", R_OK) == 0

  /// Runs it with no input; `--time-limit` of the guest is the only limit, so that no test hangs.
  static func run(
    _ arguments: String..., input: String? = nil, environment: [String: String] = [:]
  ) throws -> VMM {
    try run(arguments, input: input, environment: environment)
  }

  static func run(
    _ arguments: [String], input: String? = nil, environment: [String: String] = [:]
  ) throws -> VMM {
    let process = Process()
    process.executableURL = URL(fileURLWithPath: path)
    process.arguments = arguments
    process.environment = ProcessInfo.processInfo.environment.merging(environment) { $1 }
    let output = Pipe()
    let errors = Pipe()
    process.standardOutput = output
    process.standardError = errors
    if let input {
      let pipe = Pipe()
      process.standardInput = pipe
      pipe.fileHandleForWriting.write(Data(input.utf8))
      try pipe.fileHandleForWriting.close()
    } else {
      process.standardInput = FileHandle.nullDevice
    }
    try process.run()
    let collected = Collector(errors.fileHandleForReading)
    let out = output.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    return VMM(
      status: process.terminationReason == .exit ? process.terminationStatus : 128 + process.terminationStatus,
      output: String(decoding: out, as: UTF8.self), errors: String(decoding: collected.wait(), as: UTF8.self))
  }

  /// Reads one pipe while the caller reads the other.
  private final class Collector: @unchecked Sendable {
    private var data = Data()
    private let done = DispatchSemaphore(value: 0)

    init(_ handle: FileHandle) {
      Thread.detachNewThread { [self] in
        data = handle.readDataToEndOfFile()
        done.signal()
      }
    }

    func wait() -> Data {
      done.wait()
      return data
    }
  }
}

/// A tool of the host, found by PATH and run to its end with no input; what it prints is one text.
func hostTool(_ arguments: String...) throws -> (status: Int32, output: String) { try hostTool(arguments) }

/// See `hostTool(_:)`.
func hostTool(_ arguments: [String]) throws -> (status: Int32, output: String) {
  let process = Process()
  let pipe = Pipe()
  process.executableURL = URL(fileURLWithPath: "/usr/bin/env")
  process.arguments = arguments
  process.standardInput = FileHandle.nullDevice
  process.standardOutput = pipe
  process.standardError = pipe
  try process.run()
  let output = pipe.fileHandleForReading.readDataToEndOfFile()
  process.waitUntilExit()
  return (process.terminationStatus, String(decoding: output, as: UTF8.self))
}

/// A TCP port of the loopback address that nobody listens at.
func freePort() throws -> UInt16 {
  let listener = try StreamListener(.tcp(host: "127.0.0.1", port: 0))
  guard case .tcp(_, let port) = listener.endpoint else { throw HostError.endpoint("\(listener.endpoint)") }
  return port
}

/// A folder that goes away with its owner.
final class TemporaryFolder {
  let path: String

  init() throws {
    path = NSTemporaryDirectory() + "swiftvmm-test-\(UUID().uuidString)"
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
  }

  deinit { try? FileManager.default.removeItem(atPath: path) }

  /// Writes a file and returns its path.
  func file(_ name: String, _ bytes: [UInt8]) throws -> String {
    let file = path + "/" + name
    try Data(bytes).write(to: URL(fileURLWithPath: file))
    return file
  }
}
