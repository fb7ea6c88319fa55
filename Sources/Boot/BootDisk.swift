import CFirmware

/// A disk that starts a PVH kernel on any PC BIOS, for emulators that load no kernels themselves (firmware/bootdisk.S).
public enum BootDisk {
  private static let sectorSize = 512
  private static let chunkSize = 32 * sectorSize
  private static let startInfoSize = 4096
  private static let payload = 0x10000
  /// What fits between the payload's address and the BIOS's own memory, in whole chunks.
  private static let kernelLimit = 0x80000 - startInfoSize
  /// BIOSes believe in geometries: whole cylinders of 4 heads and 16 sectors.
  private static let cylinderSize = 4 * 16 * sectorSize

  /// The disk's bytes: whole cylinders of 4 heads and 16 sectors. The kernel gets a command line and no memory map.
  ///
  /// Errors: those of an ELF file, `.malformed` with `.noteSize` where it has no PVH entry, `.commandLineLength`,
  /// `.bootDiskKernel` where it does not load from 1 MiB on or has more than 508 KiB.
  public static func image(kernel: BootImage, commandLine: String) throws(BootError) -> [UInt8] {
    let elf = try ELFImage(kernel)
    let entry = try PVHLoader.entry(elf)
    let base = Platform.oneMiB
    var bytes: [UInt8] = []
    for segment in elf.segments {
      let (end, overflow) = segment.physicalAddress.addingReportingOverflow(segment.memorySize)
      guard segment.physicalAddress >= base, !overflow, end <= base + UInt64(kernelLimit) else {
        throw .bootDiskKernel(
          path: kernel.path, start: segment.physicalAddress, end: end, limit: base + UInt64(kernelLimit))
      }
      if bytes.count < end - base { bytes += [UInt8](repeating: 0, count: Int(end - base) - bytes.count) }
      let from = Int(segment.physicalAddress - base)
      let contents = try kernel.bytes(.segment(segment.index), at: segment.offset, count: Int(segment.fileSize))
      bytes.replaceSubrange(from..<from + contents.count, with: contents)
    }
    let words = (bytes.count + 3) / 4
    let chunks = (startInfoSize + bytes.count + chunkSize - 1) / chunkSize

    var disk = TableBytes()
    disk.append(UnsafeBufferPointer(start: swiftvmm_boot_disk_start_address(), count: sectorSize))
    disk.store(UInt32(truncatingIfNeeded: entry), at: 496)
    disk.store(UInt32(words), at: 500)
    disk.store(UInt16(chunks), at: 504)
    disk.append(try startInfo(commandLine, path: kernel.path))
    disk.append(bytes)
    disk.pad(to: chunkSize)
    disk.append([UInt8](repeating: 0, count: sectorSize))
    disk.pad(to: cylinderSize)
    return disk.bytes
  }

  /// PVH's hvm_start_info, version 1, with a command line behind it and nothing else (Xen, arch-x86/hvm/start_info.h).
  private static func startInfo(_ commandLine: String, path: String) throws(BootError) -> [UInt8] {
    let text = Array(commandLine.utf8)
    let offset = 64
    guard text.count < startInfoSize - offset else {
      throw .commandLineLength(path: path, count: text.count, limit: startInfoSize - offset - 1)
    }
    guard !text.contains(0) else { throw .stringWithNUL(path: path) }
    var page = TableBytes(zeros: startInfoSize)
    page.store(UInt32(0x336e_c578), at: 0)
    page.store(UInt32(1), at: 4)
    page.store(UInt64(payload + offset), at: 24)
    page.store(text, at: offset)
    return page.bytes
  }
}
