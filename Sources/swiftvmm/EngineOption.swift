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
    do {
      switch engine {
      case .kvm: return try KVMAccelerator()
      case .soft: return SoftAccelerator()
      case .auto:
        let kvm = try KVMAccelerator()
        if !kvm.capabilities.contains(.nativeRing0) {
          printError(
            "swiftvmm: engine kvm: this host has no VMX or SVM, so its KVM emulates ring 0 "
              + "(1-2 million instructions a second); guests that need more stop with a report")
        }
        return kvm
      }
    } catch let failure as Failure {
      throw failure
    } catch let error as AcceleratorError {
      throw .accelerator(error)
    } catch {
      throw .engineMissing(engine.rawValue, reason: "\(error)")
    }
  }
}
