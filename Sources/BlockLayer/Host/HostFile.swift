import CLinux
import Glibc
import Host

/// How an image's file is opened.
public struct FileAccess: Sendable {
  /// Writes are allowed.
  public var writable = false
  /// The page cache is gone round (O_DIRECT); every transfer must be aligned, and is where swiftvmm makes it.
  public var direct = false
  /// Flushes are not carried out: for images that are thrown away after a crash.
  public var ignoresFlushes = false
  /// Neither takes locks nor minds those of others.
  public var sharesAll = false
  /// Much is written through the page cache, in large pieces. Where flushes are not carried out, storage is set aside before
  /// each piece, which costs less than block by block; else the host begins to write on the way, so that the flush at the end
  /// has little left.
  public var isBulk = false

  /// For reading, through the page cache.
  public init(writable: Bool = false, direct: Bool = false, ignoresFlushes: Bool = false, sharesAll: Bool = false) {
    self.writable = writable
    self.direct = direct
    self.ignoresFlushes = ignoresFlushes
    self.sharesAll = sharesAll
  }
}

/// A file or block device of the host.
public final class HostFile: BlockFile {
  /// The file's path as it was given.
  public let path: String
  /// Whether writes are refused.
  public private(set) var isReadOnly: Bool
  /// Bytes, as of the last change through this object.
  public private(set) var length: UInt64
  private let file: FileDescriptor
  private let queue: any IOQueue
  private(set) var access: FileAccess
  /// Identifies the file, whatever its name.
  public let identity: FileIdentity?
  /// Transfers of O_DIRECT are multiples of this; 1 otherwise.
  private let alignment: UInt64
  private var isClosed = false
  /// Bytes of large writes since the host was last told to write.
  private var heldBack: UInt64 = 0
  private static let largeWrite: UInt64 = 64 << 10
  private static let mostHeldBack: UInt64 = 4 << 20

  /// Opens an existing file and locks it.
  public init(path: String, access: FileAccess, queue: any IOQueue) throws(BlockError) {
    self.path = path
    self.access = access
    self.queue = queue
    isReadOnly = !access.writable
    alignment = access.direct ? 4096 : 1
    let flags = (access.writable ? O_RDWR : O_RDONLY) | (access.direct ? clinux_direct_flag : 0)
    do {
      file = try FileDescriptor.open(path, flags)
    } catch {
      throw .io(call: "open", path: path, errno: error.errno)
    }
    var status = stat()
    guard fstat(file.rawValue, &status) == 0 else { throw .io(call: "stat", path: path, errno: errno) }
    guard status.st_mode & S_IFMT != S_IFDIR else { throw .io(call: "open", path: path, errno: EISDIR) }
    identity = .file(device: status.st_dev, inode: status.st_ino)
    let end = lseek(file.rawValue, 0, SEEK_END)
    guard end >= 0 else { throw .io(call: "seek in", path: path, errno: errno) }
    length = UInt64(end)
    if !access.sharesAll { try FileLocks.take(file.rawValue, path: path, writable: access.writable) }
  }

  deinit {
    // The last close of a file without a name gives its storage back, which takes a third of a second a GiB: no guest waits for that.
    var status = stat()
    guard fstat(file.rawValue, &status) == 0, status.st_nlink == 0, status.st_mode & S_IFMT == S_IFREG else { return }
    let copy = fcntl(file.rawValue, F_DUPFD_CLOEXEC, 0)
    guard copy >= 0 else { return }
    if (try? HostThread(name: "closing") { Glibc.close(copy) }) == nil { Glibc.close(copy) }
  }

  /// Makes a file of `length` zero bytes, or empties an existing one.
  public static func create(_ path: String, length: UInt64 = 0) throws(BlockError) {
    let file: FileDescriptor
    do {
      // Not truncated by open: whether somebody uses the file is known only afterwards.
      file = try FileDescriptor.open(path, O_RDWR | O_CREAT, mode: 0o644)
    } catch {
      throw .io(call: "create", path: path, errno: error.errno)
    }
    try FileLocks.take(file.rawValue, path: path, writable: true)
    guard let length = off_t(exactly: length), ftruncate(file.rawValue, 0) == 0, ftruncate(file.rawValue, length) == 0
    else { throw .io(call: "set the length of", path: path, errno: errno) }
  }

  /// Opens the file anew, for writing or for reading only. Requests under way end as they began.
  public func setWritable(_ writable: Bool) throws(BlockError) {
    guard writable == isReadOnly else { return }
    let flags = (writable ? O_RDWR : O_RDONLY) | (access.direct ? clinux_direct_flag : 0)
    let other: FileDescriptor
    do { other = try FileDescriptor.open(path, flags) } catch {
      throw .io(call: "open", path: path, errno: error.errno)
    }
    var status = stat()
    guard fstat(other.rawValue, &status) == 0,
      identity == .file(device: status.st_dev, inode: status.st_ino)
    else { throw .io(call: "open", path: path, errno: ESTALE) }
    if !access.sharesAll {
      FileLocks.release(file.rawValue)
      do throws(BlockError) {
        try FileLocks.take(other.rawValue, path: path, writable: writable)
      } catch {
        try FileLocks.take(file.rawValue, path: path, writable: !writable)
        throw error
      }
    }
    guard clinux_replace_descriptor(other.rawValue, file.rawValue) >= 0 else {
      throw .io(call: "open", path: path, errno: errno)
    }
    isReadOnly = !writable
    access.writable = writable
  }

  /// Begins a request; discards and zeroes are carried out at once.
  public func submit(_ request: BlockRequest) {
    switch request.operation {
    case .read, .write:
      if isReadOnly, request.operation == .write { return request.completion(.readOnly(path: path)) }
      if alignment > 1, !request.isAligned(to: 512) { return submitBounced(request) }
      if request.operation == .write {
        if access.isBulk, request.length >= Self.largeWrite { beginBulk(request) }
        length = max(length, request.offset + request.length)
      }
      queue.start(request, descriptor: file.rawValue, path: path)
    case .flush:
      if access.ignoresFlushes || isReadOnly { return request.completion(nil) }
      queue.start(request, descriptor: file.rawValue, path: path)
    case .discard, .writeZeroes:
      if isReadOnly { return request.completion(.readOnly(path: path)) }
      do throws(BlockError) {
        if request.operation == .discard {
          _ = try punchHole(at: request.offset, length: request.length)
        } else {
          try zero(at: request.offset, length: request.length, mayUnmap: request.mayUnmap)
        }
        request.completion(nil)
      } catch {
        request.completion(error)
      }
    }
  }

  /// Before a large write.
  private func beginBulk(_ request: BlockRequest) {
    request.allocates = access.ignoresFlushes
    guard !access.ignoresFlushes else { return }
    heldBack += request.length
    guard heldBack >= Self.mostHeldBack else { return }
    heldBack = 0
    // Where the host cannot begin early, the flush has more to do.
    access.isBulk = clinux_begin_writing(file.rawValue) == 0
  }

  /// What O_DIRECT does not take as it is goes through a copy, and waits.
  private func submitBounced(_ request: BlockRequest) {
    let buffer = DiskBuffer(count: Int(request.length))
    do throws(BlockError) {
      if request.operation == .read {
        try read(at: request.offset, into: buffer.bytes)
        request.memory.copyIn(buffer.start, from: 0, length: Int(request.length))
      } else {
        request.memory.copyOut(buffer.start, from: 0, length: Int(request.length))
        try write(at: request.offset, from: UnsafeRawBufferPointer(buffer.bytes))
      }
      request.completion(nil)
    } catch {
      request.completion(error)
    }
  }

  private func zero(at offset: UInt64, length count: UInt64, mayUnmap: Bool) throws(BlockError) {
    if mayUnmap, offset + count <= length, try punchHole(at: offset, length: count) { return }
    if let start = off_t(exactly: offset), let count = off_t(exactly: count),
      clinux_zero_range(file.rawValue, Int64(start), Int64(count)) == 0
    {
      length = max(length, offset + UInt64(count))
      return
    }
    let zeros = DiskBuffer(count: 1 << 20, zeroed: true)
    var done: UInt64 = 0
    while done < count {
      let part = min(count - done, 1 << 20)
      try write(at: offset + done, from: UnsafeRawBufferPointer(rebasing: zeros.bytes[..<Int(part)]))
      done += part
    }
  }

  /// Reads metadata; what lies past the end is zero.
  public func read(at offset: UInt64, into bytes: UnsafeMutableRawBufferPointer) throws(BlockError) {
    guard let base = bytes.baseAddress, bytes.count > 0 else { return }
    if isAligned(offset, bytes.count, UnsafeRawPointer(base)) {
      return try readAligned(at: offset, into: bytes)
    }
    let start = offset.roundedDown(to: alignment)
    let bounce = DiskBuffer(count: Int((offset + UInt64(bytes.count)).roundedUp(to: alignment) - start))
    try readAligned(at: start, into: bounce.bytes)
    memcpy(base, bounce.start + Int(offset - start), bytes.count)
  }

  private func readAligned(at offset: UInt64, into bytes: UnsafeMutableRawBufferPointer) throws(BlockError) {
    guard let base = bytes.baseAddress, off_t(exactly: offset + UInt64(bytes.count)) != nil else {
      throw .io(call: "read", path: path, errno: EFBIG)
    }
    var done = 0
    while done < bytes.count {
      let count = pread(file.rawValue, base + done, bytes.count - done, off_t(offset) + done)
      if count < 0 {
        if errno == EINTR { continue }
        throw .io(call: "read", path: path, errno: errno)
      }
      if count == 0 {
        memset(base + done, 0, bytes.count - done)
        return
      }
      done += count
    }
  }

  /// Writes metadata.
  public func write(at offset: UInt64, from bytes: UnsafeRawBufferPointer) throws(BlockError) {
    guard !isReadOnly else { throw .readOnly(path: path) }
    guard let base = bytes.baseAddress, bytes.count > 0 else { return }
    if isAligned(offset, bytes.count, base) { return try writeAligned(at: offset, from: bytes) }
    let start = offset.roundedDown(to: alignment)
    let bounce = DiskBuffer(count: Int((offset + UInt64(bytes.count)).roundedUp(to: alignment) - start))
    try readAligned(at: start, into: bounce.bytes)
    memcpy(bounce.start + Int(offset - start), base, bytes.count)
    try writeAligned(at: start, from: UnsafeRawBufferPointer(bounce.bytes))
  }

  private func writeAligned(at offset: UInt64, from bytes: UnsafeRawBufferPointer) throws(BlockError) {
    guard let base = bytes.baseAddress, off_t(exactly: offset + UInt64(bytes.count)) != nil else {
      throw .io(call: "write", path: path, errno: EFBIG)
    }
    var done = 0
    while done < bytes.count {
      let count = pwrite(file.rawValue, base + done, bytes.count - done, off_t(offset) + done)
      if count < 0 {
        if errno == EINTR { continue }
        throw .io(call: "write", path: path, errno: errno)
      }
      done += count
    }
    length = max(length, offset + UInt64(bytes.count))
  }

  private func isAligned(_ offset: UInt64, _ count: Int, _ base: UnsafeRawPointer) -> Bool {
    alignment == 1 || (offset | UInt64(count) | UInt64(UInt(bitPattern: base))) % alignment == 0
  }

  /// fdatasync(2).
  public func flush() throws(BlockError) {
    if access.ignoresFlushes || isReadOnly { return }
    guard fdatasync(file.rawValue) == 0 else { throw .io(call: "flush", path: path, errno: errno) }
  }

  /// The file has no name any more: nothing that is written to it is to be made durable.
  func giveUp() { access.ignoresFlushes = true }

  /// ftruncate(2).
  public func setLength(_ length: UInt64) throws(BlockError) {
    guard !isReadOnly else { throw .readOnly(path: path) }
    guard let value = off_t(exactly: length) else { throw .io(call: "set the length of", path: path, errno: EFBIG) }
    guard ftruncate(file.rawValue, value) == 0 else {
      throw .io(call: "set the length of", path: path, errno: errno)
    }
    self.length = length
  }

  /// fallocate(2) with FALLOC_FL_PUNCH_HOLE.
  public func punchHole(at offset: UInt64, length: UInt64) throws(BlockError) -> Bool {
    guard let start = off_t(exactly: offset), let count = off_t(exactly: length), count > 0 else { return length == 0 }
    if clinux_punch_hole(file.rawValue, Int64(start), Int64(count)) == 0 { return true }
    switch errno {
    case EOPNOTSUPP, ENOSYS, ENODEV, EINVAL: return false
    default: throw .io(call: "punch a hole in", path: path, errno: errno)
    }
  }

  /// lseek(2) with SEEK_DATA and SEEK_HOLE; all data where the host cannot tell.
  public func hole(at offset: UInt64, length count: UInt64) -> (isHole: Bool, length: UInt64) {
    guard let start = off_t(exactly: offset) else { return (true, count) }
    let data = clinux_seek_data(file.rawValue, Int64(start))
    if data < 0 { return errno == ENXIO ? (true, count) : (false, count) }
    if data > start { return (true, min(count, UInt64(data) - offset)) }
    let hole = clinux_seek_hole(file.rawValue, Int64(start))
    return (false, hole > start ? min(count, UInt64(hole) - offset) : count)
  }

  /// Bytes that the host has set aside for the file.
  public var allocatedBytes: UInt64? {
    var status = stat()
    return fstat(file.rawValue, &status) == 0 ? UInt64(status.st_blocks) * 512 : nil
  }

  /// With storage, so that a direct write there is none that makes the file longer: those wait for each other.
  public func reserve(upTo length: UInt64) {
    guard access.direct, length > self.length else { return }
    if clinux_allocate(file.rawValue, Int64(self.length), Int64(length - self.length)) == 0 { self.length = length }
  }

  /// Has the host set aside storage for the whole file: posix_fallocate(3).
  public func allocateStorage() throws(BlockError) {
    guard length > 0 else { return }
    let code = posix_fallocate(file.rawValue, 0, off_t(length))
    guard code == 0 else { throw .io(call: "allocate storage for", path: path, errno: code) }
  }

  /// Nothing to do but to give up the locks, which end with the descriptor.
  public func close() {
    guard !isClosed else { return }
    isClosed = true
    if !access.sharesAll { FileLocks.release(file.rawValue) }
  }
}

/// What names bytes, whatever their path.
public enum FileIdentity: Hashable, Sendable {
  /// A file of the host.
  case file(device: UInt, inode: UInt)
  /// An export of an NBD server.
  case export(uri: String)
}

extension BlockRequest {
  /// Whether the range and every piece of memory are multiples of `alignment`.
  fileprivate func isAligned(to alignment: UInt64) -> Bool {
    (offset | length) % alignment == 0
      && (0..<memory.count).allSatisfy { index in
        let piece = memory.pointer[index]
        return (UInt(bitPattern: piece.iov_base) | UInt(piece.iov_len)) % UInt(alignment) == 0
      }
  }
}
