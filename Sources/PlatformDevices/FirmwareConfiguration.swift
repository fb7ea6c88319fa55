import DeviceModel
import GuestMemory
import StateTree
import Synchronization

/// QEMU's fw_cfg device (docs/specs/fw_cfg.rst): items by key, files by name, through ports or DMA.
public final class FirmwareConfiguration: BusDevice {
  /// Selector port at offset 0, data port at offset 1, DMA address at offset 4.
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
  }

  /// `fw-cfg`.
  public let name = "fw-cfg"
  private let memory: GuestMemory
  private let items: [UInt16: [UInt8]]
  private let state = Mutex(State())

  private struct State: Equatable {
    var key: UInt16 = 0
    var offset: UInt32 = 0
    var dmaAddress: UInt64 = 0
  }

  /// A device that offers `items` by key and `files` by name (at most 55 bytes); they do not change.
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
  }

  private static func bigEndian<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
    withUnsafeBytes(of: value.bigEndian) { Array($0) }
  }

  /// The next bytes of the selected item at the data port, zeros after its end; `QEMU CFG` at the DMA port.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    switch offset {
    case 1:
      return state.withLock { state in
        let item = items[state.key] ?? []
        let byte = Int(state.offset) < item.count ? item[Int(state.offset)] : 0
        state.offset &+= 1
        return UInt64(byte)
      }
    case 4: return size == 8 ? UInt64(bigEndian: 0x5145_4d55_2043_4647) : UInt64(UInt32(bigEndian: 0x5145_4d55))
    case 8: return UInt64(UInt32(bigEndian: 0x2043_4647))
    default: return 0
    }
  }

  /// The selector, or the big-endian address of a DMA request: the write of its low half starts it.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    let request: UInt64? = state.withLock { state in
      switch (offset, size) {
      case (0, 2):
        state.key = UInt16(truncatingIfNeeded: value)
        state.offset = 0
      case (4, 8): return UInt64(bigEndian: value)
      case (4, 4): state.dmaAddress = UInt64(UInt32(bigEndian: UInt32(truncatingIfNeeded: value))) << 32
      case (8, 4):
        defer { state.dmaAddress = 0 }
        return state.dmaAddress | UInt64(UInt32(bigEndian: UInt32(truncatingIfNeeded: value)))
      default: break
      }
      return nil
    }
    if let request { transfer(GuestPhysicalAddress(request)) }
  }

  private enum Control {
    static let error: UInt32 = 1
    static let read: UInt32 = 2
    static let skip: UInt32 = 4
    static let select: UInt32 = 8
    static let write: UInt32 = 16
  }

  /// Carries out the request at `address`: control, length, target address, all big-endian. The control word is
  /// written back as 0, or as the error bit; where even that is outside RAM, nobody can be told.
  private func transfer(_ address: GuestPhysicalAddress) {
    guard let control = try? UInt32(bigEndian: memory.read(address)),
      let length = try? UInt32(bigEndian: memory.read(address + 4)),
      let target = try? UInt64(bigEndian: memory.read(address + 8))
    else { return }
    let failed = state.withLock { state -> Bool in
      if control & Control.select != 0 {
        state.key = UInt16(truncatingIfNeeded: control >> 16)
        state.offset = 0
      }
      if control & Control.read != 0 {
        return !copy(&state, to: GuestPhysicalAddress(target), count: Int(length))
      }
      if control & Control.skip != 0 {
        state.offset = UInt32(clamping: UInt64(state.offset) + UInt64(length))
      }
      // No item can be written.
      return control & Control.write != 0
    }
    try? memory.write((failed ? Control.error : 0).bigEndian, to: address)
  }

  private func copy(_ state: inout State, to target: GuestPhysicalAddress, count: Int) -> Bool {
    let item = items[state.key] ?? []
    let start = min(Int(state.offset), item.count)
    let bytes = item[start..<min(item.count, start + count)]
    do {
      // The rest reads as zeros; it is checked first, so that a wrong range changes nothing.
      try memory.fill(target, count: count, with: 0)
      try memory.write(Array(bytes), to: target)
    } catch {
      return false
    }
    state.offset = UInt32(clamping: UInt64(state.offset) + UInt64(count))
    return true
  }

  /// Nothing selected.
  public func reset() {
    state.withLock { $0 = State() }
  }

  /// Version 1. The items belong to the machine's configuration.
  public func save() -> StateNode {
    let state = state.withLock { $0 }
    return StateNode(name, version: 1) { writer in
      writer.write(state.key)
      writer.write(state.offset)
      writer.write(state.dmaAddress)
    }
  }

  /// Puts the selection back.
  public func restore(_ node: StateNode) throws(StateError) {
    let restored = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      State(key: try reader.read(), offset: try reader.read(), dmaAddress: try reader.read())
    }
    state.withLock { $0 = restored }
  }
}
