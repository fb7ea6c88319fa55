import Glibc
import Host

/// What was sent in which order, a line of JSON a run of pages: for whoever wants to check it. docs/migration.md has the
/// members.
final class MigrationTrace: @unchecked Sendable {
  private let file: FileDescriptor
  private var text = ""

  init(_ path: String) throws(MigrationError) {
    do { file = try FileDescriptor.open(path, O_WRONLY | O_CREAT | O_TRUNC) } catch { throw .host(error) }
  }

  func record(round: Int, iteration: Int, pages: Range<Int>, pageClass: String) {
    text += #"{"round": \#(round), "iteration": \#(iteration), "first": \#(pages.lowerBound), "#
    text += #""count": \#(pages.count), "class": "\#(pageClass)"}"# + "\n"
    if text.utf8.count > 1 << 16 { flush() }
  }

  /// A trace that cannot be written does not end a migration.
  func flush() {
    var text = text
    self.text = ""
    text.withUTF8 { try? file.writeAll(UnsafeRawBufferPointer($0)) }
  }
}
