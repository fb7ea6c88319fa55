import Accelerator
import GuestMemory
import Host
import TestGuests
import Testing

/// A virtual machine with tables for every mode, and guests by name.
///
/// | address | |
/// |---|---|
/// | 0x500, 0x600 | GDT, task-state segment |
/// | 0x1000-0x5fff | page tables: 0-1, 3-4 and 4-5 GiB, each address to itself, for both rings |
/// | 0x6000 | IDT, whose gates say their vector on port 0x98 |
/// | below 0x8000, 0x7800 | stacks of ring 0 and ring 3 |
/// | 0x8000 | the guest |
/// | 0xa000, 0xb000 | default and own handlers |
/// | 0x100000 | data |
final class TestMachine {
  enum Mode { case real, protected, long, user }

  static let data: UInt64 = 0x10_0000
  static let high: UInt64 = 0x1_0000_0000
  static let entry: UInt64 = 0x8000
  /// Guest-physical address without a slot, inside what the page tables map.
  static let hole: UInt64 = 0xd000_0000
  private static let low: UInt64 = 4 << 20

  let accelerator: any Accelerator
  let machine: any VirtualMachine
  let memory: GuestMemory
  private(set) var vcpus: [any VirtualCPU] = []
  private var guards: [EventLoop.Timer] = []
  var vcpu: any VirtualCPU { vcpus[0] }

  /// RAM at 0 and at 4 GiB in slots 0 and 1, and some that no slot shows yet.
  init(
    _ subject: AcceleratorUnderTest, vcpus count: Int = 1, needs capabilities: AcceleratorCapabilities = [],
    logging: Bool = false
  ) throws {
    accelerator = try subject.accelerator(capabilities)
    memory = try GuestMemory([
      Self.range(0, Self.low), Self.range(0x2000_0000, 1 << 16), Self.range(Self.high, 2 << 20),
    ])
    machine = try subject.machine(accelerator, memory)
    for (number, region) in [memory.regions[0], memory.regions[2]].enumerated() {
      try machine.setMemorySlot(
        MemorySlot(
          number: UInt32(number), range: region.range, hostBase: region.hostBase, logsDirtyPages: logging))
    }
    for index in 0..<count {
      let vcpu = try machine.makeVCPU(index: index, cpuid: Self.leaves(accelerator.supportedCPUID(), processor: index))
      vcpus.append(vcpu)
      if let timer = HangGuard.arm(vcpu) { guards.append(timer) }
    }
    try writeTables()
  }

  deinit {
    for timer in guards { timer.cancel() }
  }

  static func range(_ start: UInt64, _ size: UInt64) -> GuestRange {
    GuestRange(start: GuestPhysicalAddress(start), size: size)!
  }

  private static func leaves(_ supported: [CPUIDLeaf], processor: Int) -> [CPUIDLeaf] {
    supported.map { leaf in
      var leaf = leaf
      if leaf.function == 1 { leaf.ebx = leaf.ebx & 0xff_ffff | UInt32(processor) << 24 }
      if leaf.function == 0xb { leaf.edx = UInt32(processor) }
      return leaf
    }
  }

  /// Memory that no slot of its own shows.
  var spare: UnsafeMutableRawPointer { memory.regions[1].hostBase }

  // MARK: Memory

  func write<T: FixedWidthInteger>(_ value: T, to address: UInt64) throws {
    try memory.write(value, to: GuestPhysicalAddress(address))
  }

  func read<T: FixedWidthInteger>(_ address: UInt64, as type: T.Type = T.self) throws -> T {
    try memory.read(GuestPhysicalAddress(address))
  }

  /// Copies a guest to an address.
  func load(_ guest: String, at address: UInt64) throws {
    var size = 0
    let bytes = try #require(test_guest(guest, &size), "no guest is called \(guest)")
    try memory.write(UnsafeRawBufferPointer(start: bytes, count: size), to: GuestPhysicalAddress(address))
  }

  /// Makes `guest` the handler of a vector.
  func setHandler(_ vector: Int, _ guest: String, isForUsers: Bool = false) throws {
    let address = 0xb000 + UInt64(vector) * 64
    try load(guest, at: address)
    try setGate(vector, to: address, type: isForUsers ? 0xee00 : 0x8e00)
  }

  private func setGate(_ vector: Int, to address: UInt64, type: UInt64 = 0x8e00) throws {
    let low = address & 0xffff | 8 << 16 | type << 32 | (address >> 16 & 0xffff) << 48
    try write(low, to: 0x6000 + UInt64(vector) * 16)
    try write(address >> 32, to: 0x6008 + UInt64(vector) * 16)
  }

  private func writeTables() throws {
    try write(UInt64(0x2007), to: 0x1000)
    for (gibibyte, table) in [(0, 0x3000), (3, 0x4000), (4, 0x5000)] as [(UInt64, UInt64)] {
      try write(table | 7, to: 0x2000 + gibibyte * 8)
      for entry in 0..<512 as Range<UInt64> {
        try write(gibibyte << 30 | entry << 21 | 0x87, to: table + entry * 8)
      }
    }
    let descriptors: [UInt64] = [
      0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00af_fb00_0000_ffff, 0x00cf_f300_0000_ffff,
      0x00af_fb00_0000_ffff, 0x0000_8b00_0600_0067, 0,
    ]
    for (index, descriptor) in descriptors.enumerated() { try write(descriptor, to: 0x500 + UInt64(index) * 8) }
    // The task-state segment's stack for ring 0.
    try write(UInt64(0x8000), to: 0x604)
    for vector in 0..<64 {
      let address = 0xa000 + UInt64(vector) * 8
      // mov al, vector; out 0x98, al; and again
      try memory.write([0xb0, UInt8(vector), 0xe6, 0x98, 0xeb, 0xfc], to: GuestPhysicalAddress(address))
      try setGate(vector, to: address)
    }
  }

  // MARK: Processors

  /// Puts a processor at the start of a guest in `mode`.
  func start(
    _ guest: String, _ mode: Mode = .long, processor: Int = 0, _ change: (inout GeneralRegisters) -> Void = { _ in }
  ) throws {
    try load(guest, at: Self.entry)
    var state = try vcpus[processor].readState()
    state.general = GeneralRegisters()
    state.general.rip = Self.entry
    state.general.rsp = mode == .user ? 0x7800 : 0x8000
    state.general.rflags = mode == .user ? 0x3002 : 2
    change(&state.general)
    state.system = Self.system(mode, keeping: state.system)
    state.activity = .runnable
    // x87, SSE and, where the accelerator knows it, AVX (SDM vol. 1, 13.3).
    let components = try accelerator.supportedCPUID().first { $0.function == 0xd && $0.index == 0 }?.eax ?? 3
    state.xcr0 = UInt64(components & 7)
    try vcpus[processor].writeState(state)
  }

  private static func system(_ mode: Mode, keeping present: SystemRegisters) -> SystemRegisters {
    var system = SystemRegisters()
    system.apicBase = present.apicBase
    switch mode {
    case .real: return system
    case .protected:
      system.cr0 = 0x11
      system.cs = .code32(selector: 8)
      setData(&system, .data(selector: 0x10))
      return system
    case .long, .user: break
    }
    let isUser = mode == .user
    system.cr0 = 0x8005_0033
    system.cr3 = 0x1000
    system.cr4 = 0x4_0620
    system.efer = 0xd01
    system.cs =
      isUser ? SegmentRegister(limit: .max, selector: 0x2b, attributes: 0xafb) : .code64(selector: 8)
    setData(
      &system, isUser ? SegmentRegister(limit: .max, selector: 0x23, attributes: 0xcf3) : .data(selector: 0x10))
    system.tr = .task(base: 0x600, selector: 0x30)
    system.gdt = DescriptorTable(base: 0x500, limit: 63)
    system.idt = DescriptorTable(base: 0x6000, limit: 0x3ff)
    return system
  }

  private static func setData(_ system: inout SystemRegisters, _ segment: SegmentRegister) {
    system.ds = segment
    system.es = segment
    system.fs = segment
    system.gs = segment
    system.ss = segment
  }

  /// Runs a processor to its next exit; a read gets `answer`.
  func next(_ processor: Int = 0, answer: [UInt8] = [0]) throws -> GuestEvent {
    GuestEvent(try vcpus[processor].run(), answer: answer)
  }

  /// Completes the last exit as a caller must; the further parts of the access, each of which gets `answer`.
  func complete(_ processor: Int = 0, answer: [UInt8] = [0]) throws -> [GuestEvent] {
    var events: [GuestEvent] = []
    while let exit = try vcpus[processor].completeExit() { events.append(GuestEvent(exit, answer: answer)) }
    return events
  }

  /// Starts a guest and runs it to its end; anything else that leaves it is an issue.
  func runToEnd(
    _ guest: String, _ mode: Mode = .long, sourceLocation: SourceLocation = #_sourceLocation,
    _ change: (inout GeneralRegisters) -> Void = { _ in }
  ) throws {
    try start(guest, mode, change)
    #expect(try next() == .done, sourceLocation: sourceLocation)
  }
}
