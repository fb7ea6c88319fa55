import CLinux
import Glibc
import Synchronization

/// A joinable POSIX thread with a name, for vCPUs and event loops, which are never Tasks.
public final class HostThread: @unchecked Sendable {
  private let handle: pthread_t
  private let joined = Mutex(false)

  /// Starts a thread that runs `body` once.
  /// Debuggers show the name, of which the kernel keeps 15 bytes.
  public init(name: String, _ body: @escaping @Sendable () -> Void) throws(HostError) {
    let box = Unmanaged.passRetained(Body(name: name, run: body))
    var handle = pthread_t()
    let code = pthread_create(
      &handle, nil,
      { argument in
        let body = Unmanaged<Body>.fromOpaque(argument!).takeRetainedValue()
        clinux_name_thread(String(body.name.prefix(15)))
        body.run()
        return nil
      }, box.toOpaque())
    guard code == 0 else {
      box.release()
      throw .thread(name: name, errno: code)
    }
    self.handle = handle
  }

  /// A thread that nobody waited for goes on, and its stack goes when it ends.
  deinit {
    if !joined.withLock({ $0 }) { pthread_detach(handle) }
  }

  /// Waits until the body has returned. Further calls return at once.
  public func join() {
    joined.withLock { joined in
      guard !joined else { return }
      pthread_join(handle, nil)
      joined = true
    }
  }

  private final class Body: Sendable {
    let name: String
    let run: @Sendable () -> Void

    init(name: String, run: @escaping @Sendable () -> Void) {
      self.name = name
      self.run = run
    }
  }
}

/// The calling thread as a target of directed signals.
public struct ThreadIdentity: Sendable {
  /// Sent to a vCPU thread to take it out of the guest; its handler does nothing.
  public static let kickSignal: Int32 = SIGUSR1

  /// The kernel's thread id, as `ps -L` shows it.
  public let id: Int32

  /// The thread with a kernel thread id.
  public init(id: Int32) {
    self.id = id
  }

  /// The calling thread.
  public static var current: ThreadIdentity { ThreadIdentity(id: clinux_gettid()) }

  /// The calling thread, from now on one that `interrupt` reaches.
  ///
  /// Threads inherit their creator's signal mask, and the workers that run Swift's tasks block every signal.
  public static func becomeInterruptible() -> ThreadIdentity {
    var signals = sigset_t()
    sigemptyset(&signals)
    sigaddset(&signals, kickSignal)
    pthread_sigmask(SIG_UNBLOCK, &signals, nil)
    return current
  }

  /// Makes system calls of that thread that can be interrupted return EINTR.
  ///
  /// It must have called `becomeInterruptible`. A thread that has ended is no error: there is nothing left to interrupt.
  public func interrupt() {
    _ = clinux_tgkill(getpid(), id, Self.kickSignal)
  }

  /// Installs the kick signal's empty handler, once per process, and lets the signal through to the calling thread and
  /// those that it starts from now on.
  public static func installKickHandler() throws(HostError) {
    _ = try check("sigaction", clinux_install_kick_handler(kickSignal))
  }
}

/// Nanoseconds of the host's monotonic clock.
public func monotonicNanoseconds() -> UInt64 {
  var time = timespec()
  clock_gettime(CLOCK_MONOTONIC, &time)
  return UInt64(time.tv_sec) &* 1_000_000_000 &+ UInt64(time.tv_nsec)
}
