import Accelerator
import Boot
import DeviceModel
import GuestMemory
import Host
import NetLayer
import StateTree

/// Why a machine could not be built, started, saved or restored.
public enum MachineError: Error, CustomStringConvertible {
  /// The number of vCPUs is out of bounds.
  case cpus(asked: Int, limit: Int)
  /// The guest's memory is out of bounds.
  case memorySize(asked: UInt64, minimum: UInt64)
  /// The accelerator has no interrupt controllers there.
  case interruptControllers(asked: InterruptControllerModel, engine: String)
  /// The accelerator cannot show the processor that was asked for.
  case cpuModel(CPUModel, engine: String, missing: [String])
  /// The guest has set registers that no other engine has.
  case notCarried([String])
  /// More disks than the bus has places.
  case disks(asked: Int, limit: Int)
  /// Two disks have one name.
  case diskName(String)
  /// More network cards than the bus has places beside the disks.
  case networkCards(asked: Int, limit: Int)
  /// A network card has the name of another device.
  case networkName(String)
  /// A network card has no network.
  case network(card: String, NetworkError)
  /// No disk has the name.
  case noDisk(String)
  case memory(GuestMemoryError)
  case accelerator(AcceleratorError)
  case device(DeviceModelError)
  case boot(BootError)
  case host(HostError)
  case state(StateError)
  /// The machine has something that is not saved.
  case unsaved(Unsaved)

  /// What no saved state carries.
  public enum Unsaved: Sendable {
    /// A state in which nothing can be saved.
    case state(RunState)
    /// Its pages are being saved or moved.
    case tracked
    /// A disk's requests that the host has failed and that are to be tried again.
    case stoppedRequests(disk: String)
  }

  /// One line: what failed, with which value, and what to do.
  public var description: String {
    switch self {
    case .cpus(let asked, let limit): "\(asked) vCPUs cannot be had: --cpus takes 1 to \(limit)"
    case .memorySize(let asked, let minimum):
      "\(asked) bytes of guest memory are too few: --memory takes \(minimum >> 20)M or more, in whole pages"
    case .interruptControllers(let asked, let engine):
      "engine \(engine) has no \(asked == .split ? "local APICs" : "interrupt controllers") of its own here: "
        + "use --kernel-irqchip off"
    case .cpuModel(let model, let engine, let missing):
      "engine \(engine) cannot show --cpu \(model.rawValue) here: it lacks \(missing.joined(separator: ", "))"
    case .notCarried(let what):
      "the guest uses what this engine cannot take over from another: \(what.joined(separator: ", ")); "
        + "start it with --cpu common where it is to move between engines"
    case .disks(let asked, let limit): "\(asked) disks do not fit: --disk may be given \(limit) times"
    case .networkCards(let asked, let limit):
      "\(asked) network cards do not fit: --net may be given \(limit) times beside the disks"
    case .networkName(let name): "two devices are called \(name): give the network card another id="
    case .network(let card, let error): "network card \(card): \(error)"
    case .noDisk(let name): "there is no disk \(name)"
    case .diskName(let name): "two disks are called \(name): give one of them another id="
    case .memory(let error): "\(error)"
    case .accelerator(let error): "\(error)"
    case .device(let error): "\(error)"
    case .boot(let error): "\(error)"
    case .host(let error): "\(error)"
    case .state(let error): "\(error)"
    case .unsaved(.state(let state)): "the machine cannot be saved while it is in state \(state.rawValue)"
    case .unsaved(.tracked): "the machine is being saved or moved already: wait until that has ended"
    case .unsaved(.stoppedRequests(let disk)):
      "requests of disk \(disk) wait for their I/O error to be mended: resume the machine before it is saved"
    }
  }
}

/// The texts that this target prints about a guest.
enum MachineMessage {
  case crash(CrashReport.Reason, vcpu: Int)

  /// The headline, what it means, and what to do.
  var lines: [String] {
    switch self {
    case .crash(.tripleFault, let vcpu):
      [
        "the guest crashed: triple fault on vCPU \(vcpu)",
        "an exception could not be delivered, nor the double fault after it: look at IDTR, the stack and CR2",
      ]
    case .crash(.emulationFailure, let vcpu):
      [
        "the guest crashed: vCPU \(vcpu) met an instruction that this host's KVM cannot execute",
        "KVM emulates ring 0 without VMX or SVM and lacks this instruction, and so does the software CPU; try --engine soft",
      ]
    case .crash(.memoryFault(let address), let vcpu):
      [
        "the guest crashed: vCPU \(vcpu) fetched an instruction or walked page tables outside memory, at guest-physical \(address)",
        "look at RIP and CR3; nothing is mapped there",
      ]
    case .crash(.entryFailure(let reason), let vcpu):
      [
        "the guest crashed: the processor refused to enter vCPU \(vcpu), reason 0x\(String(reason, radix: 16))",
        "the state below is not one the architecture allows",
      ]
    case .crash(.internalError(let subcode, let data), let vcpu):
      [
        "the guest crashed: the host's KVM gave up on vCPU \(vcpu), suberror \(subcode), data 0x\(String(data, radix: 16))",
        "the host's kernel log may say more",
      ]
    case .crash(.reportedByGuest, let vcpu):
      ["the guest reported that it crashed, on vCPU \(vcpu)", "its own console has the reason"]
    case .crash(.denied(let what), let vcpu):
      [
        "the guest was stopped: \(what), on vCPU \(vcpu)",
        "the hardening policy says so; its audit tells what led there",
      ]
    case .crash(.unexpectedExit(let exit), let vcpu):
      [
        "vCPU \(vcpu) stopped for a reason that this machine does not use: \(exit)",
        "this is a bug of swiftvmm: please report it with the lines below",
      ]
    }
  }
}
