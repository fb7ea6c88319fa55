import Glibc
import GuestMemory
import Host
import StateTree

/// What a save has cost.
public struct SaveReport: Equatable, Sendable {
  /// Bytes of RAM that are not zero, and so in the file.
  public var memoryBytes: UInt64 = 0
  /// Bytes of the devices' and vCPUs' state.
  public var stateBytes: UInt64 = 0
}

extension SavedMachine {
  /// Writes a machine's state and RAM, which rest, to `path`. What was there is replaced at the end, by one rename: who
  /// has the old file mapped keeps it. Nothing is left on an error.
  public static func write(
    _ state: StateNode, _ memory: GuestMemory, to path: String
  ) throws(SavedMachineError) -> SaveReport {
    let part = path + ".part"
    do throws(HostError) {
      let report = try writeFile(state, memory, part)
      guard rename(part, path) == 0 else { throw HostError.path("rename to", path: path, errno: errno) }
      return report
    } catch {
      unlink(part)
      throw .host(error)
    }
  }

  private static func writeFile(
    _ state: StateNode, _ memory: GuestMemory, _ path: String
  ) throws(HostError) -> SaveReport {
    let file = try FileDescriptor.open(path, O_RDWR | O_CREAT | O_TRUNC, mode: 0o600)
    let bytes = state.encoded()
    var header = SavedHeader(state: bytes.count, memory: memory.size)
    guard ftruncate(file.rawValue, off_t(header.memoryOffset + header.memorySize)) == 0 else {
      throw .path("resize", path: path, errno: errno)
    }
    var output = Output(file: file.rawValue, path: path, memoryOffset: header.memoryOffset)
    for region in memory.regions {
      try memory.forEachUsedRun(of: region) { (start: Int, count: Int) throws(HostError) in
        try output.write(UnsafeRawPointer(region.hostBase + start), count, at: region.fileOffset + UInt64(start))
      }
    }
    var checksums = [UInt8](repeating: 0, count: Int(header.checksumsCount) * 4)
    for (chunk, sum) in output.checksums {
      for index in 0..<4 { checksums[chunk * 4 + index] = UInt8(truncatingIfNeeded: sum.value >> UInt32(index * 8)) }
    }
    header.checksumsChecksum = checksum(checksums)
    try output.put(bytes, at: header.stateOffset)
    try output.put(checksums, at: header.checksumsOffset)
    try output.put(header.encoded, at: 0)
    guard fsync(file.rawValue) == 0 else { throw .path("write", path: path, errno: errno) }
    return SaveReport(memoryBytes: output.memoryBytes, stateBytes: UInt64(bytes.count))
  }

  /// Writes runs of pages that are not zero.
  private struct Output {
    let file: Int32
    let path: String
    let memoryOffset: UInt64
    var checksums: [Int: ChunkChecksum] = [:]
    var memoryBytes: UInt64 = 0

    mutating func write(_ start: UnsafeRawPointer, _ count: Int, at offset: UInt64) throws(HostError) {
      let size = SavedHeader.pageSize
      let perChunk = SavedHeader.chunkSize / size
      var runStart: Int?
      for position in stride(from: 0, to: count, by: size) {
        let page = start + position
        if isZeroPage(page) {
          if let first = runStart { try flush(start, first, position, offset) }
          runStart = nil
          continue
        }
        let number = Int(offset) / size + position / size
        checksums[number / perChunk, default: ChunkChecksum()].add(number % perChunk, page)
        runStart = runStart ?? position
      }
      if let first = runStart { try flush(start, first, count, offset) }
    }

    private mutating func flush(
      _ start: UnsafeRawPointer, _ first: Int, _ end: Int, _ offset: UInt64
    ) throws(HostError) {
      try put(start + first, end - first, at: memoryOffset + offset + UInt64(first))
      memoryBytes += UInt64(end - first)
    }

    func put(_ bytes: [UInt8], at offset: UInt64) throws(HostError) {
      let outcome = bytes.withUnsafeBytes { buffer in
        Result { () throws(HostError) in
          if let start = buffer.baseAddress { try put(start, buffer.count, at: offset) }
        }
      }
      try outcome.get()
    }

    func put(_ start: UnsafeRawPointer, _ count: Int, at offset: UInt64) throws(HostError) {
      var done = 0
      while done < count {
        let written = pwrite(file, start + done, count - done, off_t(offset) + off_t(done))
        if written < 0, errno == EINTR { continue }
        guard written > 0 else { throw .path("write", path: path, errno: written < 0 ? errno : ENOSPC) }
        done += written
      }
    }
  }
}

/// Whether a page holds zeros alone.
func isZeroPage(_ page: UnsafeRawPointer) -> Bool {
  page.loadUnaligned(as: UInt64.self) == 0 && memcmp(page, page + 8, SavedHeader.pageSize - 8) == 0
}
