import DeviceModel
import DeviceTesting
import PlatformDevices
import StateTree
import Testing

@Suite struct PCITests {
  private let fixture: Fixture
  private let host: PCIHost
  private let device: SamplePCIDevice

  init() throws {
    fixture = try Fixture()
    host = fixture.pciHost()
    try fixture.attach(host)
    try fixture.attach(ResetControl(machine: fixture.machine))
    device = SamplePCIDevice(host: host, interrupts: fixture.sink)
    #expect(host.add(PCIHostBridge(host: host, interrupts: fixture.sink), at: PCIHostBridge.address))
    #expect(host.add(device, at: PCIAddress(device: 3)))
  }

  private func read(_ register: UInt64, size: Int = 4, slot: UInt64 = 3) -> UInt64 {
    fixture.bus.read(PCIHost.ecam | slot << 15 | register, size: size) & (size == 8 ? ~0 : (1 << UInt64(size * 8)) - 1)
  }

  private func write(_ register: UInt64, _ value: UInt64, size: Int = 4) {
    fixture.bus.write(PCIHost.ecam | 3 << 15 | register, size: size, value: value)
  }

  private func isMapped(_ address: UInt64) -> Bool { fixture.bus.find(address)?.device === device }

  @Test func bothDoorsShowTheSameSpace() {
    #expect(read(0) == 0x5678_1234)
    #expect(read(0, slot: 0) == 0x0008_1b36)
    #expect(read(0, slot: 4) == 0xffff_ffff)
    fixture.output(0xcf8, 0x8000_1800, size: 4)
    #expect(fixture.input(0xcf8, size: 4) == 0x8000_1800)
    #expect(fixture.input(0xcfc, size: 4) == 0x5678_1234)
    #expect(fixture.input(0xcfe, size: 2) == 0x5678)
    #expect(fixture.input(0xcff) == 0x56)
    fixture.output(0xcf8, 0x8000_183c, size: 4)
    fixture.output(0xcfc, 0x0b)
    #expect(read(0x3c, size: 2) == 0x010b)
    fixture.output(0xcf8, 0x0000_1800, size: 4)
    #expect(fixture.input(0xcfc, size: 4) == 0xffff_ffff)
    // The reset control register lies among the address port's bytes.
    fixture.output(0xcf9, 0x06)
    #expect(fixture.machine.take() == [.reset])
    #expect(fixture.input(0xcf8, size: 4) == 0x0000_1800)
  }

  @Test func sizingGivesTheMasks() {
    for register in [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30] as [UInt64] { write(register, 0xffff_ffff) }
    #expect(read(0x10, size: 8) == 0xffff_ffff_ffff_c00c)
    #expect(read(0x18) == 0xffff_ffe1)
    #expect(read(0x1c) == 0)
    #expect(read(0x20) == 0xffff_f000)
    #expect(read(0x24) == 0)
    #expect(read(0x30) == 0)
    // Identity, class and status are not the guest's.
    for register in [0x00, 0x08, 0x2c] as [UInt64] {
      let before = read(register)
      write(register, ~before & 0xffff_ffff)
      #expect(read(register) == before)
    }
    write(4, 0xffff_ffff)
    #expect(read(4) == 0x0010_0547)
  }

  @Test func barsFollowTheGuest() {
    write(0x10, 0x10_0000_0000, size: 8)
    write(0x20, 0xc000_0000)
    #expect(!isMapped(0x10_0000_0000))
    write(4, 2, size: 2)
    #expect(isMapped(0x10_0000_0000) && isMapped(0x10_0000_3fff) && !isMapped(0x10_0000_4000))
    #expect(isMapped(0xc000_0000))
    fixture.bus.write(0x10_0000_0008, size: 8, value: 0x1122)
    write(0x14, 0x20)
    #expect(!isMapped(0x10_0000_0000) && isMapped(0x20_0000_0000))
    #expect(fixture.bus.read(0x20_0000_0000, size: 8) == 0x1122)
    write(4, 0, size: 2)
    #expect(!isMapped(0x20_0000_0000) && !isMapped(0xc000_0000))
    write(0x18, 0x1000)
    write(4, 1, size: 2)
    #expect(fixture.input(0x1005) == 5)
    write(0x18, 0x2000)
    #expect(fixture.input(0x1005) == 0xff && fixture.input(0x2005) == 5)
    device.reset()
    #expect(fixture.input(0x2005) == 0xff)
    #expect(read(0x18) == 1)
  }

  @Test func aBARWaitsForItsAddressToBecomeFree() throws {
    let other = SamplePCIDevice(host: host, interrupts: fixture.sink)
    #expect(host.add(other, at: PCIAddress(device: 4)))
    #expect(!host.add(other, at: PCIAddress(device: 4)))
    func writeOther(_ register: UInt64, _ value: UInt64) {
      fixture.bus.write(PCIHost.ecam | 4 << 15 | register, size: 4, value: value)
    }
    write(0x20, 0xc000_0000)
    write(4, 2)
    writeOther(0x20, 0xc000_1000)
    writeOther(4, 2)
    // Swapped, one after the other.
    write(0x20, 0xc000_1000)
    #expect(!isMapped(0xc000_0000) && !isMapped(0xc000_1000))
    writeOther(0x20, 0xc000_0000)
    #expect(isMapped(0xc000_1000))
    #expect(fixture.bus.find(0xc000_0000)?.device === other)
  }

  @Test func capabilitiesAreChained() {
    #expect(read(6, size: 2) & 0x10 == 0x10)
    #expect(read(0x34, size: 1) == 0x40)
    #expect(read(0x40) == 0xaa03_4809)
    write(0x44, 0xff, size: 1)
    #expect(read(0x44, size: 1) == 0xbf)
    #expect(read(0x48) == 0x0002_5411)
    #expect(read(0x4c) == 0x0000_0004)
    #expect(read(0x50) == 0x0000_0804)
    // PCI Express: version 2, integrated endpoint; only its control register is the guest's.
    #expect(read(0x54) == 0x0092_0010)
    write(0x5c, 0xffff_ffff)
    #expect(read(0x5c) == 0x0000_781f)
  }

  @Test func extendedCapabilitiesAreInECAMAlone() {
    #expect(read(0x100) == 0x10c1_0003)
    #expect(read(0x104, size: 8) == 0x0807_0605_0403_0201)
    #expect(read(0x10c) == 0x0001_000b)
    #expect(read(0x110) == 0x0101_eeee)
    write(0x114, 0xffff_ffff)
    #expect(read(0x114) == 0xf0ff)
    write(0x104, 0)
    #expect(read(0x104) == 0x0403_0201)
    #expect(read(0xffc) == 0 && read(0xff8, size: 8) == 0 && read(0xfff, size: 1) == 0)
    // A function without: no capability is there.
    #expect(read(0x100, slot: 0) == 0)
    // Bits 24 to 27 of the address port are no part of the register's number.
    fixture.output(0xcf8, 0x8100_1800, size: 4)
    #expect(fixture.input(0xcfc, size: 4) == 0x5678_1234)
  }

  @Test func withoutBusMasteringMessagesWait() {
    let table: UInt64 = 0xc000_0000
    write(0x20, table)
    write(4, 2)
    write(0x4a, 0x8000, size: 2)
    fixture.bus.write(table, size: 8, value: 0xfee0_2000)
    fixture.bus.write(table + 8, size: 8, value: 0x42)
    #expect(!device.function.isBusMaster)
    device.function.signal(vector: 0)
    #expect(fixture.sink.takeMessages().isEmpty)
    #expect(fixture.bus.read(table + 0x800, size: 8) == 1)
    write(4, 6)
    #expect(device.function.isBusMaster)
    #expect(fixture.sink.takeMessages() == [.init(address: 0xfee0_2000, data: 0x42)])
  }

  @Test func aRemovedFunctionIsGone() {
    let table: UInt64 = 0xc000_0000
    write(0x10, 0x10_0000_0000, size: 8)
    write(0x20, table)
    write(4, 6)
    device.function.setInterruptPin(true)
    #expect(fixture.sink.isHigh(19))
    #expect(host.remove(at: PCIAddress(device: 3)) === device)
    #expect(host.remove(at: PCIAddress(device: 3)) == nil)
    #expect(read(0) == 0xffff_ffff)
    #expect(!isMapped(0x10_0000_0000) && !isMapped(table))
    #expect(!fixture.sink.isHigh(19))
    // What still holds the device reaches the guest no more: accesses under way, its own threads.
    device.function.writeConfiguration(offset: 4, size: 2, value: 7, for: device)
    device.function.writeConfiguration(offset: 0x4a, size: 2, value: 0x8000, for: device)
    device.function.setInterruptPin(true)
    device.function.signal(vector: 0)
    device.reset()
    #expect(!isMapped(0x10_0000_0000) && !isMapped(table) && !device.function.isBusMaster)
    #expect(!fixture.sink.isHigh(19) && fixture.sink.takeMessages().isEmpty)
    // The place is free, and so are the addresses.
    let next = SamplePCIDevice(host: host, interrupts: fixture.sink)
    #expect(host.add(next, at: PCIAddress(device: 3)))
    write(0x20, table)
    write(4, 2)
    #expect(fixture.bus.find(table)?.device === next)
  }

  @Test func interruptPinHasThreeGates() {
    device.function.setInterruptPin(true)
    #expect(fixture.sink.isHigh(19))
    #expect(read(6, size: 2) & 8 == 8)
    write(4, 0x400, size: 2)
    #expect(!fixture.sink.isHigh(19))
    #expect(read(6, size: 2) & 8 == 8)
    write(4, 0, size: 2)
    #expect(fixture.sink.isHigh(19))
    write(0x4a, 0x8000, size: 2)
    #expect(!fixture.sink.isHigh(19))
    #expect(device.function.isMSIXEnabled)
    write(0x4a, 0, size: 2)
    device.function.setInterruptPin(false)
    #expect(!fixture.sink.isHigh(19))
  }

  @Test func pinsTurnWithTheDevice() {
    for (slot, pin, gsi) in [(0, 1, 16), (1, 1, 17), (3, 4, 18), (5, 1, 17)] as [(UInt8, UInt8, UInt32)] {
      let line = host.line(device: slot, pin: pin)
      line.set(true)
      #expect(fixture.sink.isHigh(gsi))
      line.set(false)
    }
  }

  @Test func msixDeliversMasksAndKeepsPending() {
    let table: UInt64 = 0xc000_0000
    write(0x20, table)
    write(4, 6)
    #expect(fixture.bus.read(table + 12, size: 4) == 1)
    fixture.bus.write(table + 16, size: 8, value: 0xfee0_1000)
    fixture.bus.write(table + 24, size: 4, value: 0x41)
    device.function.signal(vector: 1)
    #expect(fixture.sink.takeMessages().isEmpty)
    write(0x4a, 0x8000, size: 2)
    // Nothing was kept while MSI-X was off; the vector is masked after power-on.
    #expect(fixture.bus.read(table + 0x800, size: 8) == 0)
    device.function.signal(vector: 1)
    #expect(fixture.sink.takeMessages().isEmpty)
    #expect(fixture.bus.read(table + 0x800, size: 8) == 2)
    fixture.bus.write(table + 28, size: 4, value: 0)
    #expect(fixture.sink.takeMessages() == [.init(address: 0xfee0_1000, data: 0x41)])
    #expect(fixture.bus.read(table + 0x800, size: 4) == 0)
    device.function.signal(vector: 1)
    #expect(fixture.sink.takeMessages().count == 1)
    // The function's mask.
    write(0x4a, 0xc000, size: 2)
    device.function.signal(vector: 1)
    device.function.signal(vector: 1)
    #expect(fixture.sink.takeMessages().isEmpty)
    write(0x4a, 0x8000, size: 2)
    #expect(fixture.sink.takeMessages().count == 1)
    device.function.signal(vector: 7)
    #expect(fixture.sink.takeMessages().isEmpty)
    // Pending bits are read-only.
    fixture.bus.write(table + 0x800, size: 8, value: ~0)
    #expect(fixture.bus.read(table + 0x800, size: 8) == 0)
  }

  @Test func aRestoredFunctionIsWhereItWas() throws {
    write(0x20, 0xc000_0000)
    write(0x10, 0x8_0000_0000, size: 8)
    write(4, 2)
    let saved = device.save()
    write(0x20, 0xd000_0000)
    write(4, 0)
    try device.restore(saved)
    #expect(isMapped(0xc000_0000) && isMapped(0x8_0000_0000) && !isMapped(0xd000_0000))
    // A node cannot change what the guest could not.
    var node = saved
    node.children[0].payload[4] = 0xee
    try device.restore(node)
    #expect(read(0) == 0x5678_1234)
  }
}
