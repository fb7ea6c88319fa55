import DeviceModel
import Synchronization

/// The address spaces that BARs move about in.
///
/// A guest that moves several BARs makes them overlap in between: the later claim waits and gets its window as soon as
/// the earlier one leaves.
public final class PCIWindows: Sendable {
  private struct Claim {
    let device: any BusDevice
    let bar: Int
    let window: BusWindow
    var isPlaced: Bool
  }

  /// The buses hold the devices, and with them this; they outlive both.
  private weak let ports: AddressBus?
  private weak let memory: AddressBus?
  private let claims = Mutex<[Claim]>([])

  /// BARs in these two spaces.
  init(ports: AddressBus, memory: AddressBus) {
    self.ports = ports
    self.memory = memory
  }

  /// Moves a BAR of a device to `window`, or takes it away.
  func set(_ window: BusWindow?, for device: any BusDevice, bar: Int) {
    claims.withLock { claims in
      if let index = claims.firstIndex(where: { $0.device === device && $0.bar == bar }) {
        let claim = claims[index]
        if claim.window == window { return }
        claims.remove(at: index)
        if claim.isPlaced { bus(claim.window)?.detach(device, at: claim.window.start) }
      }
      if let window { claims.append(Claim(device: device, bar: bar, window: window, isPlaced: false)) }
      for index in claims.indices where !claims[index].isPlaced { claims[index].isPlaced = place(claims[index]) }
    }
  }

  private func bus(_ window: BusWindow) -> AddressBus? { window.space == .ports ? ports : memory }

  private func place(_ claim: Claim) -> Bool {
    let window = claim.window
    guard let bus = bus(window) else { return false }
    do throws(DeviceModelError) {
      try bus.attach(claim.device, at: window.start, size: window.size, offset: window.offset)
      return true
    } catch {
      return false
    }
  }
}
