import DeviceModel
import GuestMemory
import StateTree
import Synchronization

/// QEMU's fw_cfg device (docs/specs/fw_cfg.rst): items by key, files by name, through ports or DMA.
public final class FirmwareConfiguration: PlatformDevice {
  /// Selector port; the data port follows, and the DMA address is 4 ports on.
  public static let port: UInt64 = 0x510
  /// Ports of the device.
  public static let windowSize: UInt64 = 12

  /// Keys that have a meaning of their own.
  public enum Key {
    /// `QEMU`.
    public static let signature: UInt16 = 0x00
    /// Bit 0: the device is there; bit 1: it does DMA.
    public static let identity: UInt16 = 0x01
    /// Bytes of RAM, 64 bits.
    public static let memorySize: UInt16 = 0x03
    /// vCPUs at start, 16 bits.
    public static let cpus: UInt16 = 0x05
    /// Greatest number of vCPUs, 16 bits.
    public static let maximumCPUs: UInt16 = 0x0f
    /// The directory of files.
    public static let directory: UInt16 = 0x19
    /// The first file's key.
    public static let firstFile: UInt16 = 0x20
    /// The keys that exist; bit 14 once asked for writing.
    static let mask: UInt16 = 0xbfff
  }

  private enum Register {
    static let data: UInt64 = 1
    static let dmaHigh: UInt64 = 4
    static let dmaLow: UInt64 = 8
  }

  /// Bits of a DMA request's control word.
  private enum Control {
    static let error: UInt32 = 1
    static let read: UInt32 = 2
    static let skip: UInt32 = 4
    static let select: UInt32 = 8
    static let write: UInt32 = 16
  }

  /// `fw-cfg`.
  public let name = "fw-cfg"
  /// One block of ports.
  public let windows: [BusWindow] = [.ports(port, size: windowSize)]
  private let memory: GuestMemory
  private let items: [UInt16: [UInt8]]
  private let state = Mutex(State())

  private struct State {
    var registers = Registers()
    /// The selected item, so that a data port read needs no look-up.
    var item: [UInt8] = []
  }

  private struct Registers {
    var key: UInt16 = Key.signature
    var offset: UInt32 = 0
    var dmaHigh: UInt32 = 0
  }

  /// A device that offers `items` by key and `files` by name (at most 55 bytes of it); they do not change.
  public init(memory: GuestMemory, items: [UInt16: [UInt8]], files: [(name: String, bytes: [UInt8])]) {
    self.memory = memory
    var items = items
    items[Key.signature] = Array("QEMU".utf8)
    items[Key.identity] = [3, 0, 0, 0]
    var directory = Self.bigEndian(UInt32(files.count))
    for (index, file) in files.sorted(by: { $0.name < $1.name }).enumerated() {
      let key = Key.firstFile + UInt16(index)
      items[key] = file.bytes
      directory += Self.bigEndian(UInt32(file.bytes.count)) + Self.bigEndian(key) + [0, 0]
      let name = Array(file.name.utf8.prefix(55))
      directory += name + [UInt8](repeating: 0, count: 56 - name.count)
    }
    items[Key.directory] = directory
    self.items = items
    reset()
  }

  private static func bigEndian<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
    withUnsafeBytes(of: value.bigEndian) { Array($0) }
  }

  /// The next byte of the selected item at the data port, zeros after its end; `QEMU CFG` at the DMA port.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    switch offset {
    case Register.data:
      return state.withLock { state in
        let position = Int(state.registers.offset)
        guard position < state.item.count else { return 0 }
        state.registers.offset += 1
        return UInt64(state.item[position])
      }
    case Register.dmaHigh where size == 8: return UInt64(bigEndian: 0x5145_4d55_2043_4647)
    case Register.dmaHigh: return UInt64(UInt32(bigEndian: 0x5145_4d55))
    case Register.dmaLow: return UInt64(UInt32(bigEndian: 0x2043_4647))
    default: return 0
    }
  }

  /// The selector, or the big-endian address of a DMA request: the write of its low half starts it.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    state.withLock { state in
      switch (offset, size) {
      case (0, 2): select(UInt16(truncatingIfNeeded: value), &state)
      case (Register.dmaHigh, 8): transfer(GuestPhysicalAddress(UInt64(bigEndian: value)), &state)
      case (Register.dmaHigh, 4): state.registers.dmaHigh = UInt32(bigEndian: UInt32(truncatingIfNeeded: value))
      case (Register.dmaLow, 4):
        let low = UInt32(bigEndian: UInt32(truncatingIfNeeded: value))
        let address = UInt64(state.registers.dmaHigh) << 32 | UInt64(low)
        state.registers.dmaHigh = 0
        transfer(GuestPhysicalAddress(address), &state)
      default: break
      }
    }
  }

  private func select(_ key: UInt16, _ state: inout State) {
    state.registers.key = key & Key.mask
    state.registers.offset = 0
    state.item = items[state.registers.key] ?? []
  }

  /// Carries out the request at `address`: control, length, target address, all big-endian. The control word is
  /// written back as 0, or as the error bit; where even that is outside RAM, nobody can be told.
  private func transfer(_ address: GuestPhysicalAddress, _ state: inout State) {
    guard memory.allowsDevice(address, count: 16, isWrite: true),
      let control = try? UInt32(bigEndian: memory.read(address)),
      let length = try? UInt32(bigEndian: memory.read(address + 4)),
      let target = try? UInt64(bigEndian: memory.read(address + 8))
    else { return }
    if control & Control.select != 0 { select(UInt16(truncatingIfNeeded: control >> 16), &state) }
    var failed = false
    if control & Control.read != 0 {
      failed = !copy(&state, to: GuestPhysicalAddress(target), count: Int(length))
    } else if control & Control.write != 0 {
      // No item can be written.
      failed = true
    } else if control & Control.skip != 0 {
      advance(&state, by: Int(length))
    }
    try? memory.write((failed ? Control.error : 0).bigEndian, to: address)
  }

  /// Never past the item's end, so that the offset cannot wrap.
  private func advance(_ state: inout State, by count: Int) {
    state.registers.offset = UInt32(clamping: min(Int(state.registers.offset) + count, state.item.count))
  }

  /// Copies `count` bytes, with zeros after the item's end; false where not all of the target is RAM.
  private func copy(_ state: inout State, to target: GuestPhysicalAddress, count: Int) -> Bool {
    let start = min(Int(state.registers.offset), state.item.count)
    let available = min(count, state.item.count - start)
    guard memory.allowsDevice(target, count: count, isWrite: true) else { return false }
    do throws(GuestMemoryError) {
      // The zeros come first: what they leave unchecked is the part that the item fills.
      try memory.fill(target + UInt64(available), count: count - available, with: 0)
      let result = state.item.withUnsafeBytes { bytes in
        Result { () throws(GuestMemoryError) in
          try memory.write(UnsafeRawBufferPointer(rebasing: bytes[start..<start + available]), to: target)
        }
      }
      try result.get()
    } catch {
      return false
    }
    advance(&state, by: count)
    return true
  }

  /// The signature selected.
  public func reset() {
    state.withLock { state in
      state.registers = Registers()
      select(Key.signature, &state)
    }
  }

  /// Version 1. The items belong to the machine's configuration.
  public func save() -> StateNode {
    let registers = state.withLock { $0.registers }
    return StateNode(name, version: 1) { writer in
      writer.write(registers.key)
      writer.write(registers.offset)
      writer.write(registers.dmaHigh)
    }
  }

  /// Puts the selection back.
  public func restore(_ node: StateNode) throws(StateError) {
    let restored = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      Registers(key: try reader.read(), offset: try reader.read(), dmaHigh: try reader.read())
    }
    state.withLock { state in
      select(restored.key, &state)
      state.registers = restored
    }
  }
}
