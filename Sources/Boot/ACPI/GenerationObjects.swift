import GuestMemory

/// The guest's side of the generation id (Microsoft's Virtual Machine Generation ID; QEMU's docs/specs/vmgenid): a device that
/// says where the id is, and the event's method that notifies it.
public enum GenerationObjects {
  private static let changed: UInt64 = 0x80

  /// The device, for `ACPIConfiguration.systemBus`.
  public static func systemBus(address: GuestPhysicalAddress) -> AML {
    let (low, high) = (address.rawValue & 0xffff_ffff, address.rawValue >> 32)
    return .device(
      "VGEN",
      [
        .name("_HID", .string("SWVM0001")), .name("_CID", .string("VM_Gen_Counter")),
        .name("_DDN", .string("VM_Gen_Counter")), .name("ADDR", .package([.integer(low), .integer(high)])),
      ])
  }

  /// The method for `ACPIConfiguration.generalEvents`.
  public static func generalEvent(_ event: Int) -> AML {
    .method(AML.eventName(event), [.notify("\\_SB.VGEN", changed)])
  }
}
