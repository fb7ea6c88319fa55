import CGuest

/// A disk that is read and written a record at a time: 4 KiB that say whose they are.
final class Volume {
  static let vector: UInt8 = 0x50
  private static let sectors: UInt64 = 8
  private static let words: UInt64 = 512
  private static let mark: UInt64 = 0x4345_5256_4f43_4552

  let function: PCI.Function
  let device: VirtioBlock
  /// The serial number of a disk that was attached.
  var name = Bytes(address: 0, count: 0)
  private let buffers: UInt64

  init(_ function: PCI.Function) {
    self.function = function
    device = VirtioBlock(
      function,
      VirtioBlock.Options(
        isPacked: false, usesIndirect: true, usesEventIndex: true, vector: Self.vector, queues: 1, depth: 4))
    buffers = guest_allocate(UInt64(device.depth) * Self.sectors * 512, 4096)
  }

  private func buffer(_ slot: UInt16) -> UInt64 { buffers + UInt64(slot) * Self.sectors * 512 }

  private static func word(_ record: UInt64, _ generation: UInt64) -> UInt64 {
    mark ^ record << 32 ^ generation
  }

  /// Makes a request and does not wait for it.
  func begin(_ kind: VirtioBlock.Kind, slot: UInt16, record: UInt64) {
    device.submit(
      kind, slot: slot, sector: record * Self.sectors, buffer: buffer(slot), length: UInt32(Self.sectors * 512))
    device.notify()
  }

  /// Waits for a request; its slot and status.
  func finish() -> VirtioBlock.Completion {
    while true {
      if let completion = device.completion() { return completion }
      if !device.enableInterrupts() { sti_hlt_cli() }
      device.disableInterrupts()
    }
  }

  private func request(_ kind: VirtioBlock.Kind, _ record: UInt64) -> UInt8 {
    begin(kind, slot: 0, record: record)
    return finish().status
  }

  /// Writes a record; the device's status.
  func write(_ record: UInt64, generation: UInt64) -> UInt8 {
    fill64(buffer(0), Self.word(record, generation), Self.words)
    return request(.write, record)
  }

  /// Whether a record is of a generation. Each is another record's or another write's where it is not.
  func holds(_ record: UInt64, generation: UInt64) -> Bool {
    expect("a read's status", UInt64(request(.read, record)), equals: 0)
    return all_words64(buffer(0), Self.word(record, generation), Self.words) != 0
  }

  /// Copies a record from another disk.
  func copy(_ record: UInt64, from other: Volume) {
    expect("a read's status", UInt64(other.request(.read, record)), equals: 0)
    copy_bytes(
      UnsafeMutableRawPointer(bitPattern: UInt(buffer(0)))!, UnsafeRawPointer(bitPattern: UInt(other.buffer(0)))!,
      Int(Self.sectors * 512))
    expect("a write's status", UInt64(request(.write, record)), equals: 0)
  }

  func flush() {
    device.submit(.flush, slot: 0)
    device.notify()
    expect("a flush's status", UInt64(finish().status), equals: 0)
  }

  /// The serial number (5.2.6): 20 bytes at most, padded with zeros.
  func serial() -> Bytes {
    device.submit(.identity, slot: 0, buffer: buffer(0), length: 20)
    device.notify()
    expect("the status of asking for a serial number", UInt64(finish().status), equals: 0)
    return Bytes(address: buffer(0), count: scan_byte(buffer(0), 0, 20, 0))
  }

  /// The host wants the disk back.
  var isLeaving: Bool { PCIHotplug.isLeaving(function.device) }

  /// Gives the disk up: with `isRude` as it is, with requests under way.
  func eject(isRude: Bool = false) {
    if !isRude { device.stop() }
    PCIHotplug.eject(function.device)
    expect("an ejected device's identity", UInt64(PCI.read32(function, 0)), equals: 0xffff_ffff)
  }
}
