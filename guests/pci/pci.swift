import CGuest

nonisolated(unsafe) private var functions: UInt64 = 0

/// Lists PCI's functions, and checks configuration space: widths, BAR sizes, capability lists, and that ECAM shows the same
/// as the ports do.
func guestMain() {
  PCI.forEachFunction { function, id in
    functions += 1
    let classCode = PCI.read32(function, 8) >> 8
    say("\(function.device).\(function.function): \(hex: id & 0xffff):\(hex: id >> 16) class \(hex: classCode)")
    widths(function, id)
    bars(function)
    capabilities(function)
    if let ecam = PCI.ecam { compare(function, ecam) }
  }
  expect("a function on bus 0", functions > 0)
  let nobody = PCI.Function(bus: 0, device: 31, function: 7)
  expect("a function that is not there", UInt64(PCI.read32(nobody, 0)), equals: 0xffff_ffff)
  if let ecam = PCI.ecam {
    expect("it is not in ECAM either", UInt64(PCI.readECAM32(ecam, nobody, 0)), equals: 0xffff_ffff)
    say("ecam: ok")
  }
  say("pci: all passed")
}

/// Bytes and words of the id through 0xcfc to 0xcff.
private func widths(_ function: PCI.Function, _ id: UInt32) {
  _ = PCI.read32(function, 0)
  expect("a word of the id", UInt64(inw(0xcfe)), equals: UInt64(id >> 16))
  expect("a byte of the id", UInt64(inb(0xcfd)), equals: UInt64(id >> 8 & 0xff))
  PCI.write32(function, 0, ~id)
  expect("an id after a write", UInt64(PCI.read32(function, 0)), equals: UInt64(id))
}

/// Every BAR of an ordinary function tells a size that is a power of two, and keeps its address.
private func bars(_ function: PCI.Function) {
  if PCI.read32(function, 12) >> 16 & 0x7f != 0 { return }
  let command = PCI.read32(function, 4) & 0xffff
  // Nothing may decode while addresses are all ones.
  PCI.write32(function, 4, command & ~3)
  var offset: UInt8 = 0x10
  while offset < 0x28 {
    let old = PCI.read32(function, offset)
    let isPort = old & 1 != 0
    let isWide = !isPort && old >> 1 & 3 == 2
    PCI.write32(function, offset, .max)
    var mask = UInt64(PCI.read32(function, offset) & ~(isPort ? 3 : 15))
    PCI.write32(function, offset, old)
    expect("a BAR's address", UInt64(PCI.read32(function, offset)), equals: UInt64(old))
    if isWide && offset < 0x24 {
      let oldHigh = PCI.read32(function, offset + 4)
      PCI.write32(function, offset + 4, .max)
      mask |= UInt64(PCI.read32(function, offset + 4)) << 32
      PCI.write32(function, offset + 4, oldHigh)
    } else if mask != 0 {
      mask |= isPort && mask >> 16 == 0 ? 0xffff_ffff_ffff_0000 : 0xffff_ffff_0000_0000
    }
    let size = ~mask &+ 1
    expect("a BAR's size is a power of two", size & (size &- 1), equals: 0)
    offset += isWide ? 8 : 4
  }
  PCI.write32(function, 4, command)
}

/// The list of capabilities ends, and stays behind the header.
private func capabilities(_ function: PCI.Function) {
  if PCI.read32(function, 4) >> 16 & 0x10 == 0 { return }
  var next = UInt8(truncatingIfNeeded: PCI.read32(function, 0x34)) & 0xfc
  var seen: UInt64 = 0
  while next != 0 {
    expect("a capability's place", UInt64(next), in: 0x40...0xfc)
    seen += 1
    expect("capabilities", seen, in: 1...48)
    next = UInt8(truncatingIfNeeded: PCI.read32(function, next) >> 8) & 0xfc
  }
}

private func compare(_ function: PCI.Function, _ ecam: UInt64) {
  var offset: UInt16 = 0
  while offset < 64 {
    let ports = PCI.read32(function, UInt8(offset))
    expect("ECAM and ports", UInt64(PCI.readECAM32(ecam, function, offset)), equals: UInt64(ports))
    offset += 4
  }
}
