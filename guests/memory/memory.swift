import CGuest

/// A free page of RAM and a virtual range that nothing else uses.
nonisolated(unsafe) private var page: UInt64 = 0
private let window: UInt64 = 0x40_0000_0000

/// Looks at memory as a machine must have it: RAM that keeps what is written, holes that are empty, pages that fault as
/// they should.
func guestMain() {
  page = guest_allocate(4096, 4096)
  patterns()
  widths()
  if StartInfo.number("holes", default: 1) != 0 { holes() }
  aliases()
  faults()
  say("memory: all passed")
}

/// Words that are tested: the first and the last pages of every region of RAM, and every power of two in one.
private func forEachProbe(_ body: (UInt64) -> Void) {
  // What is below holds this guest and what the loader and the firmware left.
  let low: UInt64 = 0x40_0000
  for index in 0..<StartInfo.regionCount {
    let region = StartInfo.region(index)
    if region.type != 1 || region.end <= low + 0x10000 { continue }
    let base = (max(region.base, low) + 0xfff) & ~0xfff
    let end = region.end & ~0xfff
    for offset: UInt64 in 0..<2 {
      body(base + offset * 0x1000)
      body(base + offset * 0x1000 + 0xff8)
      body(end - (offset + 1) * 0x1000)
      body(end - (offset + 1) * 0x1000 + 0xff8)
    }
    body((base + (end - base) / 2) & ~0xfff | 0x7c0)
    var power: UInt64 = 0x80_0000
    while power < end {
      if power >= base + 0x2000 && power < end - 0x2000 { body(power | 0x240) }
      power <<= 1
    }
  }
}

private func patterns() {
  var probes: UInt64 = 0
  let saved = guest_allocate(256 * 8, 16)
  forEachProbe { address in
    if address >= 1 << 32 { Paging.map(address & ~0xfff, to: address & ~0xfff, [.writable]) }
    if probes < 256 { store64(saved + probes * 8, load64(address)) }
    probes += 1
  }
  expect("regions of RAM", probes, in: 8...256)
  for pass: UInt64 in 0..<3 {
    let mask = pass &* 0x5555_5555_5555_5555
    forEachProbe { store64($0, $0 &* 0x9e37_79b9_7f4a_7c15 ^ mask) }
    forEachProbe { expect("RAM keeps a word", load64($0), equals: $0 &* 0x9e37_79b9_7f4a_7c15 ^ mask) }
  }
  probes = 0
  forEachProbe { address in
    store64(address, load64(saved + probes * 8))
    probes += 1
  }
  say("patterns: ok")
}

/// Every width at odd addresses, and across a page.
private func widths() {
  let pair = guest_allocate(8192, 4096)
  var offset: UInt64 = 4088
  while offset < 4096 + 3 {
    let address = pair + offset
    store64(address, 0x8877_6655_4433_2211)
    expect("an unaligned word", load64(address), equals: 0x8877_6655_4433_2211)
    expect("bytes in order", UInt64(load8(address + 7)), equals: 0x88)
    expect("halves in order", UInt64(load32(address + 4)), equals: 0x8877_6655)
    store16(address + 1, 0xbeef)
    expect("a part is written", load64(address), equals: 0x8877_6655_44be_ef11)
    store8(address + 3, 0)
    store32(address + 4, 0x0102_0304)
    expect("parts are written", load64(address), equals: 0x0102_0304_00be_ef11)
    offset += 1
  }
  say("widths: ok")
}

/// The PCI hole where no device is: reads are all ones, writes go nowhere.
private func holes() {
  let hole: UInt64 = 0xcabc_d000
  expect("a byte of a hole", UInt64(load8(hole)), equals: 0xff)
  expect("a word of a hole", UInt64(load16(hole + 2)), equals: 0xffff)
  expect("a doubleword of a hole", UInt64(load32(hole + 4)), equals: 0xffff_ffff)
  expect("a quadword of a hole", load64(hole + 8), equals: .max)
  store32(hole, 0)
  expect("a hole after a write", UInt64(load32(hole)), equals: 0xffff_ffff)
  say("holes: ok")
}

/// One page at two addresses, an address that moves to another page, and the bits that the processor sets.
private func aliases() {
  let other = guest_allocate(4096, 4096)
  Paging.map(window, to: page, [.writable])
  Paging.map(window + 0x1000, to: page, [.writable])
  store64(window + 8, 0x1111)
  expect("an alias", load64(window + 0x1008), equals: 0x1111)
  expect("an alias and the page", load64(page + 8), equals: 0x1111)
  store64(other + 8, 0x2222)
  Paging.map(window, to: other, [.writable])
  expect("a page after its mapping moved", load64(window + 8), equals: 0x2222)

  let entry = Paging.entryAddress(window + 0x2000)
  Paging.map(window + 0x2000, to: page, [.writable])
  let bits = Paging.accessed | Paging.dirty
  expect("a fresh entry", load64(entry) & bits, equals: 0)
  _ = load64(window + 0x2000)
  expect("an entry after a read", load64(entry) & bits, equals: Paging.accessed)
  store64(window + 0x2000, 1)
  expect("an entry after a write", load64(entry) & bits, equals: bits)
  say("aliases: ok")
}

private func faults() {
  Paging.unmap(window)
  expectFault("a read of nothing", 14, 0, window + 0x18) { _ = load64($0) }
  expectFault("a write to nothing", 14, 2, window + 0x18) { store64($0, 0) }

  Paging.map(window, to: page, [])
  store64(page, 0x3333)
  expect("a read of a read-only page", load64(window), equals: 0x3333)
  expectFault("a write to a read-only page", 14, 3, window) { store64($0, 0x4444) }
  expect("a write-protected page", load64(page), equals: 0x3333)
  write_cr0(read_cr0() & ~(1 << 16))
  store64(window, 0x4444)
  write_cr0(read_cr0() | 1 << 16)
  expect("a write without CR0.WP", load64(page), equals: 0x4444)

  // ret
  store8(page, 0xc3)
  Paging.map(window, to: page, [])
  expect("a call of an executable page", Fault.catching(window) { callAddress($0) } == nil)
  Paging.map(window, to: page, [.noExecute])
  expectFault("a call of a no-execute page", 14, 0x11, window) { callAddress($0) }

  // An address bit that the processor does not have is reserved; and an address that is not canonical.
  if cpuid(0x8000_0008, 0).eax & 0xff < 52 && StartInfo.number("reserved", default: 1) != 0 {
    Paging.setEntry(window, page | Paging.present | 1 << 51)
    expectFault("a reserved bit", 14, 9, window) { _ = load64($0) }
  }
  expectFault("an address that is not canonical", 13, 0, 0x8000_0000_0000) { _ = load64($0) }

  // An array that grows down into its guard page.
  Paging.unmap(window)
  Paging.map(window + 0x1000, to: page, [.writable])
  let fault = Fault.catching(window + 0x2000) { end in
    var address = end
    while true {
      address -= 8
      store64(address, address)
    }
  }
  expect("a guard page faults", fault?.vector ?? 0, equals: 14)
  expect("a guard page's address", fault?.address ?? 0, equals: window + 0xff8)
  expect("the page below which it lies", load64(page), equals: window + 0x1000)
  say("faults: ok")
}

private func expectFault(
  _ what: StaticString, _ vector: UInt64, _ error: UInt64, _ address: UInt64, _ body: @convention(c) (UInt64) -> Void
) {
  guard let fault = Fault.catching(address, body) else {
    say("FAIL \(what) expected exception \(vector) got none")
    Power.fail()
  }
  expect(what, fault.vector, equals: vector)
  expect(what, fault.error, equals: error)
  if vector == 14 { expect(what, fault.address, equals: address) }
}

private func callAddress(_ address: UInt64) {
  unsafeBitCast(UInt(address), to: (@convention(c) () -> Void).self)()
}
