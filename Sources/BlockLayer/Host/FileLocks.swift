import CLinux
import Glibc

/// Locks that QEMU and its tools understand: a shared open-file-description lock on byte 100 + n says "I use permission
/// n", one on byte 200 + n says "I do not let others use permission n". Whoever opens a file takes its locks first and
/// then looks for contradicting ones of others.
enum FileLocks {
  private static let usedBase: Int64 = 100
  private static let refusedBase: Int64 = 200

  private enum Permission: Int64, CaseIterable {
    case consistentRead = 0
    case write = 1
    case resize = 3

    var use: String {
      switch self {
      case .consistentRead: "read"
      case .write: "write to"
      case .resize: "resize"
      }
    }
  }

  /// What an image's user lets nobody else do, reader or writer.
  private static let refused: [Permission] = [.write, .resize]

  /// The kernel ends the transfers of a killed process, and with them its locks, a moment after the process.
  private static let patience: (attempts: Int, microseconds: UInt32) = (50, 10_000)

  static func take(_ file: Int32, path: String, writable: Bool) throws(BlockError) {
    var attempt = 1
    while true {
      do throws(BlockError) {
        return try takeNow(file, path: path, writable: writable)
      } catch {
        guard case .locked = error, attempt < patience.attempts else { throw error }
      }
      release(file)
      usleep(patience.microseconds)
      attempt += 1
    }
  }

  private static func takeNow(_ file: Int32, path: String, writable: Bool) throws(BlockError) {
    let used: [Permission] = writable ? [.consistentRead, .write, .resize] : [.consistentRead]
    let bytes = used.map { usedBase + $0.rawValue } + refused.map { refusedBase + $0.rawValue }
    for byte in bytes where clinux_lock_byte(file, byte, 1) < 0 {
      // Filesystems without locks cannot protect anybody; QEMU goes on there too.
      if errno == ENOLCK || errno == EOPNOTSUPP || errno == EINVAL || errno == ENOSYS { return }
      throw .io(call: "lock", path: path, errno: errno)
    }
    for permission in used where clinux_byte_is_locked(file, refusedBase + permission.rawValue) == 1 {
      throw .locked(path: path, use: permission.use)
    }
    for permission in refused where clinux_byte_is_locked(file, usedBase + permission.rawValue) == 1 {
      throw .locked(path: path, use: "keep it from being changed while they read or write")
    }
  }

  static func release(_ file: Int32) {
    for permission in Permission.allCases {
      _ = clinux_lock_byte(file, usedBase + permission.rawValue, 0)
      _ = clinux_lock_byte(file, refusedBase + permission.rawValue, 0)
    }
  }
}
