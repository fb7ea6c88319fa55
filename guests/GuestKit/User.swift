import CGuest

/// Code in ring 3. It sees the image's text and constants, and what `share` gives it; nothing else of the kernel's.
enum User {
  /// Why ring 3 came back.
  struct Outcome {
    /// The exception, or 3 for `user_call(0, value)`.
    var vector: UInt64
    var error: UInt64
    var rip: UInt64
    /// CR2 of a page fault, or the value.
    var value: UInt64
  }

  nonisolated(unsafe) private static var outcome = Outcome(vector: 0, error: 0, rip: 0, value: 0)
  nonisolated(unsafe) private static var calls: (@convention(c) (UInt64, UInt64) -> UInt64)?
  nonisolated(unsafe) private static var stack: UInt64 = 0

  /// Opens the image's text to ring 3 and makes a stack. `handler` serves `user_call(number, argument)`, but for number 0.
  static func prepare(_ handler: @escaping @convention(c) (UInt64, UInt64) -> UInt64) {
    calls = handler
    var page = text_start_address()
    while page < text_end_address() {
      Paging.map(page, to: page, [.user])
      page += 4096
    }
    stack = guest_allocate(8192, 4096) + 8192
    share(stack - 8192)
    share(stack - 4096)
    set_interrupt_handler(3) { User.call($0) }
  }

  /// Lets ring 3 read and write this page.
  static func share(_ page: UInt64) { Paging.map(page, to: page, [.user, .writable, .noExecute]) }

  /// Runs `rip` with `argument` in RDI until it ends itself or faults.
  static func run(_ rip: UInt64, _ argument: UInt64 = 0) -> Outcome {
    // The stack is as after a call.
    guest_enter_user(rip, stack - 8, argument)
    return outcome
  }

  private static func call(_ frame: UnsafeMutablePointer<interrupt_frame>) {
    if frame.pointee.rax == 0 {
      leave(frame, value: frame.pointee.rdi)
    } else if let calls {
      frame.pointee.rax = calls(frame.pointee.rax, frame.pointee.rdi)
    }
  }

  /// Makes the interrupt's return go to the caller of `run`.
  static func leave(_ frame: UnsafeMutablePointer<interrupt_frame>, value: UInt64) {
    outcome = Outcome(vector: frame.pointee.vector, error: frame.pointee.error, rip: frame.pointee.rip, value: value)
    frame.pointee.rip = user_resume_address()
    frame.pointee.cs = 0x08
    frame.pointee.rflags = 2
    frame.pointee.rsp = user_stack()
    frame.pointee.ss = 0x10
  }
}
