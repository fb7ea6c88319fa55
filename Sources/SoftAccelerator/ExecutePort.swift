import CSoftCPU
import X86

/// IN and OUT, and the permission for them.
extension Processor {
  /// Executes IN or OUT; false for any other instruction.
  func executePort(_ i: Instruction) throws(Interruption) -> Bool {
    switch i.operation.mnemonic {
    case .in:
      let size = i.operands[0].size
      let port = portNumber(i, 1)
      try checkPort(port, size: size)
      write(0, try portRead(port, size: size), size: size)
    case .out:
      let size = i.operands[1].size
      let port = portNumber(i, 0)
      try checkPort(port, size: size)
      try portWrite(port, size: size, value: general[0] & Self.mask(size))
    default: return false
    }
    return true
  }

  private func portNumber(_ i: Instruction, _ operand: Int) -> UInt16 {
    i.operands[operand].kind == .immediate
      ? UInt16(truncatingIfNeeded: i.immediate & 0xff) : UInt16(truncatingIfNeeded: general[2])
  }

  /// #GP(0) where neither IOPL nor the TSS's I/O permission bitmap allows a port (SDM vol. 1, 19.5).
  func checkPort(_ port: UInt16, size: UInt8) throws(Interruption) {
    if watchesPorts { notePortAccess(port, size: size) }
    try checkPortPermission(port, size: size)
  }

  /// #GP(0) where the program may not access a port.
  func checkPortPermission(_ port: UInt16, size: UInt8) throws(Interruption) {
    guard cpu.pointee.cr0 & CR0.pe.rawValue != 0 else { return }
    let privilege = UInt8(cpu.pointee.other_flags >> 12 & 3)
    guard isVirtual8086 || cpu.pointee.cpl > privilege else { return }
    let task = segments[8]
    // Bits 0-3 of the attributes: 9 and 11 are the 32-bit and 64-bit TSS, the only ones with a bitmap.
    guard task.attributes & 0x1000 == 0, task.attributes & 13 == 9, task.limit >= 103 else { throw .generalProtection }
    let map = try loadSystem(task.base &+ 102, size: 2)
    let byte = map &+ UInt64(port >> 3)
    guard byte &+ 1 <= UInt64(task.limit) else { throw .generalProtection }
    let bits = try loadSystem(task.base &+ byte, size: 2) >> UInt64(port & 7)
    guard bits & ((1 << UInt64(size)) &- 1) == 0 else { throw .generalProtection }
  }

  /// Reads a port: the VMM answers, and the instruction starts again.
  func portRead(_ port: UInt16, size: UInt8) throws(Interruption) -> UInt64 {
    if replay.position < replay.values.count {
      replay.position += 1
      return replay.values[replay.position - 1]
    }
    pendingExit = .port(port, size: size, isWrite: false, value: 0)
    throw .exit
  }

  /// Writes a port.
  func portWrite(_ port: UInt16, size: UInt8, value: UInt64) throws(Interruption) {
    if replay.position < replay.values.count {
      replay.position += 1
      return
    }
    pendingExit = .port(port, size: size, isWrite: true, value: value)
    throw .exit
  }

  /// Forgets the device accesses of an instruction, or of an iteration, that is done.
  @inline(__always)
  func finishDeviceAccesses() {
    if replay.position != 0 || !replay.values.isEmpty {
      replay.values.removeAll(keepingCapacity: true)
      replay.position = 0
    }
  }
}
