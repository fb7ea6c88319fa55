import CGuest

/// Prints what machine this is.
func guestMain() {
  say("hello from long mode, in Swift")
  let vendor = cpuid(0, 0)
  sayPart("cpu ")
  printCharacters(vendor.ebx)
  printCharacters(vendor.edx)
  printCharacters(vendor.ecx)
  say(", \(ACPI.processorCount) in the MADT")
  for index in 0..<StartInfo.regionCount {
    let region = StartInfo.region(index)
    if region.type == 1 { say("ram \(hex: region.base) to \(hex: region.end)") }
  }
  say("command line: \(StartInfo.commandLine)")
}

private func printCharacters(_ register: UInt32) {
  var left = register
  while left != 0 {
    Console.write(UInt8(truncatingIfNeeded: left))
    left >>= 8
  }
}
