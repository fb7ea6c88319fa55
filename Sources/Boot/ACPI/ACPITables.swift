import GuestMemory

/// What ACPI's tables describe.
public struct ACPIConfiguration: Sendable {
  /// Processors; their APIC ids count from 0.
  public var cpus: Int
  /// Where 64-bit BARs may be; nil where there are none.
  public var pciWindow64: GuestRange?
  /// Whether there is an HPET.
  public var hasHPET = false
  /// Whether there is a keyboard behind the i8042. Without one, Linux does not probe it, which saves it time.
  public var hasKeyboardController = false
  /// More objects for the scope `\_SB`: hotplug controllers and devices.
  public var systemBus: [AML] = []
  /// Methods for the scope `\_GPE`: `_Exx` and `_Lxx`.
  public var generalEvents: [AML] = []

  /// The platform with its fixed devices.
  public init(cpus: Int, pciWindow64: GuestRange? = nil) {
    self.cpus = cpus
    self.pciWindow64 = pciWindow64
  }
}

/// ACPI's tables (ACPI 6.5, chapter 5), laid out for guest memory.
public struct ACPITables: Equatable, Sendable {
  /// A table and where it lies.
  public struct Table: Equatable, Sendable {
    /// Its signature.
    public let name: String
    /// Where it lies.
    public let address: GuestPhysicalAddress
    /// The table.
    public let bytes: [UInt8]
  }

  /// The FACS, which the guest writes, in the last 64 bytes of the extended BIOS data area.
  public static let facsAddress = Platform.extendedBIOSData.end.rawValue - 64

  /// Where the root pointer lies, for `BootRequest.acpiRSDP`.
  public let rsdp: GuestPhysicalAddress
  /// All tables, the root pointer first.
  public let tables: [Table]

  /// Lays the tables out in the BIOS area, below the boot ROM's alias; nil where a ROM of more than 64 KiB, which brings
  /// its own, leaves no room.
  ///
  /// Errors: `.tablesTooLarge`.
  public init?(_ configuration: ACPIConfiguration, firmware: BootROM?) throws(BootError) {
    let start = Platform.biosArea.start.rawValue
    let end = firmware?.alias.start.rawValue ?? Platform.biosArea.end.rawValue
    guard end - start >= 0x1_0000 else { return nil }
    var layout = Layout(next: start + 64, end: Platform.generationID.start.rawValue)
    let dsdt = try layout.add("DSDT", DSDT.table(configuration))
    let fadt = try layout.add("FACP", FADT.table(configuration, dsdt: dsdt))
    var roots = [fadt]
    roots.append(try layout.add("APIC", MADT.table(configuration)))
    roots.append(try layout.add("MCFG", MCFG.table()))
    if configuration.hasHPET { roots.append(try layout.add("HPET", HPET.table())) }
    var rsdt = TableBytes()
    var xsdt = TableBytes()
    for root in roots {
      rsdt.append(UInt32(root))
      xsdt.append(root)
    }
    let rsdtAddress = try layout.add("RSDT", Self.table("RSDT", revision: 1, rsdt.bytes))
    let xsdtAddress = try layout.add("XSDT", Self.table("XSDT", revision: 1, xsdt.bytes))
    rsdp = GuestPhysicalAddress(start)
    let root = Table(name: "RSDP", address: rsdp, bytes: Self.rootPointer(rsdt: rsdtAddress, xsdt: xsdtAddress))
    let facs = Table(name: "FACS", address: GuestPhysicalAddress(Self.facsAddress), bytes: FADT.facs())
    tables = [root] + layout.tables + [facs]
  }

  /// Writes the tables; after a reset they are written again.
  public func write(to memory: GuestMemory) throws(BootError) {
    do {
      for table in tables { try memory.write(table.bytes, to: table.address) }
    } catch { throw .memory(error) }
  }

  private struct Layout {
    var next: UInt64
    let end: UInt64
    var tables: [Table] = []

    mutating func add(_ name: String, _ bytes: [UInt8]) throws(BootError) -> UInt64 {
      let address = next
      let size = UInt64(bytes.count)
      guard size <= end - address else { throw .tablesTooLarge(size: size, room: end - address) }
      tables.append(Table(name: name, address: GuestPhysicalAddress(address), bytes: bytes))
      next = min(end, (address + size + 15) & ~15)
      return address
    }
  }

  /// A table: the 36-byte header (5.2.6) and its body, with the checksum that makes all bytes add up to 0.
  static func table(_ signature: String, revision: UInt8, _ body: [UInt8]) -> [UInt8] {
    var table = TableBytes()
    table.append(signature.utf8)
    table.append(UInt32(36 + body.count))
    table.append(revision)
    table.append(UInt8(0))  // checksum
    table.append("SWVMM ".utf8)
    table.append("SWIFTVMM".utf8)
    table.append(UInt32(1))
    table.append("SWVM".utf8)
    table.append(UInt32(1))
    table.append(body)
    table.store(checksum(table.bytes), at: 9)
    return table.bytes
  }

  /// The RSDP, revision 2 (5.2.5.3): the first checksum covers 20 bytes, the second all 36.
  private static func rootPointer(rsdt: UInt64, xsdt: UInt64) -> [UInt8] {
    var table = TableBytes()
    table.append("RSD PTR ".utf8)
    table.append(UInt8(0))
    table.append("SWVMM ".utf8)
    table.append(UInt8(2))
    table.append(UInt32(rsdt))
    table.append(UInt32(36))
    table.append(xsdt)
    table.append(UInt32(0))
    table.store(checksum(Array(table.bytes.prefix(20))), at: 8)
    table.store(checksum(table.bytes), at: 32)
    return table.bytes
  }

  private static func checksum(_ bytes: [UInt8]) -> UInt8 { bytes.reduce(0) { $0 &- $1 } }
}

/// Appends a Generic Address Structure (5.2.3.2).
extension TableBytes {
  /// Ports: width in bits, and the size of an access (1 byte, 2 words, 3 double words).
  mutating func appendPortAddress(_ port: UInt64, bits: UInt8, access: UInt8) {
    append([1, bits, 0, access])
    append(port)
  }

  /// Memory.
  mutating func appendMemoryAddress(_ address: UInt64, bits: UInt8) {
    append([0, bits, 0, 0])
    append(address)
  }
}
