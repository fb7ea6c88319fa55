import Accelerator
import Host

/// Takes vCPUs out of guests that do not end: the test then sees `.interrupted` where it expects something else.
enum HangGuard {
  /// Far beyond what any test takes, so that it decides none.
  private static let nanoseconds: UInt64 = 60_000_000_000

  private static let loop: EventLoop? = {
    guard let loop = try? EventLoop() else { return nil }
    _ = try? HostThread(name: "hang guard") { loop.run() }
    return loop
  }()

  static func arm(_ vcpu: any VirtualCPU) -> EventLoop.Timer? {
    let timer = loop?.makeTimer { [weak vcpu] in vcpu?.kick() }
    timer?.arm(at: monotonicNanoseconds() + nanoseconds)
    return timer
  }
}
