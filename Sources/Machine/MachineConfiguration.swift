import Accelerator
import Boot
import GuestMemory
import PlatformDevices

/// What a machine is made of; the same for every accelerator.
public struct MachineConfiguration: Sendable {
  /// More than an 8-bit APIC id can name, less the broadcast id.
  public static let maximumCPUs = 254
  /// The least that a boot ROM's areas, tables and a small kernel fit in.
  public static let minimumMemory: UInt64 = 1 << 20

  /// Bytes of RAM, whole pages.
  public var memory: UInt64 = 256 << 20
  /// vCPUs.
  public var cpus = 1
  /// The guest; nil runs the firmware alone.
  public var image: BootImage?
  /// The kernel's command line.
  public var commandLine = ""
  /// The initial RAM disk.
  public var initialRAMDisk: BootImage?
  /// Boot modules.
  public var modules: [BootModule] = []
  /// Where a flat binary goes.
  public var loadAddress: UInt64?
  /// The boot ROM; nil for a build without one.
  public var firmware: BootROM?
  /// Where COM1 sends its bytes.
  public var serial: any SerialOutput
  /// Where the interrupt controllers live; nil for the accelerator's local APICs and the VMM's rest, or
  /// all of them the VMM's where the accelerator has none.
  public var interrupts: InterruptControllerModel?
  /// Whether vCPUs take turns on one thread, a fixed number of instructions each; needs `.instructionLimit`. They do so
  /// anyway where the accelerator's machines have virtual time.
  public var takesTurns = false
  /// Where exits and what vCPUs do are written down, if anywhere: a trace a subject.
  public var traces: [Trace] = []
  /// What executes single instructions that the accelerator cannot, if anything.
  public var assist: (any InstructionAssist)?

  /// A machine of the default size whose COM1 sends to `serial`.
  public init(serial: any SerialOutput) {
    self.serial = serial
  }

  func validate() throws(MachineError) {
    guard (1...Self.maximumCPUs).contains(cpus) else { throw .cpus(asked: cpus, limit: Self.maximumCPUs) }
    guard memory >= Self.minimumMemory, memory & 0xfff == 0 else {
      throw .memorySize(asked: memory, minimum: Self.minimumMemory)
    }
  }
}
