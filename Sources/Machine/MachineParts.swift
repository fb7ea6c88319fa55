import Accelerator
import GuestMemory
import Host

/// What the builder hands to the machine.
struct MachineParts {
  var memory: GuestMemory
  var virtualMachine: any VirtualMachine
  var vcpus: [any VirtualCPU]
  var cpuid: [CPUIDLeaf] = []
  var loop: EventLoop
  var clock: any GuestClock
  var takesTurns = false
  var platform: MachinePlatform
  var interrupts: MachineInterrupts
  var boot: BootPlan
  var assist: (any InstructionAssist)?
  var exitTrace: Trace?
  var supervisor: (any ViewSupervisor)?
}
