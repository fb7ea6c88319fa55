import Accelerator
import GuestMemory
import Host
import KVMAccelerator
import MemoryViews
import SoftAccelerator

/// What views cost, on both engines, each figure also as a ratio to a bare PIO exit of the same engine in the same run; and
/// the designs for KVM that were not taken.
struct ViewsBenchmark {
  let runs: Int

  func measure() throws(Failure) -> BenchTable {
    let engines: [(any Accelerator)?] = [SoftAccelerator(), try? KVMAccelerator()]
    var table = BenchTable([
      .init(name: "soft", unit: "ns", digits: 0), .init(name: "soft/exit", unit: "", digits: 2),
      .init(name: "kvm", unit: "ns", digits: 0), .init(name: "kvm/exit", unit: "", digits: 2),
    ])
    if engines[1] == nil { table.notes.append("kvm left out: there is none") }
    do throws(AcceleratorError) {
      let exits = try measure(engines) { engine, rounds throws(AcceleratorError) in
        try ViewLoop(engine).exits(rounds)
      }
      func add(_ name: String, _ samples: [Samples?]) {
        var figures: [Samples?] = []
        for (sample, exit) in zip(samples, exits) {
          figures += [sample, Self.ratio(sample, exit)]
        }
        table.add(name, figures)
      }
      add("pio exit", exits)
      let instruction = try measure(engines) { engine, rounds throws(AcceleratorError) in
        try ViewLoop(engine).instructions(rounds * 10)
      }
      add("guest instruction", instruction)
      for pages in [1, 100, 10_000] as [UInt64] {
        let switches = try measure(engines) { engine, rounds throws(AcceleratorError) in
          try ViewLoop(engine, protecting: pages).switches(rounds)
        }
        add("switch and return, \(pages) pages protected", switches)
        guard pages == 1, let soft = switches[0], let one = instruction[0] else { continue }
        table.notes.append("soft: switch and return / guest instruction: \(decimal(soft.median / one.median, 0))")
      }
      add(
        "switch, first touch of data, return",
        try measure(engines) { engine, rounds throws(AcceleratorError) in
          try ViewLoop(engine).switches(rounds, touching: true)
        })
      add(
        "permission change",
        try measure(engines) { engine, rounds throws(AcceleratorError) in try ViewLoop(engine).changes(rounds) })
      let plain = try measure(engines) { engine, _ throws(AcceleratorError) in try ViewLoop(engine).work(inView: false)
      }
      let viewed = try measure(engines) { engine, _ throws(AcceleratorError) in try ViewLoop(engine).work(inView: true)
      }
      add("1000 stores without views", plain)
      add("1000 stores in a view", viewed)
      for (name, pair) in zip(["soft", "kvm"], zip(plain, viewed)) {
        guard let before = pair.0, let after = pair.1 else { continue }
        table.notes.append("\(name): work in a view / without: \(decimal(after.median / before.median, 3))")
      }
      guard engines[1] != nil else { return table }
      let kvm = try KVMAccelerator()
      add(
        "design: slots removed and added, and back",
        [
          nil,
          try samples { () throws(AcceleratorError) in
            try ViewLoop(kvm).slotSwaps(50)
          },
        ])
      add(
        "design: the whole state moved between two VMs, and back",
        [
          nil,
          try samples { () throws(AcceleratorError) in
            try ViewLoop(kvm).machineHops(50)
          },
        ])
    } catch {
      throw .accelerator(error)
    }
    return table
  }

  private static func ratio(_ samples: Samples?, _ exit: Samples?) -> Samples? {
    guard let samples, let exit else { return nil }
    return Samples(samples.values.map { $0 / exit.median })
  }

  private func samples(_ body: () throws(AcceleratorError) -> Double) throws(AcceleratorError) -> Samples {
    var values: [Double] = []
    for _ in 0..<min(runs, 7) { values.append(try body()) }
    return Samples(values)
  }

  private func measure(
    _ engines: [(any Accelerator)?], _ body: (any Accelerator, UInt64) throws(AcceleratorError) -> Double
  ) throws(AcceleratorError) -> [Samples?] {
    var all: [Samples?] = []
    for engine in engines {
      guard let engine else {
        all.append(nil)
        continue
      }
      all.append(
        try samples { () throws(AcceleratorError) in try body(engine, engine is SoftAccelerator ? 20_000 : 500) })
    }
    return all
  }
}

/// A vCPU in long mode, in this process: no device and no supervisor is in the figures.
private struct ViewLoop {
  private let memory: GuestMemory
  private let machine: any VirtualMachine
  private let vcpu: any VirtualCPU
  private let range: GuestRange
  private let protected: UInt64
  private static let size: UInt64 = 64 << 20
  private static let tables: UInt64 = 0xa000

  init(_ accelerator: any Accelerator, protecting pages: UInt64 = 1) throws(AcceleratorError) {
    let memory: GuestMemory
    guard let range = GuestRange(start: GuestPhysicalAddress(0), size: Self.size) else {
      throw .unknownSlot(0)
    }
    do { memory = try GuestMemory([range]) } catch { throw .unsupported(engine: accelerator.name, what: "\(error)") }
    self.memory = memory
    self.range = range
    protected = pages
    machine = try accelerator.makeVirtualMachine(memory: memory, interrupts: .userSpace)
    try machine.setMemorySlot(MemorySlot(number: 0, range: range, hostBase: memory.regions[0].hostBase))
    vcpu = try machine.makeVCPU(index: 0, cpuid: try accelerator.supportedCPUID())
    var system = try vcpu.readSystemRegisters()
    system.cs = .code64(selector: 8)
    for path in [\SystemRegisters.ds, \.es, \.fs, \.gs, \.ss] { system[keyPath: path] = .data(selector: 16) }
    system.cr0 |= 1 << 31 | 1
    system.cr3 = Self.tables
    system.cr4 |= 1 << 5
    system.efer |= 5 << 8
    try write([Self.tables + 0x1003], to: Self.tables)
    try write([Self.tables + 0x2003], to: Self.tables + 0x1000)
    try write(stride(from: 0, to: Self.size, by: 2 << 20).map { $0 | 0x83 }, to: Self.tables + 0x2000)
    try vcpu.writeSystemRegisters(system)
  }

  private func write<Value: FixedWidthInteger>(_ values: [Value], to address: UInt64) throws(AcceleratorError) {
    do {
      for (index, value) in values.enumerated() {
        try memory.write(value, to: GuestPhysicalAddress(address) + UInt64(index * MemoryLayout<Value>.size))
      }
    } catch {
      throw .unsupported(engine: "", what: "\(error)")
    }
  }

  private func start(_ code: [UInt8], loader: [UInt8] = [], rounds: UInt64) throws(AcceleratorError) {
    try write(code, to: 0x1000)
    try write(loader, to: 0x3000)
    var general = GeneralRegisters()
    general.rip = 0x1000
    general.rsp = 0x8000
    general.rcx = rounds
    general.rbx = 0x5000
    try vcpu.writeRegisters(general)
  }

  private func views() throws(AcceleratorError) -> (kernel: MemoryView, loader: MemoryView) {
    let kernel = try machine.makeView(base: nil)
    let loader = try machine.makeView(base: kernel)
    try machine.change([
      ViewChange(kernel, page(0x3000), []), ViewChange(loader, page(0x1000), [.read, .write]),
      ViewChange(kernel, GuestRange(start: GuestPhysicalAddress(16 << 20), size: protected << 12), [.read, .execute]),
    ])
    return (kernel, loader)
  }

  private func page(_ address: UInt64) -> GuestRange? {
    GuestRange(start: GuestPhysicalAddress(address), size: 0x1000)
  }

  private func time(_ count: UInt64, _ body: () throws(AcceleratorError) -> Void) throws(AcceleratorError) -> Double {
    let start = monotonicNanoseconds()
    try body()
    return Double(monotonicNanoseconds() - start) / Double(count)
  }

  /// `out 0x80, al`; `dec ecx`; `jnz`; `out 0x81, al`.
  func exits(_ rounds: UInt64) throws(AcceleratorError) -> Double {
    try start([0xe6, 0x80, 0xff, 0xc9, 0x75, 0xfa, 0xe6, 0x81], rounds: rounds)
    return try time(rounds) { () throws(AcceleratorError) in
      while true { if case .portIO(let access) = try vcpu.run(), access.port == 0x81 { return } }
    }
  }

  /// `inc eax`; `dec ecx`; `jnz`: one instruction's time.
  func instructions(_ rounds: UInt64) throws(AcceleratorError) -> Double {
    try start([0xff, 0xc0, 0xff, 0xc9, 0x75, 0xfa, 0xe6, 0x81], rounds: rounds)
    return try time(rounds * 3) { () throws(AcceleratorError) in
      while true { if case .portIO = try vcpu.run() { return } }
    }
  }

  /// `call 0x3000`; `dec ecx`; `jnz`; `out 0x81, al`; there, `ret`.
  func switches(_ rounds: UInt64, touching: Bool = false) throws(AcceleratorError) -> Double {
    let (kernel, loader) = try views()
    let touch: [UInt8] = touching ? [0x8b, 0x03] : []
    try start(
      [0xe8, 0xfb, 0x1f, 0, 0, 0xff, 0xc9, 0x75, 0xf7, 0xe6, 0x81], loader: touch + [0xc3], rounds: rounds)
    try vcpu.selectView(kernel)
    return try time(rounds) { () throws(AcceleratorError) in
      while true {
        switch try vcpu.run() {
        case .viewViolation(let violation): try vcpu.selectView(violation.view == kernel.number ? loader : kernel)
        case .portIO: return
        default: break
        }
      }
    }
  }

  func changes(_ rounds: UInt64) throws(AcceleratorError) -> Double {
    let (kernel, _) = try views()
    try vcpu.selectView(kernel)
    return try time(rounds * 2) { () throws(AcceleratorError) in
      for _ in 0..<rounds {
        try machine.change([ViewChange(kernel, page(0x9000), [.read, .execute])])
        try machine.change([ViewChange(kernel, page(0x9000), .all)])
      }
    }
  }

  /// 1000 times: `mov [ebx], ecx`; `dec ecx`; `jnz`.
  func work(inView: Bool) throws(AcceleratorError) -> Double {
    if inView { try vcpu.selectView(try views().kernel) }
    let repeats: UInt64 = 20
    var total = 0.0
    for _ in 0..<repeats {
      try start([0x89, 0x0b, 0xff, 0xc9, 0x75, 0xfa, 0xe6, 0x81], rounds: 1000)
      total += try time(1) { () throws(AcceleratorError) in
        while true { if case .portIO = try vcpu.run() { return } }
      }
    }
    return total / Double(repeats)
  }

  /// One machine whose slots are exchanged: the loader's page comes, the kernel's goes; and back.
  func slotSwaps(_ rounds: UInt64) throws(AcceleratorError) -> Double {
    try machine.removeMemorySlot(0)
    func slot(_ number: UInt32, _ start: UInt64, _ end: UInt64) throws(AcceleratorError) -> MemorySlot {
      guard let range = GuestRange(start: GuestPhysicalAddress(start), size: end - start) else {
        throw .unknownSlot(number)
      }
      return MemorySlot(number: number, range: range, hostBase: memory.regions[0].hostBase + Int(start))
    }
    let (low, high) = try (slot(1, 0x1000, 0x2000), slot(3, 0x3000, 0x4000))
    for slot in try [low, slot(2, 0x2000, 0x3000), high, slot(4, 0x4000, Self.size)] { try machine.setMemorySlot(slot) }
    // Both pages have been used: there is something to take back.
    try start([0xe8, 0xfb, 0x1f, 0, 0, 0xe6, 0x81], loader: [0xc3], rounds: 1)
    _ = try vcpu.run()
    return try time(rounds) { () throws(AcceleratorError) in
      for _ in 0..<rounds {
        try machine.removeMemorySlot(1)
        try machine.setMemorySlot(high)
        try machine.removeMemorySlot(3)
        try machine.setMemorySlot(low)
      }
    }
  }

  /// Two machines over one memory: the whole state goes to the other, which runs to its exit; and back.
  func machineHops(_ rounds: UInt64) throws(AcceleratorError) -> Double {
    let other = try KVMAccelerator().makeVirtualMachine(memory: memory, interrupts: .userSpace)
    try other.setMemorySlot(MemorySlot(number: 0, range: range, hostBase: memory.regions[0].hostBase))
    let twin = try other.makeVCPU(index: 0, cpuid: try KVMAccelerator().supportedCPUID())
    try start([0xe6, 0x80, 0xff, 0xc9, 0x75, 0xfa, 0xe6, 0x81], rounds: .max)
    _ = try vcpu.run()
    return try time(rounds) { () throws(AcceleratorError) in
      for _ in 0..<rounds {
        _ = try vcpu.completeExit()
        try twin.writeState(try vcpu.readState())
        _ = try twin.run()
        _ = try twin.completeExit()
        try vcpu.writeState(try twin.readState())
        _ = try vcpu.run()
      }
    }
  }
}
