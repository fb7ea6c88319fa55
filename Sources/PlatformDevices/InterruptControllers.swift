import DeviceModel

/// The interrupt controllers of a machine that has PIC and IOAPIC in the VMM, as its devices see them: a PC's wiring.
public final class InterruptControllers: InterruptSink {
  private let pic: PIC
  private let ioapic: IOAPIC
  private let messages: any IOAPICOutput

  /// ISA interrupts go to both controllers, the other pins to the IOAPIC, messages to the local APICs.
  public init(pic: PIC, ioapic: IOAPIC, messages: any IOAPICOutput) {
    self.pic = pic
    self.ioapic = ioapic
    self.messages = messages
  }

  /// The timer's interrupt 0 is the IOAPIC's pin 2, as the MADT's override says.
  public func setInterruptLine(_ gsi: UInt32, level: Bool) {
    if gsi < 16 { pic.setInput(Int(gsi), level: level) }
    ioapic.setInput(gsi == 0 ? 2 : Int(gsi), level: level)
  }

  /// Passed on to the local APICs.
  public func signalMSI(address: UInt64, data: UInt32) {
    messages.deliver(InterruptMessage(address: address, data: data))
  }
}
