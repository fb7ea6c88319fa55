import CLinux
import Glibc

/// Owner of one `mmap` range: unmaps it exactly once.
public struct MemoryMapping: ~Copyable, @unchecked Sendable {
  /// First byte of the range.
  public let base: UnsafeMutableRawPointer
  /// Length in bytes.
  public let count: Int

  /// Maps `count` bytes of a descriptor, shared.
  public init(
    _ descriptor: borrowing FileDescriptor, offset: Int = 0, count: Int, writable: Bool = true
  ) throws(HostError) {
    try self.init(
      descriptor: descriptor.rawValue, offset: offset, count: count,
      protection: writable ? PROT_READ | PROT_WRITE : PROT_READ, flags: MAP_SHARED | MAP_NORESERVE)
  }

  /// Maps `count` zero bytes that belong to this process alone.
  public init(anonymous count: Int) throws(HostError) {
    try self.init(
      descriptor: -1, offset: 0, count: count, protection: PROT_READ | PROT_WRITE,
      flags: MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
  }

  private init(
    descriptor: Int32, offset: Int, count: Int, protection: Int32, flags: Int32
  ) throws(HostError) {
    let address = mmap(nil, count, protection, flags, descriptor, off_t(offset))
    let code = errno
    guard let address, address != MAP_FAILED else { throw .systemCall("mmap of \(count) bytes", errno: code) }
    self.base = address
    self.count = count
  }

  /// Maps as many bytes of a file as the range has in its place, private to this process.
  public borrowing func replace(
    withCopyOf descriptor: borrowing FileDescriptor, offset: UInt64
  ) throws(HostError) {
    let address = mmap(
      base, count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, descriptor.rawValue, off_t(offset))
    let code = errno
    guard let address, address != MAP_FAILED else { throw .systemCall("mmap of \(count) bytes", errno: code) }
  }

  /// Asks for huge pages, as QEMU does for guest RAM; a kernel without them ignores it.
  public borrowing func adviseHugePages() {
    _ = madvise(base, count, MADV_HUGEPAGE)
  }

  deinit {
    munmap(base, count)
  }
}

/// An anonymous file in memory (memfd_create(2)), sealed against shrinking so that no mapping of it can fault.
public func makeMemoryFile(name: String, size: Int) throws(HostError) -> FileDescriptor {
  FileDescriptor(owning: try check("memfd_create of \(size) bytes", clinux_memory_file(name, Int64(size))))
}
