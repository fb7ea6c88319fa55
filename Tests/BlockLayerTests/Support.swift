import BlockLayer
import Foundation
import Glibc

/// A generator with a fixed seed: what a test does is the same every time.
struct SeededGenerator: RandomNumberGenerator {
  var state: UInt64

  init(_ seed: UInt64) { state = seed }

  mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var value = state
    value = (value ^ (value >> 30)) &* 0xbf58_476d_1ce4_e5b9
    value = (value ^ (value >> 27)) &* 0x94d0_49bb_1331_11eb
    return value ^ (value >> 31)
  }
}

/// Completions that a test lets happen in an order of its own.
final class ManualQueue: IOQueue {
  var notifier: Int32 { -1 }
  var pending: [() -> Void] = []
  var generator = SeededGenerator(1)

  func start(_ request: BlockRequest, descriptor: Int32, path: String) {}
  func poll() { while wait() {} }

  func wait() -> Bool {
    guard !pending.isEmpty else { return false }
    pending.remove(at: Int.random(in: 0..<pending.count, using: &generator))()
    return true
  }
}

/// A file in memory that writes down everything that is done to it.
///
/// A write may reach the medium at any time from its start on, in any part of whole sectors; it is there for certain
/// once a flush has completed that began after the write had completed.
final class RecordingFile: BlockFile {
  struct Event {
    var offset: UInt64
    var bytes: [UInt8]
    var completed: Int?
  }

  enum Entry {
    case write(Event)
    /// A barrier that has completed: what had completed before `began` is durable.
    case flushed(began: Int)
    case mark(Int)
  }

  let path = "memory"
  let isReadOnly = false
  var bytes: [UInt8]
  var log: [Entry] = []
  var isRecording = false
  /// Whether punching is carried out; it is a write of zeros.
  var punches = true
  /// Writes whose memory was not the same at their completion as at their start.
  var changedUnderWay = 0
  /// Makes everything fail from that entry of the log on.
  var failsFrom = Int.max
  let queue: ManualQueue?

  init(_ bytes: [UInt8] = [], queue: ManualQueue? = nil) {
    self.bytes = bytes
    self.queue = queue
  }

  var length: UInt64 { UInt64(bytes.count) }
  private var fails: Bool { log.count >= failsFrom }

  private func apply(_ offset: Int, _ data: UnsafeRawBufferPointer) {
    if offset + data.count > bytes.count {
      bytes += [UInt8](repeating: 0, count: offset + data.count - bytes.count)
    }
    bytes.withUnsafeMutableBytes { target in
      if data.count > 0 { memcpy(target.baseAddress! + offset, data.baseAddress!, data.count) }
    }
  }

  private func record(_ offset: UInt64, _ data: UnsafeRawBufferPointer, completed: Bool) -> Int {
    guard isRecording else { return 0 }
    log.append(.write(Event(offset: offset, bytes: Array(data), completed: completed ? log.count : nil)))
    return log.count - 1
  }

  func submit(_ request: BlockRequest) {
    let failure = BlockError.io(call: "reach", path: path, errno: EIO)
    if fails { return later { request.completion(failure) } }
    switch request.operation {
    case .read:
      let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: Int(request.length), alignment: 16)
      try? read(at: request.offset, into: buffer)
      later {
        request.memory.copyIn(buffer.baseAddress!, from: 0, length: buffer.count)
        buffer.deallocate()
        request.completion(nil)
      }
    case .write:
      let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: Int(request.length), alignment: 16)
      request.memory.copyOut(buffer.baseAddress!, from: 0, length: buffer.count)
      apply(Int(request.offset), UnsafeRawBufferPointer(buffer))
      let index = record(request.offset, UnsafeRawBufferPointer(buffer), completed: false)
      later { [self] in
        // The host may read the memory until the request completes.
        let now = UnsafeMutableRawBufferPointer.allocate(byteCount: buffer.count, alignment: 16)
        request.memory.copyOut(now.baseAddress!, from: 0, length: now.count)
        if memcmp(now.baseAddress!, buffer.baseAddress!, now.count) != 0 { changedUnderWay += 1 }
        now.deallocate()
        buffer.deallocate()
        if isRecording, case .write(var event) = log[index] {
          event.completed = log.count
          log[index] = .write(event)
        }
        request.completion(nil)
      }
    case .flush:
      let began = log.count
      later { [self] in
        if isRecording { log.append(.flushed(began: began)) }
        request.completion(nil)
      }
    case .discard, .writeZeroes:
      later { request.completion(nil) }
    }
  }

  private func later(_ body: @escaping () -> Void) {
    if let queue { queue.pending.append(body) } else { body() }
  }

  func read(at offset: UInt64, into target: UnsafeMutableRawBufferPointer) throws(BlockError) {
    if fails { throw .io(call: "read", path: path, errno: EIO) }
    guard let base = target.baseAddress else { return }
    let available = offset < length ? min(target.count, Int(length - offset)) : 0
    if available > 0 {
      bytes.withUnsafeBytes { source in _ = memcpy(base, source.baseAddress! + Int(offset), available) }
    }
    memset(base + available, 0, target.count - available)
  }

  func write(at offset: UInt64, from source: UnsafeRawBufferPointer) throws(BlockError) {
    if fails { throw .io(call: "write", path: path, errno: ENOSPC) }
    apply(Int(offset), source)
    _ = record(offset, source, completed: true)
  }

  func flush() throws(BlockError) {
    if fails { throw .io(call: "flush", path: path, errno: EIO) }
    if isRecording { log.append(.flushed(began: log.count)) }
  }

  func setLength(_ length: UInt64) throws(BlockError) {
    if length > self.length {
      bytes += [UInt8](repeating: 0, count: Int(length - self.length))
    } else {
      bytes.removeLast(Int(self.length - length))
    }
  }

  func punchHole(at offset: UInt64, length count: UInt64) throws(BlockError) -> Bool {
    guard punches else { return false }
    let end = min(offset + count, length)
    if offset < end {
      let zeros = [UInt8](repeating: 0, count: Int(end - offset))
      zeros.withUnsafeBytes { source in
        apply(Int(offset), source)
        _ = record(offset, source, completed: true)
      }
    }
    return true
  }

  func hole(at offset: UInt64, length count: UInt64) -> (isHole: Bool, length: UInt64) { (offset >= length, count) }
  func close() {}
}

/// A folder that goes away with the test.
final class Scratch {
  let path: String

  init() {
    path = NSTemporaryDirectory() + "/swiftvmm-disks-\(UUID().uuidString)"
    try? FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
  }

  deinit { try? FileManager.default.removeItem(atPath: path) }

  func callAsFunction(_ name: String) -> String { path + "/" + name }
}

/// What a program printed, and how it ended.
struct Finished {
  var status: Int32
  var output: String
}

/// Runs a program of the host's.
func host(_ program: String, _ arguments: String...) throws -> Finished {
  try host(program, arguments)
}

func host(_ program: String, _ arguments: [String]) throws -> Finished {
  let process = Process()
  process.executableURL = URL(fileURLWithPath: "/usr/bin/env")
  process.arguments = [program] + arguments
  let pipe = Pipe()
  process.standardOutput = pipe
  process.standardError = pipe
  try process.run()
  let output = pipe.fileHandleForReading.readDataToEndOfFile()
  process.waitUntilExit()
  return Finished(status: process.terminationStatus, output: String(decoding: output, as: UTF8.self))
}

let hasQemuImg = FileManager.default.isExecutableFile(atPath: "/usr/bin/qemu-img")

extension BlockNode {
  /// Writes one byte value over a range and waits.
  func fill(_ value: UInt8, at offset: UInt64, _ length: Int, on queue: any IOQueue) throws {
    var bytes = [UInt8](repeating: value, count: length)
    try bytes.withUnsafeMutableBytes { buffer in
      try perform(.write, at: offset, memory: buffer, on: queue)
    }
  }

  func contents(at offset: UInt64, _ length: Int, on queue: any IOQueue) throws -> [UInt8] {
    var bytes = [UInt8](repeating: 0xee, count: length)
    try bytes.withUnsafeMutableBytes { buffer in
      try perform(.read, at: offset, memory: buffer, on: queue)
    }
    return bytes
  }
}
