import Accelerator
import GuestMemory

/// The first sector of a disk, which ends in 55 AA, at 0000:7C00 with DL the first hard disk's number.
///
/// With a boot ROM the guest starts at the reset vector, and the ROM jumps to the sector, which it finds in place; a disk
/// of more sectors lies in guest memory, where the built-in ROM's INT 13h reads it (firmware/bootrom.S, boot descriptor).
/// Without a ROM it starts at the sector, and no BIOS service is there.
struct BootSectorLoader: BootLoader {
  let kind = BootKind.bootSector
  let inputs: Set<BootInput> = []

  private static let size: UInt64 = 512
  private static let address: UInt64 = 0x7c00

  /// Bytes of a disk of more than one sector, else 0.
  static func diskSize(_ image: BootImage) -> UInt64 { image.size >= 2 * size ? image.size : 0 }

  static func hasSignature(_ image: BootImage) -> Bool { image.head.number(at: 510, as: UInt16.self) == 0xaa55 }

  func recognises(_ image: BootImage, loadAddress: UInt64?) -> Bool { Self.hasSignature(image) }

  func load(_ image: BootImage, _ request: BootRequest, _ placer: inout Placer) throws(BootError) -> EntryState {
    let range = try placer.claim(.bootSector, at: Self.address, size: Self.size)
    try placer.copy(image, .bootSector, at: 0, to: range)
    if request.firmware != nil {
      try Self.placeDescriptor(image, &placer)
      return .reset
    }
    var state = EntryState.realMode(
      codeSegment: 0, ip: UInt16(Self.address), dataSegment: 0, stackSegment: 0, sp: UInt16(Self.address))
    state.general.rdx = 0x80
    return state
  }

  /// Leaves the built-in ROM's boot descriptor, which names the disk; an older one must not stay behind a reset.
  private static func placeDescriptor(_ image: BootImage, _ placer: inout Placer) throws(BootError) {
    var descriptor = TableBytes()
    descriptor.append(UInt32(0x424d_5653))  // "SVMB"
    descriptor.append(UInt32(0))  // the boot sector at 0x7C00
    descriptor.append(UInt64(0))
    descriptor.append(UInt64(0))
    if Self.diskSize(image) > 0 {
      let disk = try placer.placeFile(image, .disk, from: Platform.oneMiB, prefer: .highest)
      descriptor.append(UInt32(disk.start.rawValue))
      descriptor.append(UInt32(disk.size / size))
    } else {
      descriptor.append(UInt64(0))
    }
    try placer.write(descriptor.bytes, at: Platform.extendedBIOSData.start + 0x10)
  }
}
