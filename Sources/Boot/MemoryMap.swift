import GuestMemory

/// Fixed addresses of the platform, as docs/DESIGN.md lists them.
public enum Platform {
  /// First address that is never RAM below 4 GiB: the PCI hole.
  public static let pciHole: UInt64 = 0xc000_0000
  /// 32-bit BARs: the hole up to ECAM.
  public static let pciWindow32 = GuestRange(start: GuestPhysicalAddress(pciHole), size: 0x2000_0000)!
  /// PCI Express configuration space of 256 buses.
  public static let ecam = GuestRange(start: GuestPhysicalAddress(0xe000_0000), size: 0x1000_0000)!
  /// The I/O APIC's registers.
  public static let ioapic: UInt64 = 0xfec0_0000
  /// The HPET's registers.
  public static let hpet: UInt64 = 0xfed0_0000
  /// The local APICs' registers.
  public static let localAPIC: UInt64 = 0xfee0_0000
  /// IOAPIC, HPET and local APICs, in one range.
  public static let interruptControllers = GuestRange(start: GuestPhysicalAddress(ioapic), size: 0x30_0000)!
  /// Where a boot ROM of the greatest size begins; every boot ROM ends at 4 GiB.
  public static let romArea = GuestRange(start: GuestPhysicalAddress(0xff00_0000), size: 0x100_0000)!
  /// The BIOS data area that real-mode programs find at 40:0E: the last KiB below the VGA hole.
  ///
  /// Its last 64 bytes are ACPI's FACS.
  public static let extendedBIOSData = GuestRange(start: GuestPhysicalAddress(0x9fc00), size: 0x400)!
  /// The end of the boot ROM again, below 1 MiB, and ACPI's tables before it.
  public static let biosArea = GuestRange(start: GuestPhysicalAddress(0xe0000), size: 0x20000)!
  /// The page of the virtual machine's generation id, behind ACPI's tables: a boot ROM's alias that leaves them room ends
  /// them no earlier.
  public static let generationID = GuestRange(start: GuestPhysicalAddress(0xef000), size: 0x1000)!
  /// Where extended memory begins.
  public static let oneMiB: UInt64 = 0x10_0000
  /// Where RAM goes on after the PCI hole.
  public static let fourGiB: UInt64 = 0x1_0000_0000
}

/// Where RAM lies and what guests are told about it: the one source for slots, E820, PVH, Multiboot and fw_cfg.
public struct MemoryMap: Equatable, Sendable {
  /// What a range is good for, with E820's numbers (ACPI 6.5, 15.1).
  public enum Kind: UInt32, Sendable {
    /// RAM for the guest's use.
    case usable = 1
    /// Not RAM, or RAM that is taken.
    case reserved = 2
  }

  /// A range and its kind.
  public struct Entry: Equatable, Sendable {
    /// Guest-physical addresses.
    public let range: GuestRange
    /// What it is good for.
    public let kind: Kind
  }

  /// Bytes of RAM.
  public let size: UInt64
  /// RAM from 0 on, up to the PCI hole at most. What is below 1 MiB but not usable is RAM behind ROM and tables.
  public let lowRAM: GuestRange
  /// RAM from 4 GiB on.
  public let highRAM: GuestRange?
  /// Low RAM's end, reserved for a disk that the boot ROM reads from memory.
  public let bootDisk: GuestRange?
  /// Usable and reserved ranges by rising address; they do not overlap, and what is in none is free for devices.
  public let entries: [Entry]

  /// The map of a machine with `size` bytes of RAM: whole 4 KiB pages, 1 MiB to 2^46 bytes; else `.memorySize`.
  ///
  /// `bootDisk` is the size of a disk image as `BootCatalogue.bootDiskSize` tells it; one that does not fit between 1 MiB
  /// and the end of low RAM is left out, and refused when it is booted.
  public init(size: UInt64, bootDisk: UInt64 = 0) throws(BootError) {
    guard size & 0xfff == 0, size >= Platform.oneMiB, size <= 1 << 46 else { throw .memorySize(size) }
    let low = min(size, Platform.pciHole)
    let diskSize = bootDisk <= low - Platform.oneMiB ? (bootDisk + 0xfff) & ~0xfff : 0
    let disk = Self.range(low - diskSize, low)
    self.size = size
    self.bootDisk = diskSize > 0 ? disk : nil
    lowRAM = Self.range(0, low)
    highRAM = size > low ? Self.range(Platform.fourGiB, Platform.fourGiB + size - low) : nil
    let entries: [(GuestRange?, Kind)] = [
      (Self.range(0, Platform.extendedBIOSData.start.rawValue), .usable),
      (Platform.extendedBIOSData, .reserved),
      (Platform.biosArea, .reserved),
      (Self.range(Platform.oneMiB, disk.start.rawValue), .usable),
      (disk, .reserved),
      (Platform.ecam, .reserved),
      (Platform.interruptControllers, .reserved),
      (Platform.romArea, .reserved),
      (highRAM, .usable),
    ]
    self.entries = entries.compactMap { range, kind in
      guard let range, range.size > 0 else { return nil }
      return Entry(range: range, kind: kind)
    }
  }

  /// Addresses of this map, which never wrap.
  private static func range(_ start: UInt64, _ end: UInt64) -> GuestRange {
    GuestRange(start: GuestPhysicalAddress(start), size: end - start)!
  }

  /// The ranges that `GuestMemory` is made of.
  public var ram: [GuestRange] { [lowRAM] + (highRAM.map { [$0] } ?? []) }

  /// The ranges that a guest may use as it likes.
  public var usable: [GuestRange] { entries.filter { $0.kind == .usable }.map(\.range) }

  /// The first address after all RAM and everything below 4 GiB: where 64-bit BARs may begin.
  public var end: GuestPhysicalAddress { highRAM?.end ?? GuestPhysicalAddress(Platform.fourGiB) }

  /// E820 entries (20 bytes each: base, size, type), as INT 15h, boot_params and fw_cfg's `etc/e820` hold them.
  public var e820: [UInt8] {
    var table = TableBytes()
    for entry in entries {
      table.append(entry.range.start.rawValue)
      table.append(entry.range.size)
      table.append(entry.kind.rawValue)
    }
    return table.bytes
  }
}
