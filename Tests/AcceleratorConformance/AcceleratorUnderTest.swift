import Accelerator
import GuestMemory
import KVMAccelerator
import SoftAccelerator
import Testing

/// One accelerator, as one way of setting it up. Every test runs once for each of `catalogue`.
struct AcceleratorUnderTest: Sendable, CustomTestStringConvertible {
  let testDescription: String
  let interrupts: InterruptControllerModel
  /// Entries of each vCPU's dirty ring, where it has one instead of the dirty log.
  let dirtyRingEntries: Int?
  let open: @Sendable () throws(AcceleratorError) -> any Accelerator

  static let catalogue: [AcceleratorUnderTest] = [
    kvm("kvm, controllers in the kernel", .inKernel),
    kvm("kvm, split controllers", .split),
    kvm("kvm, controllers in the VMM", .userSpace),
    kvm("kvm, dirty ring", .inKernel, dirtyRingEntries: 1024),
    AcceleratorUnderTest(testDescription: "soft", interrupts: .userSpace, dirtyRingEntries: nil) {
      () throws(AcceleratorError) in SoftAccelerator()
    },
  ]
  /// Those whose local APICs are in the accelerator.
  static let withLocalAPIC = catalogue.filter { $0.interrupts != .userSpace }
  /// Those whose PIC, IOAPIC and PIT are there too.
  static let withController = catalogue.filter { $0.interrupts == .inKernel }
  /// Those whose PIC is in the VMM, which injects its interrupts.
  static let withoutController = catalogue.filter { $0.interrupts != .inKernel }
  /// Those whose interrupt controllers are all in the VMM, as views need.
  static let withViews = catalogue.filter { $0.interrupts == .userSpace }
  static let withDirtyLog = catalogue.filter { $0.dirtyRingEntries == nil }
  static let withDirtyRing = catalogue.filter { $0.dirtyRingEntries != nil }

  private static func kvm(
    _ name: String, _ interrupts: InterruptControllerModel, dirtyRingEntries: Int? = nil
  ) -> AcceleratorUnderTest {
    AcceleratorUnderTest(testDescription: name, interrupts: interrupts, dirtyRingEntries: dirtyRingEntries) {
      () throws(AcceleratorError) in try KVMAccelerator(dirtyRingEntries: dirtyRingEntries)
    }
  }

  /// What the test needs beside what this set-up always has.
  private var required: AcceleratorCapabilities {
    switch interrupts {
    case .inKernel: .inKernelInterrupts
    case .split: .splitInterrupts
    case .userSpace: []
    }
  }

  /// A virtual machine of the accelerator, where the host has what this set-up takes.
  func machine(
    _ accelerator: any Accelerator, _ memory: GuestMemory
  ) throws -> any VirtualMachine {
    do throws(AcceleratorError) {
      return try accelerator.makeVirtualMachine(memory: memory, interrupts: interrupts)
    } catch {
      guard case .unsupported = error else { throw error }
      try skip("\(error)")
    }
  }

  /// The accelerator, where this host has it with `capabilities`; else the test is skipped with the reason.
  func accelerator(_ capabilities: AcceleratorCapabilities) throws -> any Accelerator {
    let accelerator: any Accelerator
    do throws(AcceleratorError) {
      accelerator = try open()
    } catch {
      switch error {
      case .missing, .noPermission: try skip("\(error)")
      default: throw error
      }
    }
    let missing = capabilities.union(required).subtracting(accelerator.capabilities)
    guard missing.isEmpty else {
      try skip(
        "this host lacks " + Self.names.filter { !missing.isDisjoint(with: $0.0) }.map(\.1).joined(separator: ", "))
    }
    return accelerator
  }

  /// Ends the test without a verdict. The reason is printed: the library keeps a cancelled case's to itself.
  func skip(_ reason: String) throws -> Never {
    print("skipped: \(Test.current?.name ?? "a test") on \(testDescription): \(reason)")
    try Test.cancel("\(reason)")
  }

  private static let names: [(AcceleratorCapabilities, String)] = [
    (.readOnlyMemory, "read-only memory"), (.dirtyLog, "a dirty log"), (.dirtyRing, "a dirty ring"),
    (.inKernelInterrupts, "interrupt controllers in the accelerator"),
    (.splitInterrupts, "split interrupt controllers"),
    (.eventNotifiers, "event descriptors"), (.guestDebug, "guest debugging"), (.watchpoints, "watchpoints"),
    (.readWatchpoints, "watchpoints on reads"),
    (.memoryViews, "memory views"), (.registerPinning, "pinned registers"),
    (.nativeRing0, "ring 0 at full speed"), (.executePermission, "execute permissions"),
  ]
}
