import Accelerator
import GuestMemory
import Host
import KVMAccelerator

/// Guest loops that do nothing but leave the guest, run in this process: what one exit costs without any device.
struct ExitLoop {
  enum Kind: String, CaseIterable {
    case portOut = "pio-out"
    case portIn = "pio-in"
    case memoryWrite = "mmio-write"
    case memoryRead = "mmio-read"
    case doorbell = "ioeventfd-pio"
    case nothing = "empty-loop"
  }

  /// Nanoseconds a round of the loop: the access, a decrement and a jump.
  static func measure(_ kind: Kind, rounds: UInt64) throws(AcceleratorError) -> Double {
    let base = GuestPhysicalAddress(0)
    guard let range = GuestRange(start: base, size: 1 << 20) else { return .nan }
    let (memory, notifier): (GuestMemory, Notifier)
    do {
      memory = try GuestMemory([range])
      notifier = Notifier(notifier: try EventNotifier())
      try memory.write(code(kind), to: GuestPhysicalAddress(0x1000))
    } catch {
      throw .unsupported(engine: "kvm", what: "\(error)")
    }
    let machine = try KVMAccelerator().makeVirtualMachine(memory: memory, interrupts: .inKernel)
    try machine.setMemorySlot(MemorySlot(number: 0, range: range, hostBase: memory.regions[0].hostBase))
    if kind == .doorbell {
      try machine.attachDoorbell(
        Doorbell(space: .port, address: 0x80, size: 1), eventDescriptor: notifier.notifier.descriptor.rawValue)
    }
    let vcpu = try machine.makeVCPU(index: 0, cpuid: [])
    var system = try vcpu.readSystemRegisters()
    system.cs = .code32(selector: 8)
    for path in [\SystemRegisters.ds, \.es, \.fs, \.gs, \.ss] { system[keyPath: path] = .data(selector: 16) }
    system.cr0 |= 1
    try vcpu.writeSystemRegisters(system)
    var general = GeneralRegisters()
    general.rip = 0x1000
    general.rcx = rounds
    general.rbx = 0x1000_0000
    try vcpu.writeRegisters(general)
    let start = monotonicNanoseconds()
    while true {
      if case .portIO(let access) = try vcpu.run(), access.port == 0x81 { break }
    }
    return Double(monotonicNanoseconds() - start) / Double(rounds)
  }

  /// A notifier cannot be initialised in one branch alone; a reference to one can.
  private final class Notifier {
    let notifier: EventNotifier
    init(notifier: consuming EventNotifier) { self.notifier = notifier }
  }

  /// 32-bit code: the access; `dec ecx`; `jnz` back; `out 0x81, al`.
  private static func code(_ kind: Kind) -> [UInt8] {
    let access: [UInt8] =
      switch kind {
      case .portOut, .doorbell: [0xe6, 0x80]
      case .portIn: [0xe4, 0x80]
      case .memoryWrite: [0x89, 0x03]
      case .memoryRead: [0x8b, 0x03]
      case .nothing: []
      }
    return access + [0x49, 0x75, UInt8(truncatingIfNeeded: -(access.count + 3)), 0xe6, 0x81]
  }
}
