import CSoftCPU
import X86

/// String and port instructions, with their repetitions.
extension Processor {
  /// Executes MOVS, STOS, LODS, CMPS, SCAS, INS or OUTS; false for any other instruction.
  ///
  /// A repeated one stops after some iterations when the run loop wants to look around; it then starts again at its own
  /// address, with the registers as far as it got, as an interrupt leaves it.
  func executeString(_ i: Instruction) throws(Interruption) -> Bool {
    guard i.operation.isString else { return false }
    guard i.isRepeated else {
      try iterate(i)
      return true
    }
    let counterMask = Self.mask(i.addressSize)
    // Ports are forbidden even where nothing is left to be transferred.
    if i.operation.isIOPrivileged {
      let operand = i.operands[i.operation.mnemonic == .ins ? 0 : 1]
      try checkPortPermission(UInt16(truncatingIfNeeded: general[2]), size: operand.size)
    }
    // Iterations, however many are done at once: how often it starts again must not depend on what the TLB has.
    var left = Self.iterationLimit
    while general[1] & counterMask != 0 {
      if left == 0 || soft_attention(cpu) < 0 && left < Self.iterationLimit && !isDeterministic {
        nextIP = cpu.pointee.rip
        return true
      }
      let done = finishesOnly ? 0 : iterateInBulk(i, limit: left)
      if done > 0 {
        write(1, general[1] &- done, size: i.addressSize)
        left &-= done
        continue
      }
      try iterate(i)
      finishDeviceAccesses()
      write(1, general[1] &- 1, size: i.addressSize)
      left &-= 1
      if i.operation.isRepeatedByZF, zero != i.prefixes.contains(.rep) { break }
      if pendingDebug != 0 || finishesOnly {
        // A data breakpoint stops between iterations.
        if general[1] & counterMask != 0 { nextIP = cpu.pointee.rip }
        return true
      }
    }
    return true
  }

  /// Iterations of a repeated instruction before the run loop looks around.
  private static let iterationLimit: UInt64 = 1 << 15

  /// One iteration; the counter is the caller's.
  private func iterate(_ i: Instruction) throws(Interruption) {
    let size = i.operands[0].size == 0 ? i.operands[1].size : i.operands[0].size
    let source = Int(i.segment.index)
    let destination = Int(Register.es.index)
    switch i.operation.mnemonic {
    case .movs:
      let value = try load(linear(source, pointer(6, i), size: Int(size), isWrite: false), size: size)
      try store(value, linear(destination, pointer(7, i), size: Int(size), isWrite: true), size: size)
      advance(6, i, size)
      advance(7, i, size)
    case .stos:
      try store(general[0], linear(destination, pointer(7, i), size: Int(size), isWrite: true), size: size)
      advance(7, i, size)
    case .lods:
      write(0, try load(linear(source, pointer(6, i), size: Int(size), isWrite: false), size: size), size: size)
      advance(6, i, size)
    case .cmps:
      let a = try load(linear(source, pointer(6, i), size: Int(size), isWrite: false), size: size)
      let b = try load(linear(destination, pointer(7, i), size: Int(size), isWrite: false), size: size)
      setSubtractionFlags(a, b, a &- b, size)
      advance(6, i, size)
      advance(7, i, size)
    case .scas:
      let a = general[0] & Self.mask(size)
      let b = try load(linear(destination, pointer(7, i), size: Int(size), isWrite: false), size: size)
      setSubtractionFlags(a, b, a &- b, size)
      advance(7, i, size)
    case .ins:
      let size = i.operands[0].size
      try checkPort(UInt16(truncatingIfNeeded: general[2]), size: size)
      let place = try linear(destination, pointer(7, i), size: Int(size), isWrite: true)
      try checkWrite(place, count: Int(size))
      try store(portRead(UInt16(truncatingIfNeeded: general[2]), size: size), place, size: size)
      advance(7, i, size)
    default:
      let size = i.operands[1].size
      try checkPort(UInt16(truncatingIfNeeded: general[2]), size: size)
      let value = try load(linear(source, pointer(6, i), size: Int(size), isWrite: false), size: size)
      try portWrite(UInt16(truncatingIfNeeded: general[2]), size: size, value: value)
      advance(6, i, size)
    }
  }

  /// Does as many iterations of REP MOVS or REP STOS as lie in one page of RAM on either side; 0 where the single
  /// iterations must do it (overlap, devices, faults, downwards, code).
  private func iterateInBulk(_ i: Instruction, limit: UInt64) -> UInt64 {
    let mnemonic = i.operation.mnemonic
    guard mnemonic == .movs || mnemonic == .stos, cpu.pointee.other_flags & RFLAGS.df.rawValue == 0,
      cpu.pointee.data_context != TranslationContexts.slow
    else { return 0 }
    let size = UInt64(i.operands[0].size)
    let to = pointer(7, i)
    // What faults is left to the element by itself, which reads its source before its destination is looked at.
    guard let target = try? linear(Int(Register.es.index), to, size: Int(size), isWrite: true) else { return 0 }
    let left = general[1] & Self.mask(i.addressSize)
    // In one page, and below the wrap of the index.
    var bytes = min(0x1000 &- target & 0xfff, min(left, limit, 0x1000) &* size)
    if !is64Bit { bytes = min(bytes, Self.mask(i.addressSize) &- to) }
    guard let destination = writableHost(target) else { return 0 }
    if mnemonic == .stos {
      let count = bytes / size
      guard count > 0, fits(Int(Register.es.index), to, count &* size, isWrite: true) else { return 0 }
      fill(destination, general[0], count: Int(count), size: i.operands[0].size)
      advance(7, i, by: count &* size)
      return count
    }
    let from = pointer(6, i)
    guard let origin = try? linear(Int(i.segment.index), from, size: Int(size), isWrite: false) else { return 0 }
    bytes = min(bytes, 0x1000 &- origin & 0xfff)
    if !is64Bit { bytes = min(bytes, Self.mask(i.addressSize) &- from) }
    let count = bytes / size
    guard count > 0, let source = readableHost(origin), fits(Int(Register.es.index), to, count &* size, isWrite: true),
      fits(Int(i.segment.index), from, count &* size, isWrite: false)
    else { return 0 }
    // A destination shortly above the source repeats a pattern, element by element.
    let distance = destination - source
    guard distance <= 0 || distance >= Int(count &* size) else { return 0 }
    soft_copy(destination, source, Int(count &* size))
    advance(6, i, by: count &* size)
    advance(7, i, by: count &* size)
    return count
  }

  /// Whether `size` bytes at an offset lie within a segment.
  private func fits(_ segment: Int, _ offset: UInt64, _ size: UInt64, isWrite: Bool) -> Bool {
    (try? linear(segment, offset, size: Int(size), isWrite: isWrite)) != nil
  }

  private func fill(_ destination: UnsafeMutableRawPointer, _ value: UInt64, count: Int, size: UInt8) {
    switch size {
    case 1: destination.initializeMemory(as: UInt8.self, repeating: UInt8(truncatingIfNeeded: value), count: count)
    case 2:
      for index in 0..<count {
        destination.storeBytes(of: UInt16(truncatingIfNeeded: value), toByteOffset: index &* 2, as: UInt16.self)
      }
    case 4:
      for index in 0..<count {
        destination.storeBytes(of: UInt32(truncatingIfNeeded: value), toByteOffset: index &* 4, as: UInt32.self)
      }
    default:
      for index in 0..<count { destination.storeBytes(of: value, toByteOffset: index &* 8, as: UInt64.self) }
    }
  }

  /// The host's address of a byte that the program may write with plain stores, for now; nil otherwise.
  private func writableHost(_ linear: UInt64) -> UnsafeMutableRawPointer? {
    let entry = cpu.pointee.tlb + Self.tlbIndex(linear)
    let tag = linear & ~0xfff | cpu.pointee.data_context
    return entry.pointee.write_tag == tag ? Self.host(linear, entry) : nil
  }

  private func readableHost(_ linear: UInt64) -> UnsafeMutableRawPointer? {
    let entry = cpu.pointee.tlb + Self.tlbIndex(linear)
    let tag = linear & ~0xfff | cpu.pointee.data_context
    return entry.pointee.read_tag == tag ? Self.host(linear, entry) : nil
  }

  @inline(__always)
  private func pointer(_ register: Int, _ i: Instruction) -> UInt64 { general[register] & Self.mask(i.addressSize) }

  @inline(__always)
  private func advance(_ register: Int, _ i: Instruction, _ size: UInt8) {
    let isDown = cpu.pointee.other_flags & RFLAGS.df.rawValue != 0
    write(register, isDown ? general[register] &- UInt64(size) : general[register] &+ UInt64(size), size: i.addressSize)
  }

  private func advance(_ register: Int, _ i: Instruction, by count: UInt64) {
    write(register, general[register] &+ count, size: i.addressSize)
  }
}
