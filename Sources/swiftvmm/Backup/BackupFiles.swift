import BlockLayer
import CLinux
import Glibc
import Host
import JSON

/// Small files that are replaced whole or not at all.
enum BackupFiles {
  /// Bytes that a journal or a record of backups has at most.
  private static let longest = 64 << 20

  static func exists(_ path: String) -> Bool { access(path, F_OK) == 0 }

  static func isFolder(_ path: String) -> Bool {
    var status = stat()
    return stat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFDIR
  }

  static func isSocket(_ path: String) -> Bool {
    var status = stat()
    return stat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFSOCK
  }

  /// What is before the last slash.
  static func folder(of path: String) -> String {
    guard let slash = path.lastIndex(of: "/") else { return "." }
    return slash == path.startIndex ? "/" : String(path[..<slash])
  }

  /// One name for a file, however it was called; as it is where there is no such file.
  static func real(_ path: String) -> String {
    guard !NBDURI.isURI(path), let name = realpath(path, nil) else { return BlockGraph.absolutePath(path) }
    defer { free(name) }
    return String(cString: name)
  }

  /// What is behind the last slash.
  static func name(of path: String) -> String { String(path.split(separator: "/").last ?? "") }

  static func makeFolder(_ path: String) throws(Failure) {
    guard mkdir(path, 0o700) == 0 || errno == EEXIST else {
      throw .backup(.file(call: "make", path: path, errno: errno))
    }
  }

  static func remove(_ path: String) throws(Failure) {
    do throws(BlockError) { try CommitResult.removeFile(path) } catch { throw .disk(error) }
  }

  /// Makes names in a folder durable.
  static func flush(folder path: String) throws(Failure) {
    do throws(HostError) {
      let folder = try FileDescriptor.open(path, O_RDONLY | O_DIRECTORY)
      _ = try check("fsync", fsync(folder.rawValue))
    } catch {
      throw .backup(.file(call: "flush the folder", path: path, errno: error.errno))
    }
  }

  /// Puts a JSON file in the place of an older one, or where `isNew` of none, durably. What it returns is locked until it is closed.
  @discardableResult
  static func replace(_ path: String, _ json: JSONValue, isNew: Bool = false) throws(Failure) -> FileDescriptor {
    let new = path + ".new"
    do throws(HostError) {
      let file = try FileDescriptor.open(new, O_RDWR | O_CREAT | O_TRUNC, mode: 0o600)
      _ = try check("lock", flock(file.rawValue, LOCK_EX | LOCK_NB))
      let bytes = Array((json.serialized(pretty: true) + "\n").utf8)
      let written = bytes.withUnsafeBytes { buffer in
        Result { () throws(HostError) in try file.writeAll(buffer) }
      }
      try written.get()
      _ = try check("fsync", fsync(file.rawValue))
      if isNew {
        _ = try check("link", link(new, path))
        unlink(new)
      } else {
        _ = try check("rename", rename(new, path))
      }
      try flush(after: path)
      return file
    } catch {
      throw .backup(.file(call: "write", path: path, errno: error.errno))
    }
  }

  private static func flush(after path: String) throws(HostError) {
    let folder = try FileDescriptor.open(folder(of: path), O_RDONLY | O_DIRECTORY)
    _ = try check("fsync", fsync(folder.rawValue))
  }

  static func read(_ path: String) throws(Failure) -> JSONValue {
    var bytes: [UInt8] = []
    do throws(HostError) {
      let file = try FileDescriptor.open(path, O_RDONLY)
      var buffer = [UInt8](repeating: 0, count: 65536)
      while bytes.count <= longest {
        let count = buffer.withUnsafeMutableBytes { target in
          Result { () throws(HostError) in try file.read(into: target) ?? 0 }
        }
        let read = try count.get()
        if read == 0 { break }
        bytes += buffer[..<read]
      }
    } catch {
      throw .backup(.file(call: "read", path: path, errno: error.errno))
    }
    guard let text = String(validating: bytes, as: UTF8.self), bytes.count <= longest else {
      throw .backup(.malformed(path: path, reason: "it is no text"))
    }
    do throws(JSONError) { return try JSONValue(parsing: text) } catch {
      throw .backup(.malformed(path: path, reason: "\(error)"))
    }
  }
}
