import Accelerator
import ArgumentParser
import Host
import KVMAccelerator
import SoftAccelerator

/// `--engine`, and what `auto` means on this host.
struct EngineOption: ParsableArguments {
  enum Engine: String, ExpressibleByArgument, CaseIterable {
    case auto, kvm, soft
  }

  @Option(help: "What runs the vCPUs: auto, kvm or soft.")
  var engine = Engine.auto

  /// Opens the engine. `auto` says what it took, and why, on standard error.
  func open() throws(Failure) -> any Accelerator {
    switch engine {
    case .soft: return SoftAccelerator()
    case .kvm:
      do { return try KVMAccelerator() } catch { throw .accelerator(error) }
    case .auto:
      do throws(AcceleratorError) {
        let kvm = try KVMAccelerator()
        if kvm.capabilities.contains(.nativeRing0) { return kvm }
        printError(
          "swiftvmm: engine soft: this host has no VMX or SVM, so its KVM would emulate ring 0; --engine kvm insists")
      } catch {
        printError("swiftvmm: engine soft: \(error)")
      }
      return SoftAccelerator()
    }
  }
}
