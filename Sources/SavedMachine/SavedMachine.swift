import Glibc
import GuestMemory
import Host
import StateTree

/// A machine in a file: its state as a tree, and its RAM page-aligned behind it, with holes for pages of zeros.
/// docs/state.md describes the file.
public struct SavedMachine: ~Copyable {
  /// What was saved beside RAM.
  public let state: StateNode
  /// Bytes of RAM.
  public var memorySize: UInt64 { header.memorySize }

  private let path: String
  private let file: FileDescriptor
  private let header: SavedHeader
  private let checksums: [UInt8]

  /// Opens a file and reads all of it but RAM. Any bytes that are no saved machine are an error.
  public init(path: String) throws(SavedMachineError) {
    let file = try Self.open(path)
    var status = stat()
    guard fstat(file.rawValue, &status) == 0, status.st_mode & S_IFMT == S_IFREG else {
      throw .notASavedMachine(path: path)
    }
    let size = UInt64(max(0, status.st_size))
    let page = try Self.read(file.rawValue, path, at: 0, count: Int(min(size, UInt64(SavedHeader.pageSize))))
    let header = try SavedHeader(page, path: path, fileSize: size)
    let bytes = try Self.read(file.rawValue, path, at: header.stateOffset, count: Int(header.stateCount))
    let checksums = try Self.read(
      file.rawValue, path, at: header.checksumsOffset, count: Int(header.checksumsCount) * 4)
    guard checksum(checksums) == header.checksumsChecksum else { throw .damaged(path: path, part: .checksums) }
    let state: StateNode
    do { state = try StateNode(decoding: bytes) } catch { throw .state(path: path, error) }
    self.state = state
    self.path = path
    self.header = header
    self.checksums = checksums
    self.file = file
  }

  private static func open(_ path: String) throws(SavedMachineError) -> FileDescriptor {
    do { return try FileDescriptor.open(path, O_RDONLY) } catch { throw .host(error) }
  }

  /// Maps the saved RAM in place of the machine's: a page is read when it is touched first, and changes stay in memory.
  /// The file must stay as it is for as long as the machine runs.
  public func map(into memory: GuestMemory) throws(SavedMachineError) {
    guard memory.size == header.memorySize else {
      throw .memorySize(path: path, saved: header.memorySize, here: memory.size)
    }
    do { try memory.mapCopy(of: file, offset: header.memoryOffset) } catch { throw .host(error) }
  }

  /// Reads all of RAM and compares it with the checksums.
  public func verifyMemory() throws(SavedMachineError) {
    let perChunk = SavedHeader.chunkSize / SavedHeader.pageSize
    for chunk in 0..<Int(header.checksumsCount) {
      let start = UInt64(chunk * SavedHeader.chunkSize)
      let count = Int(min(UInt64(SavedHeader.chunkSize), header.memorySize - start))
      let bytes = try Self.read(file.rawValue, path, at: header.memoryOffset + start, count: count)
      var sum = ChunkChecksum()
      bytes.withUnsafeBytes { buffer in
        for number in 0..<min(perChunk, count / SavedHeader.pageSize) {
          guard let page = buffer.baseAddress.map({ $0 + number * SavedHeader.pageSize }) else { break }
          if !isZeroPage(page) { sum.add(number, page) }
        }
      }
      var wanted: UInt32 = 0
      for index in (0..<4).reversed() { wanted = wanted << 8 | UInt32(checksums[chunk * 4 + index]) }
      guard sum.value == wanted else { throw .damaged(path: path, part: .memory) }
    }
  }

  private static func read(
    _ file: Int32, _ path: String, at offset: UInt64, count: Int
  ) throws(SavedMachineError) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: count)
    var done = 0
    while done < count {
      let got = bytes.withUnsafeMutableBytes { buffer in
        buffer.baseAddress.map { pread(file, $0 + done, count - done, off_t(offset) + off_t(done)) } ?? 0
      }
      if got < 0, errno == EINTR { continue }
      guard got >= 0 else { throw .host(.path("read", path: path, errno: errno)) }
      // Cut since its size was asked.
      guard got > 0 else { throw .damaged(path: path, part: .bounds) }
      done += got
    }
    return bytes
  }
}
