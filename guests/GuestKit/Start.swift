/// entry.S calls this on the boot processor, in long mode with interrupts off. A guest is a function `guestMain`: returning
/// from it means that all its checks held.
@_cdecl("guest_start")
func guestStart() {
  Console.begin()
  guestMain()
  Power.off()
}
