/// The configuration space that a PCI function starts with (PCI Local Bus 3.0, chapter 6; PCI Express Base 4.0, 7.2):
/// built once, by the device.
public struct PCIConfiguration: Sendable {
  /// Bytes of a conventional function's space; the rest of an ECAM page reads as 0, which means no capabilities there.
  static let size = 256
  /// Bytes of the space of a function with extended capabilities.
  static let extendedSize = 4096

  /// Offsets of the type 0 header.
  enum Register {
    static let vendor = 0x00
    static let device = 0x02
    static let command = 0x04
    static let status = 0x06
    static let revision = 0x08
    static let headerType = 0x0e
    static let bars = 0x10
    static let barsEnd = 0x28
    static let subsystemVendor = 0x2c
    static let subsystem = 0x2e
    static let capabilities = 0x34
    static let interruptLine = 0x3c
    static let interruptPin = 0x3d
  }

  /// Bits of the command register.
  enum Command {
    static let ports: UInt32 = 1 << 0
    static let memory: UInt32 = 1 << 1
    static let busMaster: UInt32 = 1 << 2
    static let writable: UInt32 = 0x0547
    static let interruptDisable: UInt32 = 1 << 10
  }

  /// Bits of the status register.
  enum Status {
    static let interrupt: UInt32 = 1 << 3
    static let capabilities: UInt32 = 1 << 4
  }

  /// What a base address register claims.
  public enum BAR: Sendable {
    /// Ports; the size is a power of two, 4 to 256.
    case ports(size: UInt32)
    /// Memory below 4 GiB; the size is a power of two from 16 on.
    case memory32(size: UInt32)
    /// Memory anywhere, in this register and the next; the size is a power of two from 16 on.
    case memory64(size: UInt64, prefetchable: Bool)

    var size: UInt64 {
      switch self {
      case .ports(let size), .memory32(let size): UInt64(size)
      case .memory64(let size, _): size
      }
    }

    var typeBits: UInt32 {
      switch self {
      case .ports: 1
      case .memory32: 0
      case .memory64(_, let prefetchable): prefetchable ? 0xc : 4
      }
    }
  }

  /// Where a function's MSI-X structures are.
  struct MSIX: Sendable {
    var capability: Int
    var bar: Int
    var vectors: Int
    var tableOffset: UInt64
    var pendingOffset: UInt64
  }

  private(set) var bytes = [UInt8](repeating: 0, count: size)
  /// Bits that the guest may change.
  private(set) var writable = [UInt8](repeating: 0, count: size)
  private(set) var bars: [BAR?] = Array(repeating: nil, count: 6)
  private(set) var msix: MSIX?
  /// Where the next capability goes, and the byte that is to point there.
  private var nextCapability = 0x40
  private var capabilityLink = Register.capabilities
  /// The same for extended capabilities; the first has its place fixed.
  private var nextExtendedCapability = size
  private var lastExtendedCapability: Int?

  /// A type 0 header with no capabilities and no BARs.
  ///
  /// `classCode` is base class, subclass and programming interface, 24 bits; `interruptPin` is 1 for INTA#, 0 for none;
  /// `isMultifunction` belongs to function 0 of a device with several.
  public init(
    vendor: UInt16, device: UInt16, subsystemVendor: UInt16 = 0, subsystem: UInt16 = 0, classCode: UInt32,
    revision: UInt8 = 0, interruptPin: UInt8 = 0, isMultifunction: Bool = false
  ) {
    store(UInt32(vendor) | UInt32(device) << 16, at: Register.vendor)
    store(classCode << 8 | UInt32(revision), at: Register.revision)
    store(UInt32(subsystemVendor) | UInt32(subsystem) << 16, at: Register.subsystemVendor)
    bytes[Register.headerType] = isMultifunction ? 0x80 : 0
    bytes[Register.interruptPin] = interruptPin
    allow(Command.writable, at: Register.command)
    writable[Register.interruptLine] = 0xff
  }

  /// Gives the function a base address register (0-5; a 64-bit one takes the next, too).
  public mutating func addBAR(_ index: Int, _ bar: BAR) {
    precondition(bar.size.nonzeroBitCount == 1 && bar.size >= 4, "a BAR's size is a power of two")
    bars[index] = bar
    let offset = Register.bars + index * 4
    store(bar.typeBits, at: offset)
    // The address bits below the size are hard-wired to 0, which is how the guest learns the size.
    let mask = ~(bar.size - 1)
    allow(UInt32(truncatingIfNeeded: mask) & ~(bar.typeBits & 1 == 1 ? 3 : 0xf), at: offset)
    if case .memory64 = bar { allow(UInt32(truncatingIfNeeded: mask >> 32), at: offset + 4) }
  }

  /// Appends a capability whose header is followed by `body`; `writable` has a set bit for each that the guest may
  /// change, and zeros from its end on. Returns the capability's offset.
  @discardableResult
  public mutating func addCapability(id: UInt8, body: [UInt8], writable mask: [UInt8] = []) -> Int {
    let offset = nextCapability
    precondition(offset + 2 + body.count <= Self.size && mask.count <= body.count, "capabilities fill the space")
    bytes[capabilityLink] = UInt8(offset)
    bytes[Register.status] |= UInt8(Status.capabilities)
    bytes[offset] = id
    bytes.replaceSubrange(offset + 2..<offset + 2 + body.count, with: body)
    writable.replaceSubrange(offset + 2..<offset + 2 + mask.count, with: mask)
    capabilityLink = offset + 1
    nextCapability = (offset + 2 + body.count + 3) & ~3
    return offset
  }

  /// Makes the function an integrated endpoint of the PCI Express root complex (PCI Express Base 4.0, 7.5.3), without
  /// which guests do not look for extended capabilities.
  public mutating func addPCIExpress() {
    // Version 2 of the structure, type 9; role-based error reporting; relaxed ordering, no snoop, reads of 512 bytes.
    var body = [UInt8](repeating: 0, count: 58)
    body.replaceSubrange(0..<8, with: [0x92, 0x00, 0x00, 0x80, 0x00, 0x00, 0x10, 0x28])
    addCapability(id: 0x10, body: body, writable: [0, 0, 0, 0, 0, 0, 0x1f, 0x78])
  }

  /// Appends an extended capability (PCI Express Base 4.0, 7.6) whose header is followed by `body`, whole 32-bit words;
  /// `writable` as in `addCapability`. Returns the capability's offset.
  @discardableResult
  public mutating func addExtendedCapability(
    id: UInt16, version: UInt8, body: [UInt8], writable mask: [UInt8] = []
  ) -> Int {
    let offset = nextExtendedCapability
    let end = offset + 4 + body.count
    precondition(
      end <= Self.extendedSize && body.count & 3 == 0 && mask.count <= body.count, "capabilities fill the space")
    bytes += [UInt8](repeating: 0, count: Self.extendedSize - bytes.count)
    writable += [UInt8](repeating: 0, count: Self.extendedSize - writable.count)
    store(UInt32(id) | UInt32(version & 15) << 16, at: offset)
    bytes.replaceSubrange(offset + 4..<end, with: body)
    writable.replaceSubrange(offset + 4..<offset + 4 + mask.count, with: mask)
    if let last = lastExtendedCapability {
      // The link is the header's upper 12 bits.
      bytes[last + 2] |= UInt8(truncatingIfNeeded: offset << 4)
      bytes[last + 3] = UInt8(truncatingIfNeeded: offset >> 4)
    }
    lastExtendedCapability = offset
    nextExtendedCapability = end
    return offset
  }

  /// Gives the function `vectors` (1-2048) MSI-X vectors whose table and pending bits lie in a memory BAR, at multiples
  /// of 8; the BAR's other bytes stay the device's.
  public mutating func addMSIX(vectors: Int, bar: Int, tableOffset: UInt32, pendingOffset: UInt32) {
    precondition((1...2048).contains(vectors) && (tableOffset | pendingOffset) & 7 == 0, "no such MSI-X table")
    var body = [UInt8](repeating: 0, count: 10)
    for (index, value) in [UInt32(vectors - 1) << 16, tableOffset | UInt32(bar), pendingOffset | UInt32(bar)]
      .enumerated()
    {
      for byte in 0..<4 where index * 4 + byte >= 2 {
        body[index * 4 + byte - 2] = UInt8(truncatingIfNeeded: value >> UInt32(byte * 8))
      }
    }
    // Function mask and enable.
    let capability = addCapability(id: 0x11, body: body, writable: [0, 0xc0])
    msix = MSIX(
      capability: capability, bar: bar, vectors: vectors, tableOffset: UInt64(tableOffset),
      pendingOffset: UInt64(pendingOffset))
  }

  private mutating func store(_ value: UInt32, at offset: Int) {
    for index in 0..<4 { bytes[offset + index] = UInt8(truncatingIfNeeded: value >> UInt32(index * 8)) }
  }

  private mutating func allow(_ bits: UInt32, at offset: Int) {
    for index in 0..<4 { writable[offset + index] = UInt8(truncatingIfNeeded: bits >> UInt32(index * 8)) }
  }
}
