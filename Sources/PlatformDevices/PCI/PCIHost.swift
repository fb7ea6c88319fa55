import DeviceModel
import StateTree
import Synchronization

/// The PCI host bridge's two doors to configuration space: the ports 0xcf8 and 0xcfc (PCI Local Bus 3.0, 3.2.2.3.2),
/// and ECAM (PCI Express Base 4.0, 7.2.2), which alone reaches extended configuration space. Functions are by bus, device and function number.
public final class PCIHost: PlatformDevice {
  /// Guest-physical address of ECAM, for 256 buses.
  public static let ecam: UInt64 = 0xe000_0000
  /// The first of the four global system interrupts that INTx pins share.
  public static let firstInterrupt: UInt32 = 16

  private static let addressOffset: UInt64 = 0
  private static let dataOffset: UInt64 = 4
  private static let ecamOffset: UInt64 = 1 << 32
  private static let ecamSize: UInt64 = 256 << 20
  private static let enable: UInt32 = 1 << 31

  /// `pci-host`.
  public let name = "pci-host"
  /// Configuration ports and ECAM. The address port is a byte wide, since 0xcf9 is the reset control register's.
  public let windows: [BusWindow] = [
    .ports(0xcf8, size: 1, offset: addressOffset), .ports(0xcfc, size: 4, offset: dataOffset),
    .memory(ecam, size: ecamSize, offset: ecamOffset),
  ]
  /// Where the functions' BARs go.
  let barWindows: PCIWindows
  private let lines: [InterruptLine]
  private let state = Mutex(State())

  private struct State {
    var functions: [UInt16: any PCIDevice] = [:]
    /// Bit 31 opens the data port; bus, device, function and register are below.
    var address: UInt32 = 0
  }

  /// A host without functions, whose BARs move on the two buses.
  public init(ports: AddressBus, memory: AddressBus, interrupts: any InterruptSink) {
    barWindows = PCIWindows(ports: ports, memory: memory)
    lines = (0..<4).map { InterruptLine(gsi: Self.firstInterrupt + $0, sink: interrupts) }
  }

  /// The line of a device's INTx pin (1 is INTA#): pins turn by one a device, as _PRT tells the guest.
  public func line(device: UInt8, pin: UInt8 = 1) -> InterruptLine.Source {
    lines[(Int(device) + Int(pin) + 3) % 4].makeSource()
  }

  /// Places a function; false where there is one at that address already.
  public func add(_ device: any PCIDevice, at address: PCIAddress) -> Bool {
    state.withLock { state in
      guard state.functions[address.routingID] == nil else { return false }
      state.functions[address.routingID] = device
      return true
    }
  }

  /// Takes a function away from the guest and returns its device; nil where there is none.
  @discardableResult
  public func remove(at address: PCIAddress) -> (any PCIDevice)? {
    guard let device = state.withLock({ $0.functions.removeValue(forKey: address.routingID) }) else { return nil }
    device.function.remove(device)
    return device
  }

  /// The configuration address, or configuration space; all ones where there is no function.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    switch offset {
    case Self.ecamOffset...:
      guard let device = device(inECAM: offset) else { return ~0 }
      let register = Int(offset & 0xfff)
      device.willReadConfiguration(offset: register, size: size)
      let low = UInt64(device.function.readConfiguration(offset: register, size: min(size, 4)))
      guard size == 8 else { return low }
      return low | UInt64(device.function.readConfiguration(offset: register + 4, size: 4)) << 32
    case Self.dataOffset...:
      guard let (device, register) = selected(offset) else { return ~0 }
      let count = min(size, 4 - register & 3)
      device.willReadConfiguration(offset: register, size: count)
      return UInt64(device.function.readConfiguration(offset: register, size: count))
    default: return size == 4 ? UInt64(state.withLock { $0.address }) : ~0
    }
  }

  /// The configuration address (32 bits only), or configuration space.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    let low = UInt32(truncatingIfNeeded: value)
    switch offset {
    case Self.ecamOffset...:
      guard let device = device(inECAM: offset) else { return }
      let register = Int(offset & 0xfff)
      device.function.writeConfiguration(offset: register, size: min(size, 4), value: low, for: device)
      guard size == 8 else { return }
      let high = UInt32(truncatingIfNeeded: value >> 32)
      device.function.writeConfiguration(offset: register + 4, size: 4, value: high, for: device)
    case Self.dataOffset...:
      guard let (device, register) = selected(offset) else { return }
      let count = min(size, 4 - register & 3)
      device.function.writeConfiguration(offset: register, size: count, value: low, for: device)
    default:
      if size == 4 { state.withLock { $0.address = low & 0x80ff_fffc } }
    }
  }

  private func device(inECAM offset: UInt64) -> (any PCIDevice)? {
    state.withLock { $0.functions[UInt16(truncatingIfNeeded: (offset - Self.ecamOffset) >> 12)] }
  }

  private func selected(_ offset: UInt64) -> (any PCIDevice, register: Int)? {
    state.withLock { state in
      guard state.address & Self.enable != 0,
        let device = state.functions[UInt16(truncatingIfNeeded: state.address >> 8)]
      else { return nil }
      return (device, Int(state.address & 0xfc) | Int(offset & 3))
    }
  }

  /// Address register cleared; the functions are devices of the machine and reset on their own.
  public func reset() {
    state.withLock { $0.address = 0 }
  }

  /// Version 1.
  public func save() -> StateNode {
    let address = state.withLock { $0.address }
    return StateNode(name, version: 1) { $0.write(address) }
  }

  /// Puts the address register back.
  public func restore(_ node: StateNode) throws(StateError) {
    let address = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      try reader.read(UInt32.self)
    }
    state.withLock { $0.address = address & 0x80ff_fffc }
  }
}
