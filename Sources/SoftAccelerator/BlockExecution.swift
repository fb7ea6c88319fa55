import CSoftCPU
import X86

/// What the loop over blocks calls: finding blocks, filling the TLB, and instructions that have no fast operation.
extension Processor {
  // MARK: Finding

  /// The block at an instruction pointer, which RIP is set to; a block that executes one instruction the slow way
  /// where there is none to be had.
  ///
  /// - Throws: what fetching the first byte raises.
  @inline(never)
  func find(_ ip: UInt64) throws(Interruption) -> UnsafeMutablePointer<Block> {
    cpu.pointee.rip = ip
    if isHostBreakpoint(ip) { return slowBlock(ip) }
    let mode = cpu.pointee.code_mode
    if mode != CodeMode.code64.rawValue {
      let limit = UInt64(segments[Int(Register.cs.index)].limit)
      guard ip <= limit, limit &- ip >= 0xfff else { return slowBlock(ip) }
    }
    let host = UInt(bitPattern: try fetchAddress(codeAddress(ip)))
    let block: UnsafeMutablePointer<Block>
    if let known = blocks.block(host, ip: ip, mode: mode) {
      block = known
    } else if let made = makeBlock(host, ip: ip, mode: mode) {
      block = made
    } else {
      return slowBlock(ip)
    }
    block.pointee.context = codeContext
    blocks.jumps[Block.jumpIndex(ip)] = block
    return block
  }

  /// The block that a block's end leads to, which is remembered there.
  @inline(never)
  func follow(
    _ block: UnsafeMutablePointer<Block>, isTaken: Bool, to ip: UInt64
  ) throws(Interruption) -> UnsafeMutablePointer<Block> {
    let epoch = blocks.epoch
    let next = try find(ip)
    // Where the cache was emptied to make room, the block that was left is no more.
    guard next != blocks.nowhere, blocks.epoch == epoch else { return next }
    if isTaken { block.pointee.taken = next } else { block.pointee.next = next }
    return next
  }

  private func slowBlock(_ ip: UInt64) -> UnsafeMutablePointer<Block> {
    blocks.nowhere.pointee.ip = ip
    return blocks.nowhere
  }

  // MARK: Leaving

  /// Leaves the loop before an operation, and executes its instruction the slow way.
  @inline(never)
  func stepOut(
    _ op: UnsafeMutablePointer<FastOperation>, _ block: UnsafeMutablePointer<Block>
  ) throws(Interruption) {
    leave(op, block)
    try step()
  }

  @inline(__always)
  private func leave(_ op: UnsafeMutablePointer<FastOperation>, _ block: UnsafeMutablePointer<Block>) {
    cpu.pointee.instructions &+= UInt64(op.pointee.number)
    cpu.pointee.rip = block.pointee.ip &+ UInt64(op.pointee.distance)
  }

  // MARK: Operations

  /// Puts the page of an access into the TLB; false where it needs the slow way.
  @inline(never)
  func fill(_ linear: UInt64, size: Int, isWrite: Bool) -> Bool {
    guard cpu.pointee.data_context != TranslationContexts.slow, isCanonical(linear),
      linear & 0xfff &+ UInt64(size) <= 0x1000
    else { return false }
    let access = isWrite ? dataAccess.union(.write) : dataAccess
    guard (try? locate(linear, access)) != nil else { return false }
    let entry = cpu.pointee.tlb + Self.tlbIndex(linear)
    let tag = linear & ~0xfff | cpu.pointee.data_context
    return isWrite ? entry.pointee.write_tag == tag : entry.pointee.read_tag == tag
  }

  /// Executes an instruction that has no fast operation; false where the block must be left, with RIP set.
  ///
  /// What `execute` checks first does not concern x87 and vector instructions, once they are in a block.
  @inline(never)
  func executeGeneric(
    _ op: UnsafeMutablePointer<FastOperation>, _ block: UnsafeMutablePointer<Block>, isVector: Bool
  ) throws(Interruption) -> Bool {
    let ip = block.pointee.ip &+ UInt64(op.pointee.distance)
    cpu.pointee.rip = ip
    cpu.pointee.position = UInt64(op.pointee.number)
    defer { cpu.pointee.position = 0 }
    do throws(Interruption) {
      if isVector {
        nextIP = ip &+ UInt64(op.pointee.length)
        try executeX87OrVector(op.instruction)
        cpu.pointee.rip = nextIP
      } else {
        try execute(op.instruction)
      }
    } catch {
      cpu.pointee.instructions &+= UInt64(op.pointee.number)
      throw error
    }
    finishDeviceAccesses()
    if cpu.pointee.rip == ip &+ UInt64(op.pointee.length), !leavesBlock, pendingDebug == 0 { return true }
    leavesBlock = false
    cpu.pointee.instructions &+= UInt64(op.pointee.number) &+ 1
    return false
  }

  /// Executes the last instruction of a block, which may have changed anything.
  @inline(never)
  func executeLast(
    _ op: UnsafeMutablePointer<FastOperation>, _ block: UnsafeMutablePointer<Block>
  ) throws(Interruption) {
    if try executeGeneric(op, block, isVector: false) { cpu.pointee.instructions &+= UInt64(op.pointee.number) &+ 1 }
  }

  // MARK: Code that changes

  /// Whether a page of host memory holds decoded code of any CPU: stores to it must be noticed.
  @inline(__always)
  func holdsCode(_ host: UnsafeMutableRawPointer) -> Bool {
    guard let owners = group.code.owners(UInt(bitPattern: host)) else { return false }
    return soft_load(owners) != 0
  }

  /// Called after every store that did not go through the TLB's inline path.
  @inline(__always)
  func memoryWritten(_ host: UnsafeMutableRawPointer, count: Int) {
    guard let owners = group.code.owners(UInt(bitPattern: host)), soft_load(owners) != 0 else { return }
    codeWritten(UInt(bitPattern: host), count: UInt(count), owners)
  }

  @inline(never)
  private func codeWritten(_ host: UInt, count: UInt, _ owners: UnsafeMutablePointer<UInt64>) {
    let page = host & ~0xfff
    let others = soft_load(owners) & ~codeBit
    if others != 0 { group.codeChanged(page, owners: others, by: self) }
    guard soft_load(owners) & codeBit != 0 else { return }
    let offset = host & 0xfff
    if blocks.forget(page: page, range: offset..<offset + count) { _ = soft_and(owners, ~codeBit) }
    leavesBlock = true
  }

  /// Forgets the code of a page that another CPU, or a device, has changed.
  func forgetCode(page: UInt) {
    guard blocks.forget(page: page, range: 0..<0x1000), let owners = group.code.owners(page) else { return }
    _ = soft_and(owners, ~codeBit)
  }

  /// Says that this CPU decodes code of a page. No CPU can store to it unnoticed afterwards.
  func watchCode(page: UInt) -> Bool {
    guard let owners = group.code.makeOwners(page) else { return false }
    if soft_load(owners) & codeBit != 0 { return true }
    if soft_or(owners, codeBit) == 0 {
      clearTLB()
      group.flush(from: self)
    }
    return true
  }

  /// Forgets all decoded code.
  func forgetAllCode() {
    for page in blocks.pages.keys {
      if let owners = group.code.owners(page) { _ = soft_and(owners, ~codeBit) }
    }
    blocks.removeAll()
  }
}

extension UnsafeMutablePointer<FastOperation> {
  /// The instruction of a generic operation.
  @inline(__always)
  var instruction: Instruction {
    UnsafePointer<Instruction>(bitPattern: UInt(pointee.address)).unsafelyUnwrapped.pointee
  }
}
