/// The local APIC of one vCPU, where it lives in the VMM; called on the vCPU's thread, while devices post from others.
public protocol LocalInterruptController: AnyObject, Sendable {
  func read(register offset: UInt16) -> UInt32              // xAPIC page, 4-byte registers (SDM vol 3, 11.4.1)
  func write(register offset: UInt16, value: UInt32)
  func readMSR(_ index: UInt32) -> UInt64?                  // 0x1b, 0x6e0, 0x800-0x8ff; nil = #GP
  func writeMSR(_ index: UInt32, value: UInt64) -> Bool     // false = #GP
  var taskPriority: UInt8 { get set }                       // CR8 (0-15)
  var hasInterrupt: Bool { get }                            // something INTR would deliver now (IRR above PPR, or ExtINT from the PIC); cheap: an atomic load
  func acknowledgeInterrupt() -> UInt8?                     // IRR -> ISR, or the PIC's INTA
}
