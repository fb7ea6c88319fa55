import Glibc

/// Says which seed's cases ran when a signal ends the process, and lets the signal go on to whoever had it before.
enum CrashNote {
  private static let capacity = 64
  nonisolated(unsafe) private static let text = UnsafeMutablePointer<UInt8>.allocate(capacity: capacity)
  nonisolated(unsafe) private static var count = 0
  nonisolated(unsafe) private static let old = UnsafeMutablePointer<sigaction>.allocate(capacity: 65)

  static func set(_ seed: UInt64) {
    let line = Array("RandomCPU: ended in seed \(seed)\n".utf8)
    text.update(from: line, count: line.count)
    count = line.count
    // Cases end after some thousand instructions: one that takes a minute hangs.
    alarm(60)
  }

  static func install() {
    for signal in [SIGILL, SIGTRAP, SIGSEGV, SIGBUS, SIGFPE, SIGABRT, SIGALRM, SIGTERM, SIGINT] {
      var action = sigaction()
      action.__sigaction_handler.sa_handler = { signal in
        _ = write(2, CrashNote.text, CrashNote.count)
        sigaction(signal, CrashNote.old + Int(signal), nil)
        // What was sent, and not raised by an instruction that will be executed again.
        if [SIGALRM, SIGTERM, SIGINT].contains(signal) { raise(signal) }
      }
      sigaction(signal, &action, old + Int(signal))
    }
  }
}
