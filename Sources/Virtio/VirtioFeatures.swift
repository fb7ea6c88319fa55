/// Feature bits that devices and drivers agree on (virtio 1.2, chapter 6, and 5.2.3 for block devices).
public struct VirtioFeatures: OptionSet, Sendable {
  /// Bit n is feature n.
  public let rawValue: UInt64
  /// Bit n is feature n.
  public init(rawValue: UInt64) { self.rawValue = rawValue }

  /// Descriptors may name tables of descriptors.
  public static let indirectDescriptors = Self(rawValue: 1 << 28)
  /// Notifications and interrupts are asked for at an index.
  public static let eventIndex = Self(rawValue: 1 << 29)
  /// The device is none of the legacy interface's; always there.
  public static let version1 = Self(rawValue: 1 << 32)
  /// Queues are packed.
  public static let packedRing = Self(rawValue: 1 << 34)
  /// What the transport offers for every device.
  public static let transport: Self = [.indirectDescriptors, .eventIndex, .version1, .packedRing]
}
