import DeviceModel
import StateTree
import Synchronization

/// What all PCI functions share: configuration space, BARs that follow the guest's programming, INTx and MSI-X.
public final class PCIFunction: Sendable {
  private typealias Register = PCIConfiguration.Register
  private typealias Command = PCIConfiguration.Command

  private let initial: PCIConfiguration
  private let line: InterruptLine.Source
  private let interrupts: any InterruptSink
  /// They know the function's device while it has BARs.
  private weak let windows: PCIWindows?
  private let state: Mutex<State>

  private struct State {
    var bytes: [UInt8]
    var table: MSIXTable
    /// Whether the device asserts its INTx pin.
    var isAsserted = false
    /// Whether the function has left its host: then nothing of it reaches the guest any more.
    var isRemoved = false

    func dword(_ offset: Int) -> UInt32 {
      UInt32(bytes[offset]) | UInt32(bytes[offset + 1]) << 8 | UInt32(bytes[offset + 2]) << 16
        | UInt32(bytes[offset + 3]) << 24
    }
  }

  private static let barShift: UInt64 = 60
  private static let msixEnable: UInt32 = 1 << 31
  private static let msixMask: UInt32 = 1 << 30

  /// A function of `host` with that configuration; INTx goes to `line` (see `PCIHost.line`), messages to `interrupts`.
  public init(
    _ configuration: PCIConfiguration, host: PCIHost, line: InterruptLine.Source, interrupts: any InterruptSink
  ) {
    initial = configuration
    windows = host.barWindows
    self.line = line
    self.interrupts = interrupts
    state = Mutex(State(bytes: configuration.bytes, table: MSIXTable(vectors: configuration.msix?.vectors ?? 0)))
  }

  // MARK: Configuration space

  /// Reads 1, 2 or 4 bytes; those past the space are 0.
  public func readConfiguration(offset: Int, size: Int) -> UInt32 {
    state.withLock { state in
      var value: UInt32 = 0
      for index in 0..<size where offset + index < state.bytes.count {
        var byte = state.bytes[offset + index]
        if offset + index == Register.status, state.isAsserted { byte |= UInt8(PCIConfiguration.Status.interrupt) }
        value |= UInt32(byte) << UInt32(index * 8)
      }
      return value
    }
  }

  /// Puts the device's own value into configuration space, where no BAR and no capability of this type's is.
  public func setConfiguration(offset: Int, size: Int, value: UInt32) {
    state.withLock { state in
      for index in 0..<size where offset + index < state.bytes.count {
        state.bytes[offset + index] = UInt8(truncatingIfNeeded: value >> UInt32(index * 8))
      }
    }
  }

  /// Writes 1, 2 or 4 bytes, as far as they are writable. `device` is the one that this function belongs to.
  public func writeConfiguration(offset: Int, size: Int, value: UInt32, for device: any PCIDevice) {
    state.withLock { state in
      for index in 0..<size where offset + index < state.bytes.count {
        let byte = UInt8(truncatingIfNeeded: value >> UInt32(index * 8))
        let mask = initial.writable[offset + index]
        state.bytes[offset + index] = state.bytes[offset + index] & ~mask | byte & mask
      }
      if offset < Register.barsEnd { placeBARs(state, device) }
      update(&state)
    }
    device.didWriteConfiguration(offset: offset, size: size)
  }

  /// Where each BAR is to be, from the addresses in it and the decode bits.
  private func placeBARs(_ state: State, _ device: any PCIDevice) {
    let command = state.dword(Register.command)
    for (index, bar) in initial.bars.enumerated() {
      guard let bar else { continue }
      let offset = Register.bars + index * 4
      let low = UInt64(state.dword(offset))
      var window: BusWindow
      switch bar {
      case .ports: window = .ports(low & ~3, size: bar.size)
      case .memory32: window = .memory(low & ~15, size: bar.size)
      case .memory64: window = .memory(low & ~15 | UInt64(state.dword(offset + 4)) << 32, size: bar.size)
      }
      window.offset = UInt64(index) << Self.barShift
      let decodes = command & (window.space == .ports ? Command.ports : Command.memory) != 0
      // Address 0 means that nobody has programmed it yet.
      let isPlaced = decodes && window.start != 0 && !state.isRemoved
      windows?.set(isPlaced ? window : nil, for: device, bar: index)
    }
  }

  // MARK: Interrupts

  /// Asserts or releases the INTx pin; without effect on the line while MSI-X is on or the guest has INTx disabled.
  public func setInterruptPin(_ isAsserted: Bool) {
    state.withLock { state in
      state.isAsserted = isAsserted
      update(&state)
    }
  }

  /// Whether the guest has turned MSI-X on: then `signal`, else `setInterruptPin`.
  public var isMSIXEnabled: Bool {
    state.withLock { msixControl($0) & Self.msixEnable != 0 }
  }

  /// Whether the guest lets the function reach memory: a device asks before it reads or writes any. (Messages are writes
  /// to memory, too; they wait until they may.)
  public var isBusMaster: Bool {
    state.withLock { Self.isBusMaster($0) }
  }

  /// Sends an MSI-X vector, or keeps it pending while it is masked or the function is no bus master; nothing while MSI-X
  /// is off.
  public func signal(vector: Int) {
    state.withLock { state in
      guard msixControl(state) & Self.msixEnable != 0 else { return }
      state.table.signal(vector, functionMasked: !canSendMessages(state), interrupts)
    }
  }

  private static func isBusMaster(_ state: State) -> Bool {
    state.dword(Register.command) & Command.busMaster != 0 && !state.isRemoved
  }

  private func canSendMessages(_ state: State) -> Bool {
    msixControl(state) & (Self.msixEnable | Self.msixMask) == Self.msixEnable && Self.isBusMaster(state)
  }

  private func msixControl(_ state: State) -> UInt32 {
    initial.msix.map { state.dword($0.capability) } ?? 0
  }

  private func update(_ state: inout State) {
    let hasPin = msixControl(state) & Self.msixEnable == 0 && !state.isRemoved
    line.set(state.isAsserted && hasPin && state.dword(Register.command) & Command.interruptDisable == 0)
    if canSendMessages(state) { state.table.deliverPending(interrupts) }
  }

  // MARK: BARs

  /// The BAR's number and the offset in it.
  static func split(_ offset: UInt64) -> (bar: Int, offset: UInt64) {
    (Int(offset >> barShift), offset & (1 << barShift - 1))
  }

  /// A read of the MSI-X table or the pending bits; nil where neither is meant.
  func readMSIX(_ bar: Int, _ offset: UInt64, _ size: Int) -> UInt64? {
    guard let msix = initial.msix, msix.bar == bar else { return nil }
    return state.withLock { state in
      let inTable = offset &- msix.tableOffset
      let inPending = offset &- msix.pendingOffset
      guard inTable < state.table.size || inPending < state.table.pendingSize else { return nil }
      func dword(_ step: UInt64) -> UInt64 {
        if inTable &+ step < state.table.size { return UInt64(state.table.dword(at: (inTable &+ step) & ~3)) }
        if inPending &+ step < state.table.pendingSize {
          return UInt64(state.table.pendingDword(at: (inPending &+ step) & ~3))
        }
        return 0
      }
      return size == 8 ? dword(0) | dword(4) << 32 : dword(0) >> ((offset & 3) * 8)
    }
  }

  /// A write to the MSI-X table or the pending bits; false where neither is meant. Only aligned 32 and 64 bits count.
  func writeMSIX(_ bar: Int, _ offset: UInt64, _ size: Int, _ value: UInt64) -> Bool {
    guard let msix = initial.msix, msix.bar == bar else { return false }
    return state.withLock { state in
      let inTable = offset &- msix.tableOffset
      guard inTable < state.table.size else { return offset &- msix.pendingOffset < state.table.pendingSize }
      guard size >= 4, inTable & 3 == 0 else { return true }
      state.table.setDword(UInt32(truncatingIfNeeded: value), at: inTable)
      if size == 8, inTable + 4 < state.table.size {
        state.table.setDword(UInt32(truncatingIfNeeded: value >> 32), at: inTable + 4)
      }
      update(&state)
      return true
    }
  }

  // MARK: Life

  /// The state after power-on: no BAR anywhere.
  public func reset(for device: any PCIDevice) {
    replace(State(bytes: initial.bytes, table: MSIXTable(vectors: initial.msix?.vectors ?? 0)), device)
  }

  /// Takes the function off the guest's buses for good: BARs, interrupts, memory. A device that returns is a new one.
  func remove(_ device: any PCIDevice) {
    state.withLock { state in
      state.isRemoved = true
      placeBARs(state, device)
      update(&state)
    }
  }

  private func replace(_ replacement: State, _ device: any PCIDevice) {
    state.withLock { state in
      let isRemoved = state.isRemoved
      state = replacement
      state.isRemoved = isRemoved
      placeBARs(state, device)
      update(&state)
    }
  }

  /// Version 1, a child of the device's node.
  public func save() -> StateNode {
    let state = state.withLock { $0 }
    return StateNode(Self.nodeName, version: 1) { writer in
      writer.write(state.bytes)
      writer.write(state.isAsserted)
      state.table.write(to: &writer)
    }
  }

  /// The name of the node that `save` makes.
  public static let nodeName = "pci-function"

  /// Checks a node that `save` made; the closure puts it in place. So a device can check all of its node first.
  public func prepareRestore(
    _ node: StateNode, for device: any PCIDevice
  ) throws(StateError) -> () -> Void {
    let restored = try node.read(Self.nodeName, versions: 1...1) { reader, _ throws(StateError) in
      var bytes = try reader.read(limit: initial.bytes.count)
      guard bytes.count == initial.bytes.count else { throw reader.invalid("size", UInt64(bytes.count)) }
      // What the guest cannot write is the device's own, whatever the node says.
      for index in bytes.indices {
        let mask = initial.writable[index]
        bytes[index] = bytes[index] & mask | initial.bytes[index] & ~mask
      }
      var state = State(
        bytes: bytes, table: MSIXTable(vectors: initial.msix?.vectors ?? 0), isAsserted: try reader.read())
      try state.table.read(from: &reader)
      return state
    }
    return { [self] in replace(restored, device) }
  }
}
