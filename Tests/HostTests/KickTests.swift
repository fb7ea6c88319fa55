import Glibc
import Host
import Synchronization
import Testing

@Suite struct Kicks {
  /// A program may be started with every signal blocked, which its threads inherit.
  @Test func reachThreadsOfAProgramThatBlocksThem() throws {
    let result = Condition<Int32?>(nil)
    let starter = try HostThread(name: "starter") {
      var all = sigset_t()
      sigfillset(&all)
      pthread_sigmask(SIG_BLOCK, &all, nil)
      try? ThreadIdentity.installKickHandler()
      let identity = Condition<ThreadIdentity?>(nil)
      let sleeper = try? HostThread(name: "sleeper") {
        identity.withLock { $0 = ThreadIdentity.current }
        let code = poll(nil, 0, 50_000) < 0 ? errno : 0
        result.withLock { $0 = code }
      }
      let target = identity.wait { $0 }
      // The sleeper may not sleep yet when the first kick comes.
      while result.withLock({ $0 == nil }) {
        target.interrupt()
        usleep(1000)
      }
      sleeper?.join()
    }
    starter.join()
    #expect(result.wait { $0 } == EINTR)
  }
}
