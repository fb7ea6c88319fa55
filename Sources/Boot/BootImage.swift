import Glibc
import GuestMemory
import Host

/// A file that goes into guest memory: kernel, initial RAM disk, module, firmware.
///
/// It is read where it is needed, straight into guest memory, never mapped: a file that somebody truncates meanwhile is
/// a short read, an error, and not a fault. What is no regular file (a pipe, say) is read whole, into a memory file.
public final class BootImage: Sendable {
  /// The most that is read of what is no regular file.
  public static let streamLimit = 1 << 30

  /// The path as the user gave it, for messages.
  public let path: String
  /// Length in bytes, more than 0.
  public let size: UInt64
  /// The first 8 KiB, or as much of it as there is: what kinds are recognised by.
  let head: [UInt8]

  private let file: FileDescriptor

  /// Opens a file.
  ///
  /// Errors: `.unreadable`, `.directory`, `.empty`, `.endless`.
  public convenience init(path: String) throws(BootError) {
    let file = try Self.open(path)
    var status = stat()
    guard fstat(file.rawValue, &status) == 0 else {
      throw .unreadable(path: path, .systemCall("fstat", errno: errno))
    }
    switch status.st_mode & S_IFMT {
    case S_IFDIR: throw .directory(path: path)
    case S_IFREG: try self.init(path: path, file: file, size: UInt64(clamping: status.st_size))
    case S_IFBLK:
      let size = lseek(file.rawValue, 0, SEEK_END)
      try self.init(path: path, file: file, size: UInt64(clamping: size))
    default:
      let bytes = try Self.readAll(file, path: path)
      try self.init(path: path, bytes: bytes)
    }
  }

  /// An image of bytes that are in no file; `path` names it in messages.
  public convenience init(path: String, bytes: [UInt8]) throws(BootError) {
    let file = try Self.memoryFile(path, bytes)
    try self.init(path: path, file: file, size: UInt64(bytes.count))
  }

  private static func open(_ path: String) throws(BootError) -> FileDescriptor {
    do { return try FileDescriptor.open(path, O_RDONLY) } catch { throw .unreadable(path: path, error) }
  }

  private static func memoryFile(_ path: String, _ bytes: [UInt8]) throws(BootError) -> FileDescriptor {
    do {
      let file = try makeMemoryFile(name: "image", size: bytes.count)
      try bytes.withUnsafeBytes { buffer in
        Result { () throws(HostError) in try file.writeAll(buffer) }
      }.get()
      return file
    } catch {
      throw .unreadable(path: path, error)
    }
  }

  private init(path: String, file: consuming FileDescriptor, size: UInt64) throws(BootError) {
    guard size > 0 else { throw .empty(path: path) }
    self.path = path
    self.size = size
    var head = [UInt8](repeating: 0, count: Int(min(size, 8192)))
    let descriptor = file.rawValue
    let got = head.withUnsafeMutableBytes { readFully(descriptor, into: $0, offset: 0) }
    self.file = file
    guard got >= 0 else { throw .unreadable(path: path, .systemCall("pread", errno: Int32(-got))) }
    head.removeLast(head.count - got)
    self.head = head
  }

  /// For libelf, which reads by descriptor too.
  var descriptor: Int32 { file.rawValue }

  /// A copy of `count` bytes at `offset`; an error names `part`.
  func bytes(_ part: BootPart, at offset: UInt64, count: Int) throws(BootError) -> [UInt8] {
    try checkBounds(part, offset: offset, count: UInt64(count))
    var bytes = [UInt8](repeating: 0, count: count)
    try bytes.withUnsafeMutableBytes { buffer in
      Result { () throws(BootError) in try read(part, into: buffer, offset: offset) }
    }.get()
    return bytes
  }

  /// Reads `range.size` bytes at `offset` into guest memory; the range lies in one region.
  func copy(_ part: BootPart, at offset: UInt64, into memory: GuestMemory, range: GuestRange) throws(BootError) {
    try checkBounds(part, offset: offset, count: range.size)
    let count = Int(clamping: range.size)
    guard let pointer = memory.hostPointer(range.start, count: count) else {
      throw .memory(.outside(range.start, count: count))
    }
    try read(part, into: UnsafeMutableRawBufferPointer(start: pointer, count: count), offset: offset)
    memory.markDirty(pointer, count: count)
  }

  private func checkBounds(_ part: BootPart, offset: UInt64, count: UInt64) throws(BootError) {
    guard offset <= size, count <= size - offset else {
      throw .truncated(path: path, part: part, offset: offset, count: count, size: size)
    }
  }

  private func read(
    _ part: BootPart, into buffer: UnsafeMutableRawBufferPointer, offset: UInt64
  ) throws(BootError) {
    let got = readFully(file.rawValue, into: buffer, offset: offset)
    guard got >= 0 else { throw .unreadable(path: path, .systemCall("pread", errno: Int32(-got))) }
    guard got == buffer.count else {
      throw .truncated(
        path: path, part: part, offset: offset, count: UInt64(buffer.count), size: offset + UInt64(got))
    }
  }

  private static func readAll(_ file: borrowing FileDescriptor, path: String) throws(BootError) -> [UInt8] {
    var bytes: [UInt8] = []
    var chunk = [UInt8](repeating: 0, count: 1 << 16)
    while true {
      let descriptor = file.rawValue
      let got = chunk.withUnsafeMutableBytes { Glibc.read(descriptor, $0.baseAddress, $0.count) }
      if got < 0 {
        if errno == EINTR { continue }
        throw .unreadable(path: path, .systemCall("read", errno: errno))
      }
      if got == 0 { return bytes }
      guard bytes.count + got <= streamLimit else { throw .endless(path: path, limit: streamLimit) }
      bytes.append(contentsOf: chunk[..<got])
    }
  }
}

/// Bytes read, fewer than asked at the end of the file only, or `-errno`.
private func readFully(_ descriptor: Int32, into buffer: UnsafeMutableRawBufferPointer, offset: UInt64) -> Int {
  guard let base = buffer.baseAddress else { return 0 }
  var done = 0
  while done < buffer.count {
    let got = pread(descriptor, base + done, buffer.count - done, off_t(clamping: offset &+ UInt64(done)))
    if got < 0 {
      if errno == EINTR { continue }
      return -Int(errno)
    }
    if got == 0 { break }
    done += got
  }
  return done
}
