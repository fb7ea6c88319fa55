import Accelerator
import ArgumentParser
import Host
import KVMAccelerator
import Machine
import SoftAccelerator

/// `--engine`, and what `auto` means on this host.
struct EngineOption: ParsableArguments {
  enum Engine: String, ExpressibleByArgument, CaseIterable {
    case auto, kvm, soft
  }

  @Option(help: "What runs the vCPUs: auto, kvm or soft.")
  var engine = Engine.auto

  /// Opens the engine. `auto` says what it took, and why, on standard error.
  ///
  /// `softOption` is an option that only the software engine has; `auto` then takes that one.
  func open(
    softOption: String? = nil, isDeterministic: Bool = false, cpu: CPUModel = .host
  ) throws(Failure) -> any Accelerator {
    // A guest that may go to KVM counts what it would count there.
    func soft() -> SoftAccelerator {
      let counts = cpu == .common && !isDeterministic
      return SoftAccelerator(
        isDeterministic: isDeterministic,
        hostCounterKilohertz: counts ? try? KVMAccelerator().counterKilohertz() : nil)
    }
    switch engine {
    case .soft: return soft()
    case .kvm where softOption != nil: throw .needsSoftEngine(option: softOption ?? "")
    case .kvm:
      let kvm: KVMAccelerator
      do { kvm = try KVMAccelerator() } catch { throw .accelerator(error) }
      if !kvm.capabilities.contains(.nativeRing0) { printError("\(EngineChoice.emulating)") }
      return kvm
    case .auto:
      if let softOption {
        printError("\(EngineChoice.asked(softOption))")
        return soft()
      }
      let kvm: KVMAccelerator
      do {
        kvm = try KVMAccelerator()
      } catch {
        printError("\(EngineChoice.noKVM(error))")
        return soft()
      }
      let probe = try RingZeroProbe.run()
      printError("\(EngineChoice.measured(probe))")
      if probe.isNative { return kvm }
      return soft()
    }
  }
}

/// What `--engine auto` took, and why.
enum EngineChoice: CustomStringConvertible {
  case noKVM(AcceleratorError)
  case measured(RingZeroProbe)
  case emulating
  case asked(String)

  var description: String {
    switch self {
    case .emulating:
      "swiftvmm: engine kvm: this host has no VMX or SVM, so KVM emulates ring 0 and passes no system call of a program on; "
        + "--engine soft runs real operating systems"
    case .asked(let option): "swiftvmm: engine soft: \(option) needs it"
    case .noKVM(let error): "swiftvmm: engine soft: \(error)"
    case .measured(let probe) where probe.isNative: "swiftvmm: engine kvm: it runs ring 0 natively"
    case .measured(let probe):
      "swiftvmm: engine soft: this host's KVM emulates ring 0 (\(Int(probe.speed.rounded())) million instructions a second); "
        + "--engine kvm takes it all the same"
    }
  }
}
