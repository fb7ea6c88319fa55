import Glibc
import Host

/// A file in /tmp that goes away with its owner.
struct TemporaryFile: ~Copyable {
  let path: String

  init(_ bytes: [UInt8] = []) throws(Failure) {
    var template = Array("/tmp/swiftvmm-bench-XXXXXX".utf8CString)
    let file = mkstemp(&template)
    path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    guard file >= 0 else { throw .output(path: path, reason: HostError.reason(errno)) }
    let owner = FileDescriptor(owning: file)
    do {
      let result = bytes.withUnsafeBytes { bytes in
        Result { () throws(HostError) in try owner.writeAll(bytes) }
      }
      try result.get()
    } catch {
      unlink(path)
      throw .output(path: path, reason: "\(error)")
    }
  }

  deinit { unlink(path) }
}
