import GuestMemory

/// The differentiated system description table: the devices that no bus enumerates, and the PCI host bridge.
enum DSDT {
  /// PCI INTx of slot s, pin p (0 is INTA#) is global system interrupt 16 + (s + p) % 4.
  static let firstPCIInterrupt: UInt64 = 16

  static func table(_ configuration: ACPIConfiguration) -> [UInt8] {
    var devices = [pciHost(configuration), reservedResources, serialPort, clock]
    if configuration.hasHPET { devices.append(hpet) }
    if configuration.hasKeyboardController { devices.append(keyboardController) }
    var body: [AML] = [
      .scope("\\_SB", devices + configuration.systemBus),
      .name("\\_S3", sleepState(1)),
      .name("\\_S5", sleepState(5)),
    ]
    if !configuration.generalEvents.isEmpty { body.append(.scope("\\_GPE", configuration.generalEvents)) }
    return ACPITables.table("DSDT", revision: 2, body.flatMap(\.bytes))
  }

  /// SLP_TYP for PM1a and PM1b (7.4.2).
  private static func sleepState(_ type: UInt64) -> AML {
    .package([.integer(type), .integer(type), .integer(0), .integer(0)])
  }

  private static func pciHost(_ configuration: ACPIConfiguration) -> AML {
    var windows: [ACPIResource] = [
      .buses(0, 255), .io(0xcf8, count: 8), .ioWindow(0, 0xcf7), .ioWindow(0xd00, 0xffff),
      .memoryWindow(base: Platform.pciWindow32.start.rawValue, size: Platform.pciWindow32.size),
    ]
    if let window = configuration.pciWindow64 {
      windows.append(.memoryWindow(base: window.start.rawValue, size: window.size))
    }
    var routes: [AML] = []
    for slot in 0..<32 as Range<UInt64> {
      for pin in 0..<4 as Range<UInt64> {
        let interrupt = firstPCIInterrupt + (slot + pin) % 4
        routes.append(.package([.integer(slot << 16 | 0xffff), .integer(pin), .integer(0), .integer(interrupt)]))
      }
    }
    return .device(
      "PCI0",
      [
        .name("_HID", .eisaID("PNP0A08")), .name("_CID", .eisaID("PNP0A03")), .name("_UID", .integer(0)),
        .name("_SEG", .integer(0)), .name("_BBN", .integer(0)), .name("_CCA", .integer(1)),
        .name("_CRS", ACPIResource.template(windows)), .name("_PRT", .package(routes)), operatingSystemCapabilities,
      ])
  }

  /// `_OSC` (6.2.11): PCIe hotplug, PME, AER and the capability structure are the guest's; standard hotplug (SHPC) is not
  /// there.
  private static var operatingSystemCapabilities: AML {
    let granted: UInt64 = 0x1d
    return .method(
      "_OSC", arguments: 4, serialized: true,
      [
        .dwordField("CDW1", of: .argument(3), at: 0),
        .if(
          .equal(.argument(0), .uuid("33DB4D5B-1FF7-401C-9657-7441C03DD766")),
          [
            .dwordField("CDW3", of: .argument(3), at: 8),
            .and(.path("CDW3"), .integer(granted), in: .local(0)),
            .if(
              .not(.equal(.argument(1), .integer(1))),
              [.or(.path("CDW1"), .integer(0x08), in: .path("CDW1"))]),  // unknown revision
            .if(
              .not(.equal(.path("CDW3"), .local(0))),
              [.or(.path("CDW1"), .integer(0x10), in: .path("CDW1"))]),  // capabilities masked
            .store(.local(0), in: .path("CDW3")),
          ],
          else: [.or(.path("CDW1"), .integer(0x04), in: .path("CDW1"))]),  // unknown UUID
        .return(.argument(3)),
      ])
  }

  /// ECAM, and the ports of no other device, so that the guest gives them to nobody.
  private static var reservedResources: AML {
    .device(
      "RES0",
      [
        .name("_HID", .eisaID("PNP0C02")), .name("_UID", .integer(0)),
        .name(
          "_CRS",
          ACPIResource.template([
            .memory(base: UInt32(Platform.ecam.start.rawValue), size: UInt32(Platform.ecam.size)),
            .io(0x600, count: 0x40), .io(0x510, count: 12), .io(0xf4, count: 4), .io(0xae00, count: 16),
          ])),
      ])
  }

  private static var serialPort: AML {
    .device(
      "COM1",
      [
        .name("_HID", .eisaID("PNP0501")), .name("_UID", .integer(1)),
        .name("_CRS", ACPIResource.template([.io(0x3f8, count: 8), .interrupt(4)])),
      ])
  }

  private static var clock: AML {
    .device(
      "RTC0",
      [
        .name("_HID", .eisaID("PNP0B00")),
        .name("_CRS", ACPIResource.template([.io(0x70, count: 2), .interrupt(8)])),
      ])
  }

  private static var hpet: AML {
    .device(
      "HPET",
      [
        .name("_HID", .eisaID("PNP0103")), .name("_UID", .integer(0)),
        .name("_CRS", ACPIResource.template([.memory(base: UInt32(Platform.hpet), size: 0x400)])),
      ])
  }

  private static var keyboardController: AML {
    .device(
      "KBD0",
      [
        .name("_HID", .eisaID("PNP0303")),
        .name(
          "_CRS", ACPIResource.template([.io(0x60, count: 1), .io(0x64, count: 1), .interrupt(1)])),
      ])
  }
}
