import DeviceTesting
import GuestMemory
import PlatformDevices
import Testing

@Suite struct FirmwareConfigurationTests {
  private let fixture: Fixture
  private let file = (0..<300).map { UInt8(truncatingIfNeeded: $0) }

  init() throws {
    fixture = try Fixture()
    try fixture.attach(
      FirmwareConfiguration(
        memory: fixture.memory, items: [FirmwareConfiguration.Key.cpus: [4, 0]],
        files: [("opt/second", [1]), ("etc/first", file)]))
  }

  private func select(_ key: UInt64) { fixture.output(0x510, key, size: 2) }
  private func bytes(_ count: Int) -> [UInt8] { (0..<count).map { _ in UInt8(fixture.input(0x511)) } }

  /// Starts a DMA request at 0x1000 as the guest does; the control word afterwards.
  private func dma(control: UInt32, length: UInt32, target: UInt64, at address: UInt64 = 0x1000) throws -> UInt32 {
    try fixture.memory.write(control.bigEndian, to: GuestPhysicalAddress(address))
    try fixture.memory.write(length.bigEndian, to: GuestPhysicalAddress(address + 4))
    try fixture.memory.write(target.bigEndian, to: GuestPhysicalAddress(address + 8))
    fixture.output(0x514, UInt64(UInt32(address >> 32).bigEndian), size: 4)
    fixture.output(0x518, UInt64(UInt32(truncatingIfNeeded: address).bigEndian), size: 4)
    return UInt32(bigEndian: try fixture.memory.read(GuestPhysicalAddress(address)))
  }

  @Test func signatureAndItems() {
    select(0)
    #expect(bytes(6) == Array("QEMU".utf8) + [0, 0])
    select(1)
    #expect(bytes(4) == [3, 0, 0, 0])
    select(5)
    #expect(bytes(2) == [4, 0])
    select(0x7777)
    #expect(bytes(1) == [0])
    #expect(fixture.input(0x514, size: 4) == UInt64(UInt32(bigEndian: 0x5145_4d55)))
  }

  @Test func directoryNamesTheFiles() {
    select(0x19)
    #expect(bytes(4) == [0, 0, 0, 2])
    let entry = bytes(64)
    #expect(entry.prefix(8) == [0, 0, 1, 44, 0, 0x20, 0, 0])
    #expect(String(decoding: entry.dropFirst(8).prefix { $0 != 0 }, as: UTF8.self) == "etc/first")
    #expect(bytes(64).prefix(8) == [0, 0, 0, 1, 0, 0x21, 0, 0])
    select(0x20)
    #expect(bytes(300) == file)
  }

  @Test func fileByDMA() throws {
    try fixture.memory.fill(GuestPhysicalAddress(0x2000), count: 512, with: 0xee)
    #expect(try dma(control: 0x20_0008 | 2, length: 100, target: 0x2000) == 0)
    #expect(try dma(control: 4, length: 50, target: 0) == 0)
    #expect(try dma(control: 2, length: 200, target: 0x2064) == 0)
    let copied = try fixture.memory.bytes(GuestPhysicalAddress(0x2000), count: 301)
    #expect(copied == Array(file[..<100] + file[150...]) + [UInt8](repeating: 0, count: 50) + [0xee])
  }

  @Test func dmaRefusesWhatItCannotDo() throws {
    select(0x20)
    #expect(try dma(control: 16, length: 1, target: 0x2000) == 1)
    #expect(try dma(control: 2, length: 16, target: 0xf_fff8) == 1)
    #expect(try dma(control: 2, length: .max, target: 0x2000) == 1)
    #expect(try dma(control: 2, length: 16, target: .max - 3) == 1)
    // The offset has not moved.
    #expect(bytes(2) == [0, 1])
    // A skip past the end, then reads of zeros.
    #expect(try dma(control: 4, length: .max, target: 0) == 0)
    #expect(try dma(control: 4, length: .max, target: 0) == 0)
    #expect(bytes(1) == [0])
  }

  @Test func aRequestOutsideRAMIsLost() {
    fixture.output(0x514, UInt64(UInt32(0x10).bigEndian), size: 4)
    fixture.output(0x518, 0, size: 4)
    select(0)
    #expect(bytes(1) == [0x51])
  }

  @Test func requestAboveFourGiB() throws {
    select(0x21)
    #expect(try dma(control: 2, length: 1, target: 0x3000, at: 4 << 30) == 0)
    #expect(try fixture.memory.read(GuestPhysicalAddress(0x3000), as: UInt8.self) == 1)
  }
}
