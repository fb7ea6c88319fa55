import Accelerator
import CSoftCPU

/// Accesses that the VMM answers. The instruction starts again once it has, and finds what it already did in `replay`.
extension Processor {
  /// Reads 1 to 8 bytes of a device.
  func deviceRead(_ physical: UInt64, size: UInt8) throws(Interruption) -> UInt64 {
    if let controller = localAPICPage(physical) {
      return replayed { physical & 15 == 0 ? UInt64(controller.read(register: UInt16(physical & 0xff0))) : 0 }
    }
    if replay.position < replay.values.count {
      replay.position += 1
      return replay.values[replay.position - 1]
    }
    pendingExit = .memory(physical: physical, size: size, isWrite: false, value: 0)
    throw .exit
  }

  /// Writes 1 to 8 bytes of a device.
  func deviceWrite(_ physical: UInt64, size: UInt8, value: UInt64) throws(Interruption) {
    if let controller = localAPICPage(physical) {
      _ = replayed {
        if physical & 15 == 0 {
          controller.write(register: UInt16(physical & 0xff0), value: UInt32(truncatingIfNeeded: value))
        }
        // It may have made an interrupt deliverable, which comes right after the instruction.
        leavesBlock = true
        return 0
      }
      return
    }
    if replay.position < replay.values.count {
      replay.position += 1
      return
    }
    pendingExit = .memory(physical: physical, size: size, isWrite: true, value: value)
    throw .exit
  }

  /// The local APIC's page is answered here, without leaving the CPU.
  private func localAPICPage(_ physical: UInt64) -> (any LocalInterruptController)? {
    // IA32_APIC_BASE: bit 11 enables the APIC, bit 10 takes the page away again (x2APIC).
    guard cpu.pointee.apic_base & 0xc00 == 0x800, physical & ~0xfff == cpu.pointee.apic_base & ~0xfff else {
      return nil
    }
    return localAPIC
  }

  /// Once an instruction, even where another device's access makes it start again.
  private func replayed(_ body: () -> UInt64) -> UInt64 {
    if replay.position == replay.values.count { replay.values.append(body()) }
    replay.position += 1
    return replay.values[replay.position - 1]
  }
}
