import DeviceModel
import PlatformDevices
import StateTree
import Synchronization

/// A PCI function with a BAR of every kind: 16 KiB of 64-bit memory that holds one 64-bit register throughout, 32 ports
/// that give their offset, and 4 KiB of 32-bit memory with MSI-X (three vectors at 0, pending bits at 0x800).
public final class SamplePCIDevice: PCIDevice {
  /// Sizes of the BARs.
  public static let bars: [Int: UInt64] = [0: 0x4000, 2: 32, 4: 0x1000]
  /// `sample`.
  public let name = "sample"
  /// Configuration space.
  public let function: PCIFunction
  private let register = Atomic<UInt64>(0)

  /// A function for slot 3 of the host.
  public init(host: PCIHost, interrupts: any InterruptSink) {
    var configuration = PCIConfiguration(vendor: 0x1234, device: 0x5678, classCode: 0xff_0000, interruptPin: 1)
    configuration.addBAR(0, .memory64(size: 0x4000, prefetchable: true))
    configuration.addBAR(2, .ports(size: 32))
    configuration.addBAR(4, .memory32(size: 0x1000))
    configuration.addCapability(id: 0x09, body: [3, 0xaa, 0xbb], writable: [0, 0, 0x0f])
    configuration.addExtendedCapability(id: 0x0003, version: 1, body: [1, 2, 3, 4, 5, 6, 7, 8])
    configuration.addExtendedCapability(
      id: 0x000b, version: 1, body: [0xee, 0xee, 0x01, 0x01, 0, 0, 0, 0, 0, 0, 0, 0],
      writable: [0, 0, 0, 0, 0xff, 0xf0])
    configuration.addMSIX(vectors: 3, bar: 4, tableOffset: 0, pendingOffset: 0x800)
    configuration.addPCIExpress()
    function = PCIFunction(configuration, host: host, line: host.line(device: 3), interrupts: interrupts)
  }

  /// The register in BAR 0, the offset in BAR 2.
  public func readBAR(_ bar: Int, offset: UInt64, size: Int) -> UInt64 {
    bar == 0 ? register.load(ordering: .relaxed) : offset
  }

  /// The register in BAR 0; a write to BAR 2 drives the interrupts: 0x10 and 0x11 the pin, 0-2 a vector.
  public func writeBAR(_ bar: Int, offset: UInt64, size: Int, value: UInt64) {
    switch bar {
    case 0: register.store(value, ordering: .relaxed)
    case 2 where value & ~1 == 0x10: function.setInterruptPin(value & 1 == 1)
    case 2: function.signal(vector: Int(value & 0xffff))
    default: break
    }
  }

  /// The state after power-on.
  public func reset() {
    function.reset(for: self)
    register.store(0, ordering: .relaxed)
  }

  /// Version 1.
  public func save() -> StateNode {
    StateNode(name, version: 1, children: [function.save()]) { $0.write(register.load(ordering: .relaxed)) }
  }

  /// Puts the state back.
  public func restore(_ node: StateNode) throws(StateError) {
    let value = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in try reader.read(UInt64.self) }
    let restoreFunction = try function.prepareRestore(node.child(PCIFunction.nodeName), for: self)
    register.store(value, ordering: .relaxed)
    restoreFunction()
  }
}
