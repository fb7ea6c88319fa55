import Glibc
import Host

/// A machine in another process, for a benchmark: ours or a peer's.
struct BenchProcess {
  let name: String
  let command: [String]
  /// The statuses that a good run may end with.
  var statuses: Set<Int32> = [0]

  /// A machine with a Linux or PVH kernel on QEMU's software emulation, with a console on standard output.
  static func qemu(kernel: String, append: String, more: [String] = []) -> BenchProcess {
    BenchProcess(
      name: "qemu-tcg",
      command: [
        "timeout", "300", "qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-m", "256", "-nodefaults", "-display",
        "none", "-no-reboot", "-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel", kernel,
        "-append", append,
      ] + more)
  }

  /// The same on our software engine.
  static func soft(kernel: String, append: String, more: [String] = []) -> BenchProcess {
    BenchProcess(
      name: "swiftvmm-soft",
      command: [
        "/proc/self/exe", "run", kernel, "--engine", "soft", "--memory", "256M", "--time-limit", "300", "--append",
        append,
      ] + more)
  }

  /// Runs it; where that is not possible or ends otherwise than it should, `note` says why.
  func run(_ note: (String) -> Void) throws(Failure) -> ChildProcess? {
    let child: ChildProcess
    do {
      child = try ChildProcess.run(command, keepingOutput: true)
    } catch .path(_, let path, ENOENT) {
      note("\(name) left out: \(path) is not installed")
      return nil
    } catch {
      throw .host(error)
    }
    if statuses.contains(child.status) { return child }
    switch child.status {
    case ExitStatus.unavailable.rawValue: note("\(name) left out: it answered 69, the engine is not available")
    case 127: note("\(name) left out: \(command[2]) is not installed")
    default: note("\(name) left out: it ended with status \(child.status)")
    }
    return nil
  }
}
