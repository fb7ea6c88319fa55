import CGuest

/// What an exception that ended `Fault.catching` was.
struct Fault {
  var vector: UInt64
  var error: UInt64
  var address: UInt64
  var rip: UInt64

  nonisolated(unsafe) private static var caught: Fault?

  /// Runs `body(argument)`; an exception in it ends it there and is returned. Boot processor only.
  static func catching(_ argument: UInt64 = 0, _ body: @convention(c) (UInt64) -> Void) -> Fault? {
    caught = nil
    guest_catch(body, argument)
    return caught
  }

  /// Continues after `guest_catch` when it is running.
  fileprivate static func resume(_ frame: UnsafeMutablePointer<interrupt_frame>) -> Bool {
    if catch_stack() == 0 || frame.pointee.vector >= 32 { return false }
    caught = Fault(frame)
    frame.pointee.rip = catch_resume_address()
    frame.pointee.rsp = catch_stack()
    return true
  }

  init(_ frame: UnsafeMutablePointer<interrupt_frame>) {
    vector = frame.pointee.vector
    error = frame.pointee.error
    address = vector == 14 ? read_cr2() : 0
    rip = frame.pointee.rip
  }
}

@_cdecl("guest_unhandled")
func unhandled(_ frame: UnsafeMutablePointer<interrupt_frame>) {
  if Fault.resume(frame) { return }
  let fault = Fault(frame)
  if frame.pointee.cs & 3 == 3 && fault.vector < 32 {
    User.leave(frame, value: fault.address)
    return
  }
  say(
    """
    FAIL unexpected vector \(fault.vector) error \(hex: fault.error) at \(hex: fault.rip) \
    stack \(hex: frame.pointee.rsp) address \(hex: fault.address)
    """)
  Power.fail()
}
