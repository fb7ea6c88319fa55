import Accelerator
import GuestMemory

/// Pages of RAM that were written, by the flat numbers of `DirtyBitmap`: 64 pages a word, the lowest in bit 0.
extension Machine {
  /// Records every write to RAM from now on: the guest's, the devices' and the VMM's. The vCPUs may run.
  ///
  /// Errors: `unsaved`, where somebody else does.
  public func startDirtyTracking() throws(MachineError) {
    guard !memory.dirty.isTracking else { throw .unsaved(.tracked) }
    memory.dirty.setTracking(true)
    try setLogging(true)
    // What the assist wrote before is in its log, too.
    _ = try takeDirtyPages()
  }

  /// Ends it. Where a slot cannot be changed any more, its log goes on and costs a little.
  public func stopDirtyTracking() {
    try? setLogging(false)
    memory.dirty.setTracking(false)
  }

  /// The pages that were written since the last call, or since the start. A page that is written while this runs is in this
  /// answer or in the next.
  public func takeDirtyPages() throws(MachineError) -> [UInt64] {
    var words = memory.dirty.take()
    do throws(AcceleratorError) {
      for (number, region) in memory.regions.enumerated() {
        let first = Int(region.fileOffset >> 12)
        Self.add(try virtualMachine.takeDirtyLog(slot: UInt32(number)), at: first, to: &words)
        if let log = try assist?.takeDirtyLog(slot: UInt32(number)) { Self.add(log, at: first, to: &words) }
      }
    } catch {
      throw .accelerator(error)
    }
    return words
  }

  private func setLogging(_ isOn: Bool) throws(MachineError) {
    do throws(AcceleratorError) {
      // The builder gives RAM the first slots, one a region.
      for (number, region) in memory.regions.enumerated() {
        try virtualMachine.setMemorySlot(
          MemorySlot(
            number: UInt32(number), range: region.range, hostBase: region.hostBase, logsDirtyPages: isOn))
      }
    } catch {
      throw .accelerator(error)
    }
  }

  private static func add(_ log: [UInt64], at first: Int, to words: inout [UInt64]) {
    let (place, shift) = (first >> 6, UInt64(first & 63))
    for (index, word) in log.enumerated() where word != 0 {
      words[place + index] |= word << shift
      let rest = shift == 0 ? 0 : word >> (64 - shift)
      if rest != 0 { words[place + index + 1] |= rest }
    }
  }
}
