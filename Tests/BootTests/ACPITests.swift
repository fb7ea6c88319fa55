import Foundation
import GuestMemory
import Testing

@testable import Boot

@Suite struct ACPITests {
  private static func configurations() throws -> [ACPIConfiguration] {
    var all = ACPIConfiguration(
      cpus: 4, pciWindow64: GuestRange(start: GuestPhysicalAddress(0x10_0000_0000), size: 0x40_0000_0000))
    all.hasHPET = true
    all.hasKeyboardController = true
    all.systemBus = [
      .device(
        "HPC0", [.name("_HID", .eisaID("PNP0A06")), .name("_UID", .string("hotplug")), .name("SEEN", .integer(0))]),
      PCIHotplugObjects.systemBus(port: 0xae00, slots: 1...31),
      GenerationObjects.systemBus(address: Platform.generationID.start),
    ]
    all.generalEvents = [
      .method("_E02", [.store(.integer(0x12_3456_789a), in: .path("\\_SB.HPC0.SEEN"))]),
      PCIHotplugObjects.generalEvent(1), GenerationObjects.generalEvent(5),
    ]
    return [ACPIConfiguration(cpus: 1), ACPIConfiguration(cpus: 254), ACPIConfiguration(cpus: 300), all]
  }

  private func tables(_ configuration: ACPIConfiguration) throws -> [ACPITables.Table] {
    try #require(try ACPITables(configuration, firmware: nil)).tables
  }

  @Test func checksumsAreZeroAndLengthsRight() throws {
    for configuration in try Self.configurations() {
      for table in try tables(configuration) where table.name != "FACS" {
        #expect(table.bytes.reduce(0, &+) == 0, "\(table.name)")
        if table.name == "RSDP" {
          #expect(table.bytes.prefix(20).reduce(0, &+) == 0)
          #expect(table.bytes.count == 36)
        } else {
          #expect(table.bytes.number(at: 4, as: UInt32.self) == UInt32(table.bytes.count))
          #expect(String(decoding: table.bytes.prefix(4), as: UTF8.self) == table.name)
        }
      }
    }
  }

  @Test func tablesAreReachedFromTheRootPointer() throws {
    let machine = try TestMachine()
    let acpi = try #require(try ACPITables(ACPIConfiguration(cpus: 2), firmware: nil))
    try acpi.write(to: machine.memory)
    #expect(acpi.rsdp.rawValue == 0xe0000)
    let root = acpi.rsdp.rawValue
    #expect(try machine.bytes(root, 8) == Array("RSD PTR ".utf8))
    let xsdt: UInt64 = try machine.read(root + 24)
    let rsdt: UInt32 = try machine.read(root + 16)
    let count = (try machine.read(xsdt + 4, as: UInt32.self) - 36) / 8
    var names: [String] = []
    for index in 0..<UInt64(count) {
      let address: UInt64 = try machine.read(xsdt + 36 + index * 8)
      #expect(address == UInt64(try machine.read(UInt64(rsdt) + 36 + index * 4, as: UInt32.self)))
      names.append(String(decoding: try machine.bytes(address, 4), as: UTF8.self))
    }
    #expect(names == ["FACP", "APIC", "MCFG"])
    let fadt: UInt64 = try machine.read(xsdt + 36)
    #expect(try machine.read(fadt + 4, as: UInt32.self) == 276)
    let dsdt: UInt64 = try machine.read(fadt + 140)
    #expect(try machine.bytes(dsdt, 4) == Array("DSDT".utf8))
    #expect(dsdt == UInt64(try machine.read(fadt + 40, as: UInt32.self)))
    let facs: UInt32 = try machine.read(fadt + 36)
    #expect(facs & 63 == 0)
    #expect(try machine.bytes(UInt64(facs), 4) == Array("FACS".utf8))
    for (a, b) in zip(acpi.tables.dropLast(), acpi.tables.dropLast().dropFirst()) {
      #expect(a.address + UInt64(a.bytes.count) <= b.address)
    }
  }

  @Test func processorsHaveEntriesOfTheRightType() throws {
    for cpus in [1, 2, 254, 255, 300] {
      let madt = try #require(try tables(ACPIConfiguration(cpus: cpus)).first { $0.name == "APIC" }).bytes
      var offset = 44
      var ids: [UInt32] = []
      while offset < madt.count {
        switch madt[offset] {
        case 0: ids.append(UInt32(madt[offset + 3]))
        case 9: ids.append(madt.number(at: offset + 4) ?? 0)
        default: break
        }
        offset += Int(madt[offset + 1])
      }
      #expect(offset == madt.count)
      #expect(ids == (0..<UInt32(cpus)).map { $0 })
    }
  }

  @Test func aLargeROMLeavesNoRoom() throws {
    try BootImageTests.withScratch { directory in
      let small = try BootROMTests.rom(directory + "/small", count: 64 << 10)
      let large = try BootROMTests.rom(directory + "/large", count: 128 << 10)
      #expect(try ACPITables(ACPIConfiguration(cpus: 1), firmware: small) != nil)
      #expect(try ACPITables(ACPIConfiguration(cpus: 1), firmware: large) == nil)
      #expect(throws: BootError.self) { try ACPITables(ACPIConfiguration(cpus: 10_000), firmware: small) }
    }
  }

  /// ACPICA's disassembler and compiler judge every table: it is disassembled without complaint, and what comes out
  /// compiles without error or warning.
  @Test func iaslReadsEveryTable() throws {
    guard let iasl = ["/usr/bin/iasl", "/usr/sbin/iasl"].first(where: FileManager.default.isExecutableFile) else {
      print("skipped: iasl is not installed (Debian's acpica-tools)")
      return
    }
    func run(_ arguments: [String], in directory: String) throws -> (status: Int32, output: String) {
      let process = Process()
      let pipe = Pipe()
      process.executableURL = URL(fileURLWithPath: iasl)
      process.arguments = arguments
      process.currentDirectoryURL = URL(fileURLWithPath: directory)
      process.standardOutput = pipe
      process.standardError = pipe
      try process.run()
      let output = String(decoding: pipe.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
      process.waitUntilExit()
      return (process.terminationStatus, output)
    }
    for configuration in try Self.configurations() {
      try BootImageTests.withScratch { directory in
        for table in try tables(configuration) where table.name != "RSDP" {
          try Data(table.bytes).write(to: URL(fileURLWithPath: "\(directory)/\(table.name).aml"))
          let (status, output) = try run(["-d", "\(table.name).aml"], in: directory)
          #expect(status == 0)
          for word in ["Error", "Warning", "Invalid", "Incorrect", "Could not"] {
            #expect(!output.contains(word), "\(table.name): \(output)")
          }
          let source = try String(contentsOfFile: "\(directory)/\(table.name).dsl", encoding: .utf8)
          for word in ["Incorrect checksum", "Invalid", "*** ", "Unknown", "Illegal"] {
            #expect(!source.contains(word), "\(table.name): \(source)")
          }
          guard table.name == "DSDT" else { continue }
          let (compiled, report) = try run(["-oa", "-ve", "-p", "again", "DSDT.dsl"], in: directory)
          #expect(compiled == 0 && report.contains("0 Errors, 0 Warnings"), "\(report)")
          let again = try Data(contentsOf: URL(fileURLWithPath: "\(directory)/again.aml"))
          #expect(again.dropFirst(36).elementsEqual(table.bytes.dropFirst(36)), "AML changes when compiled again")
        }
      }
    }
  }

  @Test func lengthsOfEveryWidthAreRight() {
    // PkgLength takes 1 to 4 bytes; 63 is the last length that fits in one.
    for (count, prefix) in [(59, [0x3f]), (60, [0x41, 0x04]), (4000, [0x45, 0xfa])] as [(Int, [UInt8])] {
      let bytes = AML.scope("ABCD", [AML.string(String(repeating: "x", count: count - 3))]).bytes
      #expect(Array(bytes[1..<1 + prefix.count]) == prefix, "\(count)")
      let length =
        prefix.count == 1 ? Int(bytes[1]) : Int(bytes[1] & 15) | Int(bytes[2]) << 4
      #expect(length == bytes.count - 1)
    }
    #expect(AML.eisaID("PNP0A08").bytes == [0x0c, 0x41, 0xd0, 0x0a, 0x08])
    #expect(AML.path("\\_SB.PCI0").bytes == [0x5c, 0x2e] + Array("_SB_PCI0".utf8))
    #expect(AML.path("^A.B.C").bytes == [0x5e, 0x2f, 3] + Array("A___B___C___".utf8))
    #expect(AML.path("\\").bytes == [0x5c, 0])
  }
}
