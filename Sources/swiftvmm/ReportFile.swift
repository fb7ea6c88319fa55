import Glibc
import Host
import JSON

extension JSONValue {
  /// Writes a report to a file, or for `-` to standard output.
  func writeReport(to path: String) throws(Failure) {
    let text = serialized(pretty: true) + "\n"
    do {
      let file =
        path == "-"
        ? FileDescriptor(owning: dup(STDOUT_FILENO)) : try FileDescriptor.open(path, O_WRONLY | O_CREAT | O_TRUNC)
      let bytes = Array(text.utf8)
      let result = bytes.withUnsafeBytes { buffer in
        Result { () throws(HostError) in try file.writeAll(buffer) }
      }
      try result.get()
    } catch {
      throw .output(path: path, reason: HostError.reason(error.errno))
    }
  }
}
