@_cdecl("guest_ap_start")
func guestApplicationProcessorStart() {}
