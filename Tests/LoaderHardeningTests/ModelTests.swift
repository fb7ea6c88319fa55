import Accelerator
import Glibc
import GuestMemory
import KVMAccelerator
import LoaderHardening
import MemoryViews
import SoftAccelerator
import StateTree
import Testing

/// Random hypercalls, switches and accesses by two vCPUs beside a small model of the rules: nothing is allowed that the model
/// denies, nor the reverse. `SWIFTVMM_MODEL_STEPS` and `SWIFTVMM_MODEL_SEED` make long runs of it.
@Suite(.serialized) struct ModelTests {
  private static func number(_ name: String) -> UInt64? { getenv(name).flatMap { UInt64(String(cString: $0)) } }

  @Test func theSoftwareEngineObeysTheModel() throws {
    try ModelRun(SoftAccelerator(), seed: Self.number("SWIFTVMM_MODEL_SEED") ?? 1)
      .run(steps: Self.number("SWIFTVMM_MODEL_STEPS") ?? 50_000)
  }

  @Test(.enabled(if: access("/dev/kvm", R_OK | W_OK) == 0, "needs /dev/kvm"))
  func kvmObeysTheModel() throws {
    try ModelRun(KVMAccelerator(), seed: Self.number("SWIFTVMM_MODEL_SEED") ?? 1)
      .run(steps: (Self.number("SWIFTVMM_MODEL_STEPS") ?? 20_000) / 10)
  }
}

/// One machine and its model. vCPUs run 32-bit code without paging: `kernel` and `loader` hold the same small programs, one
/// for each kind of step, of which the loader's are entry points.
private final class ModelRun {
  private enum Step: UInt64, CaseIterable {
    /// `mov [ebx], ecx`
    case store
    /// `mov eax, [ebx]`
    case load
    /// `call ebx`; every page holds `ret`.
    case execute
    /// `in eax, dx`
    case call
  }

  private static let kernel: UInt64 = 0x1000
  private static let loader: UInt64 = 0x3000
  private static let pages: UInt64 = 16
  private static let first: UInt64 = 0x10_0000
  private static let plain: PageRights = [.read, .write]

  private let memory: GuestMemory
  private let vcpus: [any VirtualCPU]
  private let supervisor: LoaderHardening
  private let assist = SoftInstructionAssist()
  /// Whether a page can be executable and not readable.
  private let isExact: Bool
  private var generator: SplitMix
  /// Rights of the pages in the kernel's view and in the loader's.
  private var rights: [[PageRights]]
  private var isInside = [false, false]

  init(_ accelerator: any Accelerator, seed: UInt64) throws {
    generator = SplitMix(state: seed)
    let range = try #require(GuestRange(start: GuestPhysicalAddress(0), size: 4 << 20))
    memory = try GuestMemory([range])
    isExact = accelerator.capabilities.contains(.executePermission)
    let machine = try accelerator.makeVirtualMachine(memory: memory, interrupts: .userSpace)
    let slot = MemorySlot(number: 0, range: range, hostBase: memory.regions[0].hostBase)
    try machine.setMemorySlot(slot)
    try assist.attach(memory, slots: [slot])
    var vcpus: [any VirtualCPU] = []
    for index in 0..<2 { vcpus.append(try machine.makeVCPU(index: index, cpuid: accelerator.supportedCPUID())) }
    self.vcpus = vcpus
    var policy = HardeningPolicy()
    policy.reaction = .stop
    supervisor = LoaderHardening(policy, record: nil)
    try supervisor.attach(machine, vcpus)
    for code in [Self.kernel, Self.loader] {
      for (step, bytes) in zip(Step.allCases, [[0x89, 0x0b], [0x8b, 0x03], [0xff, 0xd3], [0xed]] as [[UInt8]]) {
        // And `out 0x81, al`.
        try memory.write(bytes + [0xe6, 0x81], to: GuestPhysicalAddress(code + step.rawValue * 16))
      }
    }
    for page in 0..<Self.pages { try memory.write([0xc3], to: GuestPhysicalAddress(Self.first + page << 12)) }
    rights = [[PageRights]](repeating: [PageRights](repeating: Self.plain, count: Int(Self.pages)), count: 2)
    for vcpu in vcpus {
      var system = try vcpu.readSystemRegisters()
      system.cs = .code32(selector: 8)
      for path in [\SystemRegisters.ds, \.es, \.fs, \.gs, \.ss] { system[keyPath: path] = .data(selector: 16) }
      system.cr0 |= 1
      try vcpu.writeSystemRegisters(system)
    }
    try setUp()
  }

  private func setUp() throws {
    func ask(_ function: Hypercall, _ a: UInt64 = 0, _ b: UInt64 = 0, _ c: UInt64 = 0, _ d: UInt64 = 0) throws {
      try #require(hypercall(0, function, a, b, c, d, code: Self.kernel) >= 0)
    }
    try ask(.setPermission, Self.kernel, 4096, 1, 5)
    try ask(.setPermission, Self.kernel, 4096, 2, 1)
    try ask(.setPermission, Self.loader, 4096, 2, 5)
    // Each page gets an entry: engines without execute permission obey those.
    try ask(.setPermission, Self.first, Self.pages << 12, 3, 3)
    try ask(.registerLoader, Self.loader, 4096, Self.loader)
    for step in Step.allCases { try ask(.addEntry, Self.loader + step.rawValue * 16) }
    try ask(.lock)
  }

  private enum Outcome: Equatable {
    case done
    case denied
  }

  /// Runs a program of the kernel or the loader on a vCPU to its end, as the machine does.
  private func run(_ index: Int, _ step: Step, code: UInt64, _ registers: GeneralRegisters) throws -> Outcome {
    let vcpu = vcpus[index]
    while try vcpu.completeExit() != nil {}
    var general = registers
    general.rip = code + step.rawValue * 16
    general.rsp = 0x8000 + UInt64(index) * 0x1000
    try vcpu.writeRegisters(general)
    while true {
      switch try vcpu.run() {
      case .portIO(let access) where access.port == 0x81: return .done
      case .portIO(let access): access.data.storeBytes(of: try supervisor.call(vcpu), as: UInt32.self)
      case .viewViolation(let violation): if try supervisor.violation(violation, vcpu) != nil { return .denied }
      case .interrupted: break
      case .emulationFailure:
        var outcome: Outcome?
        let isDone = try assist.execute(vcpu) { exit throws(AcceleratorError) in
          guard case .viewViolation(let violation) = exit else { return }
          if try supervisor.violation(violation, vcpu) != nil { outcome = .denied }
        }
        if let outcome { return outcome }
        try #require(isDone, "an instruction that nobody can execute")
      case let exit:
        Issue.record("an exit that has no place here: \(exit)")
        return .denied
      }
    }
  }

  private func hypercall(
    _ index: Int, _ function: Hypercall, _ a: UInt64, _ b: UInt64, _ c: UInt64, _ d: UInt64, code: UInt64
  ) throws -> Int32 {
    var registers = GeneralRegisters()
    registers.rdi = UInt64(function.rawValue)
    (registers.rsi, registers.rbx, registers.rcx, registers.r8) = (a, b, c, d)
    registers.rdx = UInt64(Hypercall.port)
    #expect(try run(index, .call, code: code, registers) == .done)
    while try vcpus[index].completeExit() != nil {}
    return Int32(bitPattern: UInt32(truncatingIfNeeded: try vcpus[index].readRegisters().rax))
  }

  func run(steps: UInt64) throws {
    for step in 0..<steps {
      if step % 500 == 499 { try saveAndRestore() }
      let index = Int(generator.next() & 1)
      let entersLoader = generator.next() % 3 == 0
      let code = entersLoader ? Self.loader : Self.kernel
      let page = Int(generator.next() % Self.pages)
      let address = GuestPhysicalAddress(Self.first + UInt64(page) << 12 + 8)
      // Where the code is decides the view, whatever it was before.
      isInside[index] = entersLoader
      let own = rights[entersLoader ? 1 : 0][page]
      var registers = GeneralRegisters()
      registers.rbx = address.rawValue
      registers.rcx = generator.next() & 0x7fff_ffff
      switch Step.allCases[Int(generator.next() % 4)] {
      case .store:
        let before = try memory.read(address, as: UInt32.self)
        let outcome = try run(index, .store, code: code, registers)
        #expect(outcome == (own.contains(.write) ? .done : .denied), "step \(step): store to \(own)")
        let after = try memory.read(address, as: UInt32.self)
        #expect(after == (own.contains(.write) ? UInt32(registers.rcx) : before), "step \(step): what was stored")
      case .load:
        let outcome = try run(index, .load, code: code, registers)
        #expect(outcome == (own.contains(.read) ? .done : .denied), "step \(step): load from \(own)")
        if outcome == .done {
          let value = try vcpus[index].readRegisters().rax & 0xffff_ffff
          #expect(value == UInt64(try memory.read(address, as: UInt32.self)), "step \(step): what was loaded")
        }
      case .execute:
        registers.rbx &= ~0xfff
        // From the loader, code of the kernel's is a way out; its `ret` then leads into the loader's middle.
        let outcome = try run(index, .execute, code: code, registers)
        #expect(outcome == (own.contains(.execute) ? .done : .denied), "step \(step): execution of \(own)")
        try vcpus[index].writeRegisters(GeneralRegisters())
      case .call: try changeRights(index, page, code: code, step)
      }
    }
  }

  /// Everything goes on as it was from what was saved, wherever the vCPUs are; what is cut is an error.
  private func saveAndRestore() throws {
    let node = supervisor.save()
    let cut = StateNode(node.name, version: 1) { writer in
      for byte in node.payload.dropLast(1 + Int(generator.next() % UInt64(node.payload.count - 1))) {
        writer.write(byte)
      }
    }
    #expect(throws: StateError.self) { _ = try supervisor.restore(StateNode("machine", version: 1, children: [cut])) }
    let states = try vcpus.map { try $0.readState() }
    try supervisor.restore(StateNode("machine", version: 1, children: [node]))()
    for (vcpu, state) in zip(vcpus, states) { try vcpu.writeState(state) }
    #expect(supervisor.save() == node)
  }

  private func changeRights(_ index: Int, _ page: Int, code: UInt64, _ step: UInt64) throws {
    let count = min(1 + Int(generator.next() % 3), Int(Self.pages) - page)
    var wanted = PageRights(rawValue: UInt8(generator.next() & 7))
    if !isExact, !wanted.contains(.read) { wanted.remove(.execute) }
    let mask = generator.next() % 4
    let result = try hypercall(
      index, .setPermission, Self.first + UInt64(page) << 12, UInt64(count) << 12, mask, UInt64(wanted.rawValue),
      code: code)
    let range = page..<page + count
    var isAllowed = mask != 0 && code == Self.loader && !wanted.isSuperset(of: [.write, .execute])
    if mask == 1 || mask == 2 {
      for page in range {
        let other = rights[mask == 1 ? 1 : 0][page]
        if wanted.contains(.write), other.contains(.execute) { isAllowed = false }
        if wanted.contains(.execute), other.contains(.write) { isAllowed = false }
      }
    }
    #expect((result >= 0) == isAllowed, "step \(step): \(wanted) for views \(mask): \(result)")
    guard isAllowed else { return }
    for view in 0..<2 where mask >> UInt64(view) & 1 != 0 { for page in range { rights[view][page] = wanted } }
  }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
private struct SplitMix {
  var state: UInt64

  mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var z = state
    z = (z ^ z >> 30) &* 0xbf58_476d_1ce4_e5b9
    z = (z ^ z >> 27) &* 0x94d0_49bb_1331_11eb
    return z ^ z >> 31
  }
}
