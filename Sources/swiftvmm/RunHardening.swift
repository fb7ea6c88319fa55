import Accelerator
import Glibc
import Host
import LoaderHardening
import Machine

/// `--harden` and `--audit`.
struct RunHardening {
  let supervisor: LoaderHardening
  let log: AuditLog?

  init(_ path: String, audit: String?) throws(Failure) {
    let policy = try Self.policy(path)
    if let path = audit ?? policy.audit {
      let log = try Self.openLog(path)
      self.log = log
      supervisor = LoaderHardening(policy) { log.record($0) }
    } else {
      log = nil
      supervisor = LoaderHardening(policy, record: nil)
    }
  }

  private static func openLog(_ path: String) throws(Failure) -> AuditLog {
    do {
      return AuditLog(try FileDescriptor.open(path, O_WRONLY | O_CREAT | O_TRUNC))
    } catch {
      throw .output(path: path, reason: HostError.reason(error.errno))
    }
  }

  /// Reads a policy file; `default` is the policy that says nothing but its version.
  static func policy(_ path: String) throws(Failure) -> HardeningPolicy {
    if path == "default" { return HardeningPolicy() }
    let bytes = try InputFile.bytes(path)
    do { return try HardeningPolicy(parsing: bytes) } catch { throw .hardening(path: path, error) }
  }

  /// Looks now and then whether interrupts have waited long enough; until the timer is cancelled.
  func watch(_ machine: Machine) -> EventLoop.Timer? {
    guard supervisor.policy.interrupts == .hold else { return nil }
    let period = UInt64(supervisor.policy.interruptBound) * 1_000_000 / 2
    let box = TimerBox()
    let timer = machine.loop.makeTimer { [supervisor] in
      supervisor.checkBounds()
      box.timer?.arm(at: monotonicNanoseconds() + period)
    }
    box.timer = timer
    timer.arm(at: monotonicNanoseconds() + period)
    return timer
  }
}

/// A timer for its own handler, on its loop's thread after it was set.
private final class TimerBox: @unchecked Sendable {
  weak var timer: EventLoop.Timer?
}

/// Small files that the user names.
enum InputFile {
  private static let limit = 16 << 20

  static func bytes(_ path: String) throws(Failure) -> [UInt8] {
    let descriptor = open(path, O_RDONLY | O_CLOEXEC)
    guard descriptor >= 0 else { throw .input("cannot open \(path): \(HostError.reason(errno))") }
    defer { close(descriptor) }
    var bytes: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 64 << 10)
    while true {
      let count = read(descriptor, &buffer, buffer.count)
      guard count >= 0 else { throw .input("cannot read \(path): \(HostError.reason(errno))") }
      if count == 0 { return bytes }
      bytes += buffer[..<count]
      guard bytes.count <= limit else { throw .input("\(path) is larger than 16 MiB: it cannot be what is wanted") }
    }
  }
}
