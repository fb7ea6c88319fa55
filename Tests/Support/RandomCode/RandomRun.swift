import Accelerator
import GuestMemory
import MemoryViews
import SoftAccelerator
import X86

/// Why random code could not be run, or what it did that it must not.
public enum RandomCodeError: Error, CustomStringConvertible {
  /// The machine could not be made.
  case setup(String)
  /// A state that the CPU was in is refused.
  case state(String)

  /// One line.
  public var description: String {
    switch self {
    case .setup(let what): "random code: cannot make a machine: \(what)"
    case .state(let what): "random code: a state that the CPU was in is refused: \(what)"
    }
  }
}

/// Nonsense as code, over nonsense in all tables, in every mode, on the software engine's vCPUs: nothing of it may trap
/// the VMM. The guest's accesses to devices are answered by random values.
public final class RandomRun {
  /// Cases so far.
  public private(set) var cases = 0
  /// Instructions retired.
  public private(set) var instructions: UInt64 = 0
  /// Times that a vCPU came back, by why.
  public private(set) var exits: [String: Int] = [:]

  private let machine: RandomMachine
  private var random = RandomSource(seed: 0)
  private var views: [MemoryView] = []
  /// A case's instructions and exits, at most.
  private static let instructionLimit: UInt64 = 4000
  private static let exitLimit = 48
  /// Cases on one machine.
  private static let perMachine = 16

  /// A machine without anything in it.
  public init() throws {
    machine = try RandomMachine()
    try machine.renew(&random)
  }

  /// Runs the cases that belong to a seed, on a machine of their own.
  public func run(seed: UInt64) throws {
    random = RandomSource(seed: seed)
    try machine.renew(&random)
    for _ in 0..<Self.perMachine { try runCase(nil) }
    finish()
  }

  /// Runs one case whose code is given; its first 8 bytes choose everything else.
  public func run(_ input: UnsafeBufferPointer<UInt8>) throws {
    guard input.count > 8 else { return }
    random = RandomSource(seed: input.prefix(8).reduce(0) { $0 << 8 | UInt64($1) })
    try machine.renew(&random, keepsContents: true)
    try runCase(Array(input.dropFirst(8)))
    finish()
  }

  private func finish() {
    for vcpu in machine.vcpus { instructions &+= vcpu.instructions ?? 0 }
  }

  // MARK: One case

  private func runCase(_ given: [UInt8]?) throws {
    cases += 1
    try machine.restoreMemory()
    makeViews()
    for vcpu in machine.vcpus {
      let kind = RandomState(&random)
      try makeTables(kind)
      try makeCode(kind, given)
      let state = kind.make(from: try vcpu.readState(), &random)
      do { try vcpu.writeState(state) } catch { count("refused") }
      try vcpu.selectView(random.oneIn(4) ? random.pick(views) : nil)
      try vcpu.setDebug(debugControl())
      vcpu.requestInterruptWindow(random.oneIn(16))
    }
    var budget = Self.instructionLimit
    for _ in 0..<Self.exitLimit where budget > 0 {
      let vcpu = random.pick(machine.vcpus)
      let part = min(budget, UInt64(1 + random.below(1500)))
      vcpu.limitInstructions(part)
      let before = vcpu.instructions ?? 0
      let exit = try vcpu.run()
      // What ends no instruction is an exit at least.
      budget &-= min(budget, max(8, (vcpu.instructions ?? 0) &- before))
      guard try answer(exit, of: vcpu) else { break }
      if random.oneIn(8) { try disturb(vcpu) }
    }
    for vcpu in machine.vcpus { try putBack(vcpu) }
  }

  private func count(_ name: String) { exits[name, default: 0] += 1 }

  /// Whether the case goes on.
  private func answer(_ exit: VCPUExit, of vcpu: SoftVirtualCPU) throws -> Bool {
    switch exit {
    case .portIO(let access):
      count(access.isWrite ? "port write" : "port read")
      if !access.isWrite { access.data.storeBytes(of: random.integer(), as: UInt64.self) }
      return true
    case .memoryIO(let access):
      count(access.isWrite ? "memory write" : "memory read")
      if !access.isWrite { access.data.storeBytes(of: random.integer(), as: UInt64.self) }
      return true
    case .halt:
      count("halt")
      if random.oneIn(2) { try vcpu.injectNMI() } else if vcpu.isInterruptible { try interrupt(vcpu) }
      return true
    case .interruptWindow:
      count("interrupt window")
      if random.oneIn(2) { vcpu.requestInterruptWindow(false) }
      if vcpu.isInterruptible { try interrupt(vcpu) }
      return true
    case .interrupted:
      return true
    case .instructionLimit:
      count("budget")
      return true
    case .debug:
      count("debug")
      if random.oneIn(4) { try vcpu.setDebug(debugControl()) }
      return true
    case .viewViolation(let violation):
      count("view violation")
      switch random.below(3) {
      case 0: try vcpu.selectView(nil)
      case 1: try vcpu.selectView(random.pick(views))
      default:
        for view in views where view.number == violation.view {
          view.set(.all, for: Self.page(violation.address.rawValue))
        }
        try vcpu.selectView(nil)
      }
      return true
    case .memoryFault:
      count("memory fault")
      return try restart(vcpu)
    case .tripleFault:
      count("triple fault")
      return try restart(vcpu)
    default:
      count("other")
      return false
    }
  }

  /// Gives the vCPU another state, as often as not: the TLB and decoded code stay as they are.
  private func restart(_ vcpu: SoftVirtualCPU) throws -> Bool {
    guard random.oneIn(2) else { return false }
    let kind = RandomState(&random)
    try makeTables(kind)
    do { try vcpu.writeState(kind.make(from: try vcpu.readState(), &random)) } catch { count("refused") }
    return true
  }

  private func interrupt(_ vcpu: SoftVirtualCPU) throws { try vcpu.injectInterrupt(vector: random.byte()) }

  /// What the VMM, devices and debuggers do between two exits.
  private func disturb(_ vcpu: SoftVirtualCPU) throws {
    switch random.below(12) {
    case 0: try vcpu.injectNMI()
    case 1: if vcpu.isInterruptible { try interrupt(vcpu) }
    case 2: vcpu.kick()
    case 3:
      var registers = try vcpu.readRegisters()
      registers.rip = random.oneIn(2) ? RandomMachine.code : random.integer()
      registers.rflags ^= random.flips(0x3f_ffff)
      try vcpu.writeRegisters(registers)
    case 4:
      var system = try vcpu.readSystemRegisters()
      system.cr3 ^= random.flips()
      system.cr4 ^= random.flips(0xffff)
      try vcpu.writeSystemRegisters(system)
    case 5: _ = try vcpu.translate(random.integer())
    case 6: try machine.write(bytes(16), to: random.address())
    case 7: try machine.write(bytes(64), to: RandomMachine.code + UInt64(random.below(256)))
    case 8: try vcpu.selectView(random.oneIn(2) ? nil : random.pick(views))
    case 9: try machine.setSlot(random.below(machine.slotCount), isLogged: random.oneIn(2))
    case 10:
      while let part = try vcpu.completeExit() {
        guard try answer(part, of: vcpu) else { break }
      }
    default: try putBack(vcpu)
    }
  }

  /// Whatever became of it, the state can be taken and put back.
  private func putBack(_ vcpu: SoftVirtualCPU) throws {
    let state = try vcpu.readState()
    do { try vcpu.writeState(state) } catch { throw RandomCodeError.state("\(error)") }
  }

  // MARK: Contents

  private static func page(_ address: UInt64) -> GuestRange {
    let start = GuestPhysicalAddress(address & 0xffff_ffff_f000)
    return GuestRange(start: start, size: 0x1000) ?? GuestRange(start: GuestPhysicalAddress(0), size: 0x1000)!
  }

  private func bytes(_ count: Int) -> [UInt8] { (0..<count).map { _ in random.byte() } }

  /// Views with other rights, or other memory, in places.
  private func makeViews() {
    views = (1...2).map { number in
      let view = MemoryView(number: UInt32(number), defaultRights: random.oneIn(8) ? [] : .all)
      for _ in 0..<random.below(24) {
        let rights = PageRights(rawValue: UInt8(random.below(8)))
        view.set(rights, for: Self.page(random.oneIn(2) ? UInt64(random.below(26)) << 12 : random.address()))
      }
      return view
    }
  }

  private func debugControl() -> DebugControl {
    var control = DebugControl()
    guard random.oneIn(8) else { return control }
    control.singleStep = random.oneIn(3)
    control.software = random.oneIn(2)
    for _ in 0..<random.below(5) {
      let kind: DebugControl.Breakpoint.Kind = random.pick([.execute, .write, .access])
      control.breakpoints.append(
        DebugControl.Breakpoint(
          address: random.oneIn(2) ? RandomMachine.code + UInt64(random.below(128)) : random.address(), kind: kind,
          length: kind == .execute ? 1 : random.pick([1, 2, 4, 8])))
    }
    return control
  }

  private func makeCode(_ kind: RandomState, _ given: [UInt8]?) throws {
    let source = RandomBytes.of(kind.mode.code)
    try machine.write(given ?? source.make(random.oneIn(8) ? 0x1800 : 300, &random), to: RandomMachine.code)
    for vector in 0..<256 as Range<UInt64> where vector < 40 || random.oneIn(16) {
      try machine.write(handler(Int(vector), kind, source), to: RandomMachine.handlers + vector * 16)
    }
  }

  /// Skips some bytes of what raised the exception; or does anything.
  private func handler(_ vector: Int, _ kind: RandomState, _ source: RandomBytes) -> [UInt8] {
    let skip = UInt8(1 + random.below(6))
    let hasCode = [8, 10, 11, 12, 13, 14, 17].contains(vector)
    guard !random.oneIn(8) else { return Array(source.make(16, &random).prefix(16)) }
    if kind.mode.isLong {
      return (hasCode ? [0x48, 0x83, 0xc4, 0x08] : []) + [0x48, 0x83, 0x04, 0x24, skip, 0x48, 0xcf]
    }
    switch kind.mode {
    case .real: return [0x55, 0x89, 0xe5, 0x83, 0x46, 0x02, skip, 0x5d, 0xcf]
    default: return (hasCode ? [0x83, 0xc4, 0x04] : []) + [0x83, 0x04, 0x24, skip, 0xcf]
    }
  }

  // MARK: Tables

  private func makeTables(_ kind: RandomState) throws {
    try makeDescriptors(kind)
    let isLong = kind.mode.isLong
    for vector in 0..<256 as Range<UInt64> {
      if kind.mode == .real {
        try machine.write(bytes(of: RandomMachine.handlers + vector * 16, count: 4), to: vector * 4)
        continue
      }
      guard vector < 48 || random.oneIn(8) else { continue }
      let selector: UInt64 = isLong ? 0x08 : 0x40
      let type: UInt64 = random.oneIn(8) ? random.next() & 0xff : random.pick([0x8e, 0x8e, 0xee, 0xef])
      let stack: UInt64 = isLong && random.oneIn(8) ? random.next() & 7 : 0
      var gate = (RandomMachine.handlers + vector * 16) | selector << 16 | stack << 32 | type << 40
      if random.oneIn(24) { gate ^= random.flips() }
      try machine.put(gate, at: 0x2000 + vector * (isLong ? 16 : 8))
      if isLong { try machine.put(random.oneIn(64) ? random.next() : 0, at: 0x2008 + vector * 16) }
    }
    try makeTask(kind)
    for _ in 0..<(random.oneIn(2) ? 0 : random.below(12)) {
      // Page tables with some entries other than they were.
      let place =
        0x1_0000 + UInt64(random.below(10)) << 12 + UInt64(random.oneIn(2) ? random.below(8) : random.below(64)) * 8
      try machine.put(random.oneIn(2) ? random.next() : (random.address() & ~0xfff) | random.next() & 0xfff, at: place)
    }
  }

  private func bytes(of value: UInt64, count: Int) -> [UInt8] {
    (0..<count).map { UInt8(truncatingIfNeeded: value >> UInt64($0 * 8)) }
  }

  private func makeDescriptors(_ kind: RandomState) throws {
    let known: [UInt64] = [
      0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00af_fb00_0000_ffff, 0x00cf_f300_0000_ffff, 0,
      0x008f_9b00_0000_ffff,
      0x008f_fb00_0000_ffff, 0x00cf_9b00_0000_ffff, 0x00cf_fb00_0000_ffff, 0x0000_8200_5000_00ff, 0,
      0x0000_8b00_3000_2067, 0,
    ]
    for (index, descriptor) in known.enumerated() {
      try machine.put(random.oneIn(32) ? descriptor ^ random.flips() : descriptor, at: 0x800 + UInt64(index) * 8)
    }
    for place in (0x870..<0xa00 as Range<UInt64>) where place & 7 == 0 {
      try machine.put(descriptor(), at: place)
      if place < 0x8f0 { try machine.put(descriptor(), at: 0x5000 + place - 0x870) }
    }
  }

  /// A descriptor of any type, with a base and a limit, or a target, in memory.
  private func descriptor() -> UInt64 {
    let type = random.next() & 0x1f
    let low =
      random.oneIn(2)
      ? random.next() & 0xffff | (random.next() & 0xffff) << 16
      : 0x1000 + random.next() & 0x3f | random.pick([0x08, 0x40, 0x48, 0x60, 0x1b, 0x70]) << 16
    let rights = type | (random.next() & 3) << 5 | (random.oneIn(8) ? 0 : 0x80)
    return low | rights << 40 | (random.next() & 0xff) << 48 | (random.oneIn(4) ? random.next() & 0xff << 56 : 0)
  }

  private func makeTask(_ kind: RandomState) throws {
    if kind.mode.isLong {
      for (index, offset) in [4, 12, 20, 36, 44, 52, 60, 68, 76, 84].enumerated() {
        try machine.put(random.oneIn(16) ? random.next() : 0x7800 - UInt64(index) * 0x80, at: 0x3000 + UInt64(offset))
      }
    } else {
      for offset in [4, 12, 20] as [UInt64] {
        try machine.put(0x10_0000_7800 + (offset == 4 ? 0 : 2) << 32, at: 0x3000 + offset)
      }
      try machine.put(0x1_0000, at: 0x301c)
      try machine.put(random.pick([0x1000, 0x1010]) | 2 << 32, at: 0x3020)
      try machine.put(0x7600, at: 0x3038)
      for (offset, selector) in [0x10, 0x40, 0x10, 0x10, 0x10, 0x10, 0].enumerated() {
        try machine.put(UInt64(selector), at: 0x3048 + UInt64(offset) * 4)
      }
    }
    // Where the permission bitmap is; what is in it is nonsense, or nothing is forbidden.
    try machine.write(bytes(of: random.oneIn(8) ? random.next() : 0x68, count: 2), to: 0x3066)
    if random.oneIn(2) { try machine.write([UInt8](repeating: 0, count: 0x800), to: 0x3068) }
  }
}

extension RandomRun {
  /// An input of `run(_:)` for a fuzzer to begin with.
  public static func input(seed: UInt64) -> [UInt8] {
    var random = RandomSource(seed: seed)
    let head = (0..<8).map { _ in random.byte() }
    return head + RandomBytes.of(random.pick([.code16, .code32, .code64])).make(200, &random)
  }
}
