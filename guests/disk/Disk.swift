import CGuest

/// One of the disks, and what is under way on it.
final class Disk {
  /// What a request is for.
  enum Step {
    /// Write the record of this generation.
    case write(UInt32)
    /// Read the record, check that it is of the generation before, then write it.
    case replace(UInt32)
    /// Read the record, and remember what is there.
    case scan
    case flush
  }

  let number: Int
  let device: VirtioBlock
  private let records: Records
  private let buffers: UInt64
  /// A slot's record and step.
  private var work: [(record: UInt64, step: Step)] = []
  private var free: [UInt16] = []
  private(set) var underWay = 0
  /// When each slot's request began, by the PM timer; empty where times are not asked for.
  private var begun: [UInt32] = []
  /// The longest request's time, in ticks of the PM timer.
  private var slowest: UInt32 = 0

  init(_ number: Int, _ device: VirtioBlock, _ records: Records, isTimed: Bool) {
    self.number = number
    self.device = device
    self.records = records
    buffers = guest_allocate(UInt64(device.depth) * records.bytes, 4096)
    for slot in 0..<device.depth {
      work.append((0, .flush))
      free.append(device.depth - 1 - slot)
    }
    if isTimed { begun = Array(repeating: 0, count: Int(device.depth)) }
  }

  /// The longest request's microseconds since the last call.
  func takeSlowest() -> UInt64 {
    defer { slowest = 0 }
    return UInt64(slowest) * 1_000_000 / PMTimer.frequency
  }

  var isFull: Bool { free.isEmpty }

  func begin(_ step: Step, record: UInt64 = 0) {
    let slot = free.removeLast()
    underWay += 1
    work[Int(slot)] = (record, step)
    if !begun.isEmpty { begun[Int(slot)] = PMTimer.read() }
    switch step {
    case .write(let generation): write(slot, record, generation)
    case .replace, .scan:
      device.submit(
        .read, slot: slot, sector: records.sector(record), buffer: buffer(slot), length: UInt32(records.bytes))
    case .flush: device.submit(.flush, slot: slot)
    }
  }

  private func buffer(_ slot: UInt16) -> UInt64 { buffers + UInt64(slot) * records.bytes }

  private func write(_ slot: UInt16, _ record: UInt64, _ generation: UInt32) {
    let buffer = buffer(slot)
    Record.fill(buffer, number: record, generation: generation, disk: number, sectors: records.sectors)
    device.submit(.write, slot: slot, sector: records.sector(record), buffer: buffer, length: UInt32(records.bytes))
  }

  /// Goes on with what is done; true where anything was.
  func reap() -> Bool {
    var isAny = false
    while let completion = device.completion() {
      isAny = true
      let (record, step) = work[Int(completion.slot)]
      if completion.status != 0 {
        say("FAIL disk \(number) record \(record): the device answers status \(completion.status)")
        Power.fail()
      }
      if !goesOn(completion.slot, record, step) {
        if !begun.isEmpty { slowest = max(slowest, (PMTimer.read() &- begun[Int(completion.slot)]) & 0xff_ffff) }
        free.append(completion.slot)
        underWay -= 1
      }
    }
    device.notify()
    return isAny
  }

  /// True where the slot has more to do.
  private func goesOn(_ slot: UInt16, _ record: UInt64, _ step: Step) -> Bool {
    switch step {
    case .write, .flush: return false
    case .scan:
      records.remember(record, disk: number, buffer(slot))
      return false
    case .replace(let generation):
      records.remember(record, disk: number, buffer(slot))
      records.check(record, disk: number, from: generation - 1, to: generation - 1)
      work[Int(slot)].step = .write(generation)
      write(slot, record, generation)
      return true
    }
  }
}
