/// The guest's side of PCI hot-plug on bus 0, behind the registers of QEMU's docs/specs/acpi_pci_hotplug: a device object
/// with `_EJ0` for each place on the bus, and the event's method that notifies those that came or are to go.
public enum PCIHotplugObjects {
  /// Notify's values (ACPI 6.5, 5.6.6).
  private static let deviceCheck: UInt64 = 1
  private static let ejectRequest: UInt64 = 3

  /// Objects for `ACPIConfiguration.systemBus`; the registers begin at `port`.
  public static func systemBus(port: UInt16, slots: ClosedRange<UInt8>) -> AML {
    let fields: [AML] = [
      .operationRegion("PCST", port: port, size: 8), .dwordFields("PCST", ["PCIU", "PCID"]),
      .operationRegion("SEJ", port: port + 8, size: 4), .dwordFields("SEJ", ["B0EJ"]),
    ]
    let devices = slots.map { slot in
      AML.device(
        name(slot),
        [
          .name("_ADR", .integer(UInt64(slot) << 16)), .name("_SUN", .integer(UInt64(slot))),
          .method("_EJ0", arguments: 1, [.store(.integer(1 << UInt64(slot)), in: .path("B0EJ"))]),
        ])
    }
    let notifications = slots.flatMap { slot in
      [
        notify(slot, deviceCheck, where: .local(0)), notify(slot, ejectRequest, where: .local(1)),
      ]
    }
    let count = AML.method(
      "PCNT", serialized: true,
      [.store(.path("PCIU"), in: .local(0)), .store(.path("PCID"), in: .local(1))] + notifications)
    return .scope("PCI0", fields + devices + [count])
  }

  /// The method for `ACPIConfiguration.generalEvents`.
  public static func generalEvent(_ event: Int) -> AML {
    .method(AML.eventName(event), [.path("\\_SB.PCI0.PCNT")])
  }

  private static func notify(_ slot: UInt8, _ value: UInt64, where slots: AML) -> AML {
    .if(.bitAnd(slots, .integer(1 << UInt64(slot))), [.notify(name(slot), value)])
  }

  private static func name(_ slot: UInt8) -> String {
    let digits = String(slot, radix: 16, uppercase: true)
    return slot < 16 ? "S0" + digits : "S" + digits
  }
}
