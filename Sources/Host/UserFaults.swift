import CLinux
import Glibc

/// Pages of a shared mapping that come when they are touched (userfaultfd(2)): whoever touches one that is not there waits,
/// be it a thread or the kernel, until it is put there.
public struct UserFaults: ~Copyable, Sendable {
  /// Readable while accesses wait.
  public let descriptor: FileDescriptor
  private nonisolated(unsafe) let base: UnsafeMutableRawPointer
  private let count: Int

  /// For `count` bytes from `base`, a mapping of a memory file; nothing is changed yet.
  public init(_ base: UnsafeMutableRawPointer, count: Int) throws(HostError) {
    descriptor = FileDescriptor(owning: try check("userfaultfd", clinux_user_faults()))
    self.base = base
    self.count = count
  }

  /// From now on, who touches what is not there waits.
  public borrowing func begin() throws(HostError) {
    _ = try check("ioctl(UFFDIO_REGISTER)", clinux_user_faults_begin(descriptor.rawValue, base, UInt64(count)))
  }

  /// What is not there is zeros from now on, as it was before `begin`; whoever waits goes on.
  public borrowing func end() {
    _ = clinux_user_faults_end(descriptor.rawValue, base, UInt64(count))
  }

  /// Offsets of accesses that wait; none twice while it waits.
  public borrowing func take() throws(HostError) -> [Int] {
    var addresses = [UInt64](repeating: 0, count: 16)
    let taken = try check(
      "read of userfaultfd", clinux_user_faults_take(descriptor.rawValue, &addresses, Int32(addresses.count)))
    let first = UInt64(UInt(bitPattern: base))
    return addresses.prefix(Int(taken)).map { Int($0 - first) }
  }

  /// Puts a page's bytes there, unless it is there already.
  public borrowing func put(_ bytes: UnsafeRawPointer, at offset: Int, count: Int) throws(HostError) {
    try place("UFFDIO_COPY", offset, count) {
      clinux_user_faults_copy(descriptor.rawValue, base + offset, bytes, UInt64(count))
    }
  }

  /// Puts zeros there, unless it is there already.
  public borrowing func putZeros(at offset: Int, count: Int) throws(HostError) {
    try place("UFFDIO_ZEROPAGE", offset, count) {
      clinux_user_faults_zero(descriptor.rawValue, base + offset, UInt64(count))
    }
  }

  private borrowing func place(_ name: String, _ offset: Int, _ count: Int, _ call: () -> Int32) throws(HostError) {
    while call() < 0 {
      switch errno {
      // The process's mappings are about to change.
      case EAGAIN, EINTR: continue
      case EEXIST:
        _ = clinux_user_faults_wake(descriptor.rawValue, base + offset, UInt64(count))
        return
      default: throw .systemCall("ioctl(\(name))", errno: errno)
      }
    }
  }
}
