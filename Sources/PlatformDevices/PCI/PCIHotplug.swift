import DeviceModel
import StateTree
import Synchronization

/// Hot-plug of PCI devices on bus 0 by ACPI, with the registers of QEMU's docs/specs/acpi_pci_hotplug: the guest is told by a
/// general-purpose event, asks which devices came and which are to go, and ejects those that it has given up.
public final class PCIHotplug: PlatformDevice {
  /// First port.
  public static let port: UInt64 = 0xae00
  /// Bytes of ports.
  public static let windowSize: UInt64 = 0x10
  /// The general-purpose event.
  public static let event = 1
  /// The devices that may come and go: all but the host bridge.
  public static let slots: ClosedRange<UInt8> = 1...31

  private enum Register {
    /// Devices that came since the last read; reading clears it.
    static let up: UInt64 = 0x0
    /// Devices that are to go.
    static let down: UInt64 = 0x4
    /// Written: devices to take away. Read: features, none.
    static let eject: UInt64 = 0x8
    /// Devices that can go.
    static let removable: UInt64 = 0xc
  }

  /// `pci-hotplug`.
  public let name = "pci-hotplug"
  /// Four registers of 32 bits, a bit a device.
  public let windows: [BusWindow] = [.ports(port, size: windowSize)]
  private let host: PCIHost
  private let power: ACPIPowerManagement
  private let machine: any MachineControl
  private let state = Mutex(State())

  private struct State {
    var up: UInt32 = 0
    var down: UInt32 = 0
    var present: UInt32 = 0
  }

  /// Hot-plug on `host`, announced through `power`.
  public init(host: PCIHost, power: ACPIPowerManagement, machine: any MachineControl) {
    self.host = host
    self.power = power
    self.machine = machine
  }

  /// Says that a device is on the bus and may go; with `announcing`, the guest is told that it came.
  public func insert(_ slot: UInt8, announcing: Bool) {
    guard Self.slots.contains(slot) else { return }
    state.withLock { state in
      state.present |= 1 << UInt32(slot)
      if announcing { state.up |= 1 << UInt32(slot) }
    }
    if announcing { power.raise(generalEvent: Self.event) }
  }

  /// Asks the guest to give a device up; what follows is the guest's choice, at the latest its next reset.
  public func requestEject(_ slot: UInt8) {
    let isPresent = state.withLock { state in
      let bit = 1 << UInt32(slot) & state.present
      state.down |= bit
      return bit != 0
    }
    if isPresent { power.raise(generalEvent: Self.event) }
  }

  /// Registers are read as a whole.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    let value = state.withLock { state -> UInt32 in
      switch offset & ~3 {
      case Register.up:
        defer { state.up = 0 }
        return state.up
      case Register.down: return state.down
      case Register.removable: return state.present
      default: return 0
      }
    }
    return UInt64(value) >> ((offset & 3) * 8)
  }

  /// A write to the eject register takes away the device of the lowest bit.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    guard offset == Register.eject else { return }
    let slots = UInt32(truncatingIfNeeded: value)
    if slots != 0 { eject(slots & (~slots + 1)) }
  }

  private func eject(_ slots: UInt32) {
    let ejected = state.withLock { state in
      let ejected = slots & state.present
      state.up &= ~ejected
      state.down &= ~ejected
      state.present &= ~ejected
      return ejected
    }
    for slot in Self.slots where ejected & 1 << UInt32(slot) != 0 {
      host.remove(at: PCIAddress(device: slot))
      machine.request(.ejected(slot: slot))
    }
  }

  /// What was to go goes; what came need not be told of.
  public func reset() {
    eject(state.withLock { $0.down })
    state.withLock { $0.up = 0 }
  }

  /// Version 1.
  public func save() -> StateNode {
    let state = state.withLock { $0 }
    return StateNode(name, version: 1) { writer in
      writer.write(state.up)
      writer.write(state.down)
    }
  }

  /// Puts the registers back; which devices there are, the machine knows.
  public func restore(_ node: StateNode) throws(StateError) {
    let (up, down) = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      (try reader.read(UInt32.self), try reader.read(UInt32.self))
    }
    state.withLock { ($0.up, $0.down) = (up, down) }
  }
}
