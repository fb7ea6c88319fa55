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
  /// Writes a machine's state and RAM, which rest, to `path`.
  public static func write(
    _ state: StateNode, _ memory: GuestMemory, to path: String
  ) throws(SavedMachineError) -> SaveReport {
    let writer = try SavedMachineWriter(memory, to: path)
    try writer.writeAll()
    return try writer.finish(state)
  }
}

/// Writes a machine to a file: its RAM, as often as it changes, and at last its state. What was at the place is replaced at the
/// end, by one rename: who has the old file mapped keeps it. Nothing is left where it is not finished.
public final class SavedMachineWriter {
  private let memory: GuestMemory
  private let path: String
  private let part: String
  private let file: FileDescriptor
  private let memoryOffset: UInt64
  /// Chunks of RAM in which anything was written.
  private var written: [Bool]
  private let buffer: UnsafeMutableRawPointer
  private var isFinished = false

  /// Begins a file beside `path`.
  public init(_ memory: GuestMemory, to path: String) throws(SavedMachineError) {
    self.memory = memory
    self.path = path
    part = path + ".part"
    let header = SavedHeader(state: 0, memory: memory.size)
    memoryOffset = header.memoryOffset
    written = [Bool](repeating: false, count: Int(header.checksumsCount))
    buffer = .allocate(byteCount: SavedHeader.chunkSize, alignment: SavedHeader.pageSize)
    do throws(HostError) {
      file = try FileDescriptor.open(part, O_RDWR | O_CREAT | O_TRUNC, mode: 0o600)
    } catch {
      throw .host(error)
    }
    try writing { () throws(HostError) in
      guard ftruncate(file.rawValue, off_t(header.memoryOffset + header.memorySize)) == 0 else {
        throw .path("resize", path: part, errno: errno)
      }
    }
  }

  deinit {
    if !isFinished { unlink(part) }
    buffer.deallocate()
  }

  /// Writes all pages that hold anything. They may change meanwhile: whoever changes them writes them again.
  public func writeAll() throws(SavedMachineError) {
    try writing { () throws(HostError) in
      for region in memory.regions {
        try memory.forEachUsedRun(of: region) { (start: Int, count: Int) throws(HostError) in
          try write(from: Int(region.fileOffset) + start, count, skipsZeros: true)
        }
      }
    }
  }

  /// Writes pages, a bit each by their flat numbers.
  public func write(pages words: [UInt64]) throws(SavedMachineError) {
    try writing { () throws(HostError) in
      for (index, word) in words.enumerated() where word != 0 {
        var rest = word
        while rest != 0 {
          let first = rest.trailingZeroBitCount
          let count = (~(rest >> UInt64(first))).trailingZeroBitCount
          rest = first + count == 64 ? 0 : rest & (UInt64.max << UInt64(first + count))
          try write(
            from: (index << 6 + first) * SavedHeader.pageSize, count * SavedHeader.pageSize, skipsZeros: false)
        }
      }
    }
  }

  /// Writes the state and what the reader checks, and puts the file in place, durable. RAM may change again.
  public func finish(_ state: StateNode) throws(SavedMachineError) -> SaveReport {
    var report = SaveReport()
    try writing { () throws(HostError) in
      let bytes = state.encoded()
      var header = SavedHeader(state: bytes.count, memory: memory.size)
      var checksums = [UInt8](repeating: 0, count: Int(header.checksumsCount) * 4)
      for chunk in written.indices where written[chunk] {
        let sum = try readBack(chunk, &report)
        for index in 0..<4 { checksums[chunk * 4 + index] = UInt8(truncatingIfNeeded: sum >> UInt32(index * 8)) }
      }
      header.checksumsChecksum = checksum(checksums)
      try put(bytes, at: header.stateOffset)
      try put(checksums, at: header.checksumsOffset)
      try put(header.encoded, at: 0)
      guard fsync(file.rawValue) == 0 else { throw HostError.path("write", path: part, errno: errno) }
      guard rename(part, path) == 0 else { throw HostError.path("rename to", path: path, errno: errno) }
      report.stateBytes = UInt64(bytes.count)
    }
    isFinished = true
    return report
  }

  private func writing(_ body: () throws(HostError) -> Void) throws(SavedMachineError) {
    do throws(HostError) { try body() } catch { throw .host(error) }
  }

  /// Writes so many bytes of RAM, from whole pages.
  private func write(from start: Int, _ count: Int, skipsZeros: Bool) throws(HostError) {
    let base = UnsafeRawPointer(memory.regions[0].hostBase)
    var first = start
    for position in stride(from: start, to: start + count, by: SavedHeader.pageSize) {
      guard skipsZeros, isZeroPage(base + position) else { continue }
      try put(base + first, position - first, at: first)
      first = position + SavedHeader.pageSize
    }
    try put(base + first, start + count - first, at: first)
  }

  private func put(_ start: UnsafeRawPointer, _ count: Int, at offset: Int) throws(HostError) {
    guard count > 0 else { return }
    for chunk in offset / SavedHeader.chunkSize...(offset + count - 1) / SavedHeader.chunkSize { written[chunk] = true }
    try put(start, count, at: memoryOffset + UInt64(offset))
  }

  /// The checksum of a chunk as it is in the file: in RAM it may be another one by now.
  private func readBack(_ chunk: Int, _ report: inout SaveReport) throws(HostError) -> UInt32 {
    let start = chunk * SavedHeader.chunkSize
    let count = min(SavedHeader.chunkSize, Int(memory.size) - start)
    var done = 0
    while done < count {
      let got = pread(file.rawValue, buffer + done, count - done, off_t(memoryOffset) + off_t(start + done))
      if got < 0, errno == EINTR { continue }
      guard got > 0 else { throw .path("read", path: part, errno: got < 0 ? errno : EIO) }
      done += got
    }
    var sum = ChunkChecksum()
    for number in 0..<count / SavedHeader.pageSize {
      let page = UnsafeRawPointer(buffer + number * SavedHeader.pageSize)
      if isZeroPage(page) { continue }
      sum.add(number, page)
      report.memoryBytes += UInt64(SavedHeader.pageSize)
    }
    return sum.value
  }

  private func put(_ bytes: [UInt8], at offset: UInt64) throws(HostError) {
    let outcome = bytes.withUnsafeBytes { buffer in
      Result { () throws(HostError) in
        if let start = buffer.baseAddress { try put(start, buffer.count, at: offset) }
      }
    }
    try outcome.get()
  }

  private func put(_ start: UnsafeRawPointer, _ count: Int, at offset: UInt64) throws(HostError) {
    var done = 0
    while done < count {
      let written = pwrite(file.rawValue, start + done, count - done, off_t(offset) + off_t(done))
      if written < 0, errno == EINTR { continue }
      guard written > 0 else { throw .path("write", path: part, errno: written < 0 ? errno : ENOSPC) }
      done += written
    }
  }
}

/// Whether a page holds zeros alone.
func isZeroPage(_ page: UnsafeRawPointer) -> Bool {
  page.loadUnaligned(as: UInt64.self) == 0 && memcmp(page, page + 8, SavedHeader.pageSize - 8) == 0
}
