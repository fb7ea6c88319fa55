import CLinux
import Glibc
import Host
import Machine

/// SIGINT, SIGTERM and SIGHUP end the run in good order; SIGPIPE is an error of the write that meets it.
final class Signals: Sendable {
  private let descriptor: FileDescriptor

  /// Blocks the signals before any thread is started, so that only the loop sees them.
  init(_ machine: Machine, on loop: EventLoop) throws(Failure) {
    signal(SIGPIPE, SIG_IGN)
    do {
      descriptor = FileDescriptor(
        owning: try check("signalfd", clinux_signal_descriptor([SIGINT, SIGTERM, SIGHUP], 3)))
      try loop.add(descriptor.rawValue, .readable) { [weak machine] _ in machine?.finish(.interrupted) }
    } catch {
      throw .host(error)
    }
  }
}
