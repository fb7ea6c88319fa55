import CGuest
import CLoader

/// A kernel with a loader of modules, which are the boot modules of the command line: `--append` takes `cycles=N`, and
/// `attack=NAME` with a name of `attacks`. Says what happened; whether that is good is for who started it to judge.
func guestMain() {
  Kernel.begin()
  if let name = StartInfo.option("attack") {
    Attacks.run(name)
    return
  }
  Kernel.lock()
  if StartInfo.moduleCount == 0 {
    say("loader: no modules: give some with --module FILE")
    return
  }
  for index in 0..<StartInfo.moduleCount {
    let entry = Kernel.load(index)
    if entry == 0 {
      say("module \(index): refused")
      continue
    }
    say("module \(index): returned \(call_function(entry, 10))")
    expect("a module is unloaded", loader_call(LOADER_UNLOAD, Kernel.arena, 0, 0), equals: 1)
  }
  let cycles = StartInfo.number("cycles", default: 0)
  for cycle in 0..<cycles {
    let entry = Kernel.load(Int(cycle) % StartInfo.moduleCount, at: cycle % 4)
    expect("a module is loaded again", entry != 0)
    if cycle % 3 == 0 { _ = call_function(entry, 1) }
    expect("a module is unloaded again", loader_call(LOADER_UNLOAD, Kernel.slot(cycle % 4), 0, 0), equals: 1)
  }
  if cycles > 0 { say("cycles: \(cycles)") }
  if Kernel.isHardened { Kernel.expectPlainArena() }
  say("loader: all passed")
}

enum Kernel {
  static let pages: UInt64 = 256
  /// Where modules go, and behind it as much for those that are to be loaded; then a page of plain data.
  nonisolated(unsafe) private(set) static var arena: UInt64 = 0
  static var staging: UInt64 { arena + pages * 4096 }
  static var data: UInt64 { staging + pages * 4096 }
  nonisolated(unsafe) static var isHardened = false
  nonisolated(unsafe) static var refused: UInt64 = 0

  static func begin() {
    expect("a PM timer", PMTimer.isPresent)
    arena = guest_allocate((2 * pages + 4) * 4096, 4096)
    isHardened = harden_call(HARDEN_VERSION, 0, 0, 0, 0) >= 0
    say("hypercalls: \(isHardened ? "there" : "none")")
    set_interrupt_handler(13) { frame in Kernel.refuse(frame) }
    set_interrupt_handler(14) { frame in Kernel.refuse(frame) }
  }

  /// An access that was refused ends where it is expected.
  private static func refuse(_ frame: UnsafeMutablePointer<interrupt_frame>) {
    refused += 1
    let next = try_recovery(frame.pointee.rip)
    if next != 0 {
      frame.pointee.rip = next
      return
    }
    guard call_stack() != 0 else {
      unhandled(frame)
      return
    }
    frame.pointee.rip = call_failed_address()
    frame.pointee.rsp = call_stack()
  }

  /// Starts the other processors, registers the loader and locks that; `slow`: the loader takes its time between check
  /// and use.
  static func lock(slow: Bool = false) {
    let service: @convention(c) (UInt64, UInt64) -> UInt64 = { text, count in
      Bytes(address: text, count: count).forEach { Console.write($0) }
      return count
    }
    let options = pages * 4096 | (isHardened ? 1 << 32 : 0) | (slow ? 1 << 33 : 0)
    let address = UInt64(unsafeBitCast(service, to: UInt.self))
    expect("the loader is set up", loader_call(LOADER_SETUP, arena, options, address), equals: 1)
    guard isHardened else { return }
    let (start, middle, end) = (loader_start_address(), loader_data_address(), loader_end_address())
    let (text, textEnd) = (text_start_address(), text_end_address())
    call(HARDEN_SET, text, textEnd - text, 1, 5)
    call(HARDEN_SET, text, textEnd - text, 2, 1)
    call(HARDEN_SET, start, middle - start, 2, 5)
    call(HARDEN_SET, middle, end - middle, 2, 3)
    // Engines that know no execute permission obey what is said of a page, not what holds for all the rest.
    call(HARDEN_SET, data, 4096, 1, 3)
    call(HARDEN_REGISTER, start, end - start, start, 0)
    call(HARDEN_ENTRY, loader_entry_address(), 0, 0, 0)
    call(HARDEN_EXIT, loader_exit_address(), 0, 0, 0)
    call(HARDEN_LOCK, 0, 0, 0, 0)
  }

  private static func call(_ function: UInt32, _ a: UInt64, _ b: UInt64, _ c: UInt64, _ d: UInt64) {
    expect("a hypercall", harden_call(function, a, b, c, d) >= 0)
  }

  /// After all is unloaded, both views have the arena as they had it first: readable and writable.
  static func expectPlainArena() {
    for page in 0..<2 * pages {
      let rights = harden_call(HARDEN_QUERY, arena + page * 4096, 0, 0, 0)
      expect("rights of the arena", UInt64(rights & 0xff), equals: 0x33)
    }
  }

  static func slot(_ number: UInt64) -> UInt64 { arena + number * 16 * 4096 }

  /// Copies a boot module to the staging area and has it loaded; its entry, or 0.
  static func load(_ index: Int, at number: UInt64 = 0) -> UInt64 {
    let module = StartInfo.module(index)
    expect("a module fits", module.count <= pages * 4096)
    copy_words(staging, module.address, module.count)
    return loader_call(LOADER_LOAD, staging, module.count, slot(number))
  }
}
