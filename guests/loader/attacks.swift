import CGuest
import CLoader

/// What somebody who runs code in the kernel may try. Each says whether it succeeded, by its effect.
enum Attacks {
  private static let marker: UInt64 = 0x600d
  /// movl $42, %eax; ret
  private static let code: UInt64 = 0xc3_0000_002a_b8
  /// The victim, as code that returns 2: movl $2, %eax; ret; nop, nop
  private static let patch: UInt64 = 0x9090_c300_0000_02b8

  static func run(_ name: Bytes) {
    if name.equals("smp") {
      if startHelper() { editBetween() }
      return
    }
    Kernel.lock()
    let succeeded: Bool
    if name.equals("text") {
      succeeded = writeText()
    } else if name.equals("data") {
      succeeded = executeData()
    } else if name.equals("middle") {
      succeeded = enterMiddle()
    } else if name.equals("read-loader") {
      succeeded = try_load64(loader_data_address()) == 1
    } else if name.equals("permission") {
      succeeded = askForPermission()
    } else if name.equals("register") {
      succeeded = registerAgain()
    } else if name.equals("alias-text") {
      succeeded = aliasText()
    } else if name.equals("alias-loader") {
      succeeded = aliasLoader()
    } else if name.equals("remap") {
      succeeded = remapLoader()
    } else if name.equals("module") {
      succeeded = runModule()
    } else if name.equals("dma") {
      succeeded = transferIntoText()
    } else if name.equals("interrupt") {
      succeeded = steer()
    } else if name.equals("wp") {
      succeeded = try_write_cr0(read_cr0() & ~(1 << 16)) == 1
    } else if name.equals("idt") {
      succeeded = moveInterruptTable()
    } else {
      say("attack \(name): there is no such attack")
      Power.fail()
    }
    report(name, succeeded)
  }

  private static func report(_ name: Bytes, _ succeeded: Bool) {
    say("attack \(name): \(succeeded ? "succeeded" : "blocked"), \(Kernel.refused) faults")
  }

  private static func writeText() -> Bool {
    _ = try_store64(victim_address(), patch)
    return call_function(victim_address(), 0) == 2
  }

  private static func executeData() -> Bool {
    store64(Kernel.data, code)
    return try_call(Kernel.data, 0, 0) == 42
  }

  private static func enterMiddle() -> Bool {
    store64(Kernel.data, 0)
    let result = try_call(loader_poke_address(), Kernel.data, 7)
    return result == marker && load64(Kernel.data) == 7
  }

  private static func askForPermission() -> Bool {
    store64(Kernel.data, code)
    _ = harden_call(HARDEN_SET, Kernel.data, 4096, 1, 5)
    return try_call(Kernel.data, 0, 0) == 42
  }

  private static func registerAgain() -> Bool {
    store64(Kernel.data, code)
    _ = harden_call(HARDEN_REGISTER, Kernel.data, 4096, Kernel.data, 0)
    _ = harden_call(HARDEN_ENTRY, Kernel.data, 0, 0, 0)
    return try_call(Kernel.data, 0, 0) == 42
  }

  /// A linear address that nothing else has.
  private static let alias: UInt64 = 0x40_0000_0000

  private static func aliasText() -> Bool {
    Paging.map(alias, to: victim_address(), .writable)
    _ = try_store64(alias + (victim_address() & 0xfff), patch)
    return call_function(victim_address(), 0) == 2
  }

  private static func aliasLoader() -> Bool {
    Paging.map(alias, to: loader_data_address(), .writable)
    return try_store64(alias + 0x800, 1) == 1
  }

  /// The loader is called with a page of the attacker's in place of its own data.
  private static func remapLoader() -> Bool {
    let page = Kernel.data + 4096
    fill64(page, 0x1bad, 512)
    // Nobody holds the lock that is in it.
    for offset in stride(from: 0 as UInt64, to: 4096, by: 8) where offset < 8 { store64(page + offset, 0) }
    Paging.map(loader_data_address(), to: page, .writable)
    let result = try_call(loader_entry_address(), LOADER_SIGN, 0)
    Paging.map(loader_data_address(), to: loader_data_address(), .writable)
    return result != ~0
  }

  /// Whatever module the command line has: unsigned, or tampered with.
  private static func runModule() -> Bool {
    expect("a module", StartInfo.moduleCount > 0)
    let entry = Kernel.load(0)
    return entry != 0 && call_function(entry, 1) != 0
  }

  /// fw_cfg writes its signature where the victim is (QEMU's fw_cfg.rst).
  private static func transferIntoText() -> Bool {
    let before = load64(victim_address())
    let request = Kernel.data + 0x100
    // Select item 0, and read 8 bytes of it to the victim: all big-endian.
    store32(request, UInt32(0xa).byteSwapped)
    store32(request + 4, UInt32(8).byteSwapped)
    store64(request + 8, victim_address().byteSwapped)
    outl(0x514, UInt32(truncatingIfNeeded: request >> 32).byteSwapped)
    outl(0x518, UInt32(truncatingIfNeeded: request).byteSwapped)
    return load64(victim_address()) != before
  }

  nonisolated(unsafe) private static var steered: UInt64 = 0
  nonisolated(unsafe) private static var interrupts: UInt64 = 0

  /// An interrupt in the loader returns to where the handler wants.
  private static func steer() -> Bool {
    LocalAPIC.begin()
    store64(Kernel.data, 0)
    set_interrupt_handler(0x60) { frame in
      Attacks.interrupts += 1
      LocalAPIC.endOfInterrupt()
      let rip = frame.pointee.rip
      if rip >= loader_start_address() && rip < loader_end_address() {
        Attacks.steered += 1
        frame.pointee.rip = loader_poke_address()
        frame.pointee.rdi = Kernel.data
        frame.pointee.rsi = 7
        // What it returns to is none of the loader's business any more.
        frame.pointee.rsp = call_stack() - 8
      }
    }
    // The handler has a stack of its own: the loader's is not for the kernel to touch.
    set_interrupt_stack(guest_allocate(16384, 4096) + 16384, 0x60)
    // Later than the way into the loader takes, which is long where ring 0 is emulated.
    let count = UInt32(truncatingIfNeeded: StartInfo.number("timer", default: 20_000))
    LocalAPIC.startTimer(.oneShot, vector: 0x60, count: count)
    sti()
    let result = try_call(loader_call_address(), LOADER_WAIT, StartInfo.number("wait", default: 3_000_000))
    cli()
    wait("the interrupt") {
      sti()
      nop()
      cli()
      return interrupts > 0
    }
    say("interrupts: \(interrupts), \(steered) in the loader, result \(hex: result)")
    return load64(Kernel.data) == 7
  }

  private static func moveInterruptTable() -> Bool {
    let table = Kernel.data
    set_idt_probe(table)
    store64(table + 2, load64(table + 2) + 16)
    return try_lidt(table) == 1
  }

  // MARK: Two processors

  /// The last words of the staging area: the loader has checked the module; it has been edited.
  private static var mailbox: UInt64 { Kernel.staging + Kernel.pages * 4096 - 16 }
  nonisolated(unsafe) private static var target: UInt64 = 0

  private static func startHelper() -> Bool {
    SMP.start { _ in
      while load64(Attacks.mailbox) == 0 { cpu_pause() }
      for _ in 0..<100 { _ = try_store64(Attacks.target, Attacks.patch) }
      store64(Attacks.mailbox + 8, 1)
      while true { sti_hlt_cli() }
    }
    guard SMP.count > 1 else {
      say("attack smp: needs two processors")
      return false
    }
    Kernel.lock(slow: true)
    return true
  }

  /// Another processor writes to the module after it has been checked and before it is loaded; `.text` of a small relocatable file
  /// begins at 0x40.
  private static func editBetween() {
    let module = StartInfo.module(0)
    copy_bytes(
      UnsafeMutableRawPointer(bitPattern: UInt(Kernel.staging))!, UnsafeRawPointer(bitPattern: UInt(module.address))!,
      Int(module.count))
    let original = load64(Kernel.staging + 0x40)
    target = Kernel.staging + 0x40
    let (image, size, place) = (Kernel.staging, module.count, Kernel.slot(0))
    let entry = loader_call(LOADER_LOAD, image, size, place)
    let loaded = entry != 0 ? load64(Kernel.slot(0)) : original
    say("loaded: \(entry != 0 ? "yes" : "no")")
    let name: StaticString = "smp"
    // Relocations change what follows the first byte.
    report(Bytes(address: UInt64(UInt(bitPattern: name.utf8Start)), count: 3), loaded & 0xff != original & 0xff)
  }
}
