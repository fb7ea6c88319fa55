import Accelerator
import ArgumentParser
import CLinux
import Glibc
import Host
import JSON
import KVMAccelerator

struct DoctorCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "doctor",
    abstract: "Say what this host can do, what was probed, and how to get what is missing.",
    discussion: "Example: swiftvmm doctor --json")

  @Flag(help: "Print JSON.")
  var json = false

  func run() throws {
    let findings = Self.examine()
    if json {
      var document = JSONObject()
      for finding in findings {
        var entry: JSONObject = ["state": .string(finding.state.rawValue), "value": .string(finding.value)]
        if let remedy = finding.remedy { entry["remedy"] = .string(remedy) }
        document[finding.subject] = .object(entry)
      }
      print(JSONValue.object(document).serialized(pretty: true))
      return
    }
    for finding in findings {
      let padding = String(repeating: " ", count: max(1, 24 - finding.subject.count))
      print("\(finding.state.mark) \(finding.subject)\(padding)\(finding.value)")
      if let remedy = finding.remedy { print("    -> \(remedy)") }
    }
  }

  /// One thing that was looked at.
  struct Finding {
    enum State: String {
      case available, limited, missing

      var mark: String {
        switch self {
        case .available: "+"
        case .limited: "~"
        case .missing: "-"
        }
      }
    }

    let subject: String
    let state: State
    let value: String
    var remedy: String?
  }

  private static func examine() -> [Finding] {
    [host()] + kvm() + [
      file("/dev/net/tun", "tap networking", "load the host's tun module"),
      file("/dev/userfaultfd", "userfaultfd", "the system call may still work; needs Linux 6.1 for the device"),
      guests(),
    ] + peers()
  }

  private static func host() -> Finding {
    let memory = UInt64(sysconf(Int32(_SC_PHYS_PAGES))) * UInt64(sysconf(Int32(_SC_PAGESIZE)))
    var name = utsname()
    uname(&name)
    let release = withUnsafeBytes(of: &name.release) { bytes in
      String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
    }
    let processors = sysconf(Int32(_SC_NPROCESSORS_ONLN))
    return Finding(
      subject: "host", state: .available, value: "Linux \(release), \(processors) CPUs, \(memory >> 20) MiB")
  }

  private static func kvm() -> [Finding] {
    let accelerator: KVMAccelerator
    do {
      accelerator = try KVMAccelerator()
    } catch {
      return [
        Finding(
          subject: "kvm", state: .missing, value: "\(error)",
          remedy: "load the host's kvm_intel or kvm_amd module, or ask for nested virtualization")
      ]
    }
    var findings: [Finding] = []
    if accelerator.capabilities.contains(.nativeRing0) {
      findings.append(Finding(subject: "kvm", state: .available, value: "ring 0 runs natively (VMX or SVM)"))
    } else {
      findings.append(
        Finding(
          subject: "kvm", state: .limited,
          value: "paravirtual: no VMX or SVM, the kernel emulates ring 0 at 1-2 million instructions a second",
          remedy: "--engine auto takes the software CPU, which runs real operating systems"))
    }
    let names: [(AcceleratorCapabilities, String)] = [
      (.readOnlyMemory, "read-only memory"), (.dirtyLog, "dirty log"), (.dirtyRing, "dirty ring"),
      (.inKernelInterrupts, "in-kernel interrupts"), (.splitInterrupts, "split interrupts"),
      (.eventNotifiers, "irqfd, ioeventfd"), (.guestDebug, "guest debugging"), (.watchpoints, "watchpoints"),
    ]
    for (capability, name) in names {
      let present = accelerator.capabilities.contains(capability)
      findings.append(
        Finding(
          subject: "kvm \(name)", state: present ? .available : .missing, value: present ? "yes" : "no",
          remedy: present ? nil : "the host's KVM does not offer it"))
    }
    return findings
  }

  private static func file(_ path: String, _ subject: String, _ remedy: String) -> Finding {
    access(path, R_OK | W_OK) == 0
      ? Finding(subject: subject, state: .available, value: path)
      : Finding(subject: subject, state: .missing, value: "\(path): \(HostError.reason(errno))", remedy: remedy)
  }

  private static func guests() -> Finding {
    do {
      let count = try GuestCatalogue.load().guests.count
      return Finding(subject: "sample guests", state: .available, value: "\(count)")
    } catch {
      return Finding(subject: "sample guests", state: .missing, value: "not built", remedy: "run scripts/build-guests")
    }
  }

  /// Programs that tests and benchmarks compare with.
  private static func peers() -> [Finding] {
    let packages = [
      ("qemu-system-x86_64", "qemu-system-x86"), ("qemu-img", "qemu-utils"), ("gdb", "gdb"), ("tshark", "tshark"),
    ]
    return packages.map { program, package in
      let folders = getenv("PATH").map { String(cString: $0).split(separator: ":") } ?? []
      guard let folder = folders.first(where: { access("\($0)/\(program)", X_OK) == 0 }) else {
        return Finding(
          subject: "peer \(program)", state: .missing, value: "not installed",
          remedy: "apt-get install \(package) (only tests and benchmarks use it)")
      }
      return Finding(subject: "peer \(program)", state: .available, value: "\(folder)/\(program)")
    }
  }
}
