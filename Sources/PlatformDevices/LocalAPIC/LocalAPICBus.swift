import DeviceModel
import Synchronization

/// What connects the local APICs of a machine with each other, with the IOAPIC and with the PIC (SDM vol. 3, 11.6.2).
///
/// Messages are routed by reading the destination registers of every local APIC, and posted without a lock. What is not
/// atomic here is set once, before anything runs.
public final class LocalAPICBus: IOAPICOutput, InterruptRequestPin, @unchecked Sendable {
  /// Whom a message names.
  enum Destination {
    case physical(UInt32)
    case logical(UInt32)
    case itself
    case all
    case others
  }

  /// The local APICs, by their vCPU's number.
  public private(set) var locals: [LocalAPIC] = []
  private let external = Atomic(false)
  private unowned var pic: PIC?
  private unowned var ioapic: IOAPIC?

  /// A local APIC for each vCPU. `untilTimestamp` gives the guest nanoseconds until the vCPU's time-stamp counter has a
  /// value (0 where it has passed), nil where that will never be or is not known; `wake` tells the vCPU that it has an
  /// interrupt, and may be called on any thread.
  public init(
    count: Int, features: LocalAPIC.Features, clock: any DeviceClock,
    untilTimestamp: @escaping @Sendable (_ vcpu: Int, _ ticks: UInt64) -> UInt64?,
    wake: @escaping @Sendable (_ vcpu: Int) -> Void
  ) {
    locals = (0..<count).map { index in
      LocalAPIC(
        index: index, features: features, bus: self, clock: clock, untilTimestamp: { untilTimestamp(index, $0) },
        wake: { wake(index) })
    }
  }

  /// Connects the controllers whose output this bus is; before anything runs. Whoever owns the machine owns them.
  public func connect(pic: PIC, ioapic: IOAPIC) {
    self.pic = pic
    self.ioapic = ioapic
  }

  // MARK: The PIC

  var isExternalHigh: Bool { external.load(ordering: .sequentiallyConsistent) }

  func acknowledgeExternal() -> UInt8? { pic?.acknowledge() }

  /// The PIC's output: LINT0 of every local APIC.
  public func setInterruptRequest(_ level: Bool) {
    let wasHigh = external.exchange(level, ordering: .sequentiallyConsistent)
    guard level, !wasHigh else { return }
    for local in locals { local.externalLineRose() }
  }

  // MARK: The IOAPIC

  func endOfInterrupt(vector: UInt8) { ioapic?.endOfInterrupt(vector: vector) }

  /// The end of a level-triggered interrupt of local APICs that are the accelerator's.
  public func routeDidChange(pin: Int, to message: InterruptMessage?) {}

  /// Delivers a message of the IOAPIC or of a device (SDM vol. 3, 11.11).
  public func deliver(_ message: InterruptMessage) {
    guard let mode = DeliveryMode(rawValue: UInt8(message.data >> 8 & 7)), mode != .startUp else { return }
    let id = UInt32(truncatingIfNeeded: message.address >> 12 & 0xff)
    let isLogical = message.address & 4 != 0
    // The redirection hint asks for the least busy one, as does the delivery mode.
    let isRedirected = message.address & 8 != 0 && mode == .fixed
    // A level is asserted or nothing: there is no message that takes one back.
    guard !message.isLevel || message.data & 0x4000 != 0 else { return }
    send(
      isRedirected ? .lowestPriority : mode, vector: UInt8(truncatingIfNeeded: message.data), isLevel: message.isLevel,
      to: isLogical ? .logical(id) : .physical(id), isWide: false, from: nil)
  }

  // MARK: Routing

  /// Posts a message to the local APICs that `destination` names; `isWide` where it has 32 bits.
  func send(
    _ mode: DeliveryMode, vector: UInt8, isLevel: Bool, to destination: Destination, isWide: Bool,
    from source: LocalAPIC?
  ) {
    switch destination {
    case .itself:
      source?.accept(mode, vector: vector, isLevel: isLevel)
      return
    case .physical(let id) where mode != .lowestPriority:
      // The usual case: the number is the id.
      if let local = Int(exactly: id).flatMap({ $0 < locals.count ? locals[$0] : nil }), local.id == id,
        !Self.isBroadcast(id, isWide)
      {
        local.accept(mode, vector: vector, isLevel: isLevel)
        return
      }
    default: break
    }
    var leastBusy: LocalAPIC?
    for local in locals where matches(local, destination, isWide, source) {
      if mode != .lowestPriority {
        local.accept(mode, vector: vector, isLevel: isLevel)
      } else if local.isSoftwareEnabled, local.isEnabled,
        leastBusy.map({ local.arbitrationPriority < $0.arbitrationPriority }) ?? true
      {
        leastBusy = local
      }
    }
    leastBusy?.accept(.fixed, vector: vector, isLevel: isLevel)
  }

  private static func isBroadcast(_ id: UInt32, _ isWide: Bool) -> Bool { id == (isWide ? .max : 0xff) }

  private func matches(
    _ local: LocalAPIC, _ destination: Destination, _ isWide: Bool, _ source: LocalAPIC?
  ) -> Bool {
    switch destination {
    case .itself: local === source
    case .all: true
    case .others: local !== source
    case .physical(let id): Self.isBroadcast(id, isWide) || local.id == id
    case .logical(let set): Self.isBroadcast(set, isWide) || local.isMember(of: set)
    }
  }
}

extension LocalAPIC {
  /// Which of several is the least busy (SDM vol. 3, 11.6.2.4).
  var arbitrationPriority: UInt32 { registers[APICRegister.processorPriority] >> 4 }

  /// Whether a logical destination names this local APIC (SDM vol. 3, 11.6.2.2 and 11.12.10.2).
  func isMember(of set: UInt32) -> Bool {
    let own = registers[APICRegister.logicalDestination]
    if isX2APIC { return own >> 16 == set >> 16 && own & set & 0xffff != 0 }
    guard set <= 0xff else { return false }
    let isFlat = registers[APICRegister.destinationFormat] >> 28 == 0xf
    return isFlat ? own >> 24 & set != 0 : own >> 28 == set >> 4 && own >> 24 & set & 0xf != 0
  }
}
