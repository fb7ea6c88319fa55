import Accelerator
import Machine
import StateTree

/// What keeps a machine from going on in another engine, or in the same one on another host.
extension MachineDescription {
  /// What this machine has that the one here cannot give it, in the order of importance; empty where it can go on.
  func lacks(_ here: MachineDescription) -> [String] {
    guard let processor, let there = here.processor else { return [] }
    var lacks: [String] = []
    if processor.model != there.model { lacks.append("--cpu \(processor.model) (not \(there.model))") }
    lacks += CPUFeatures(processor.cpuid).missing(in: CPUFeatures(there.cpuid))
    if !there.isCounterScaled, !processor.agreesInRate(with: there) {
      lacks.append("a time-stamp counter of \(processor.counterKilohertz) kHz (not \(there.counterKilohertz))")
    }
    // Local APICs are translated; a PIT and PIC of the kernel's are not.
    let inKernel = "\(InterruptControllerModel.inKernel)"
    if controllers != here.controllers, controllers == inKernel || here.controllers == inKernel {
      lacks.append("interrupt controllers \(controllers) (not \(here.controllers); use --kernel-irqchip split or off)")
    }
    if engine != here.engine, !hardening.isEmpty { lacks.append("--harden by engine \(engine)") }
    return lacks
  }
}

extension MachineDescription.Processor {
  private static let mostLeaves = 256

  /// As QEMU has it, 250 millionths are no difference.
  func agreesInRate(with other: Self) -> Bool {
    let (own, other) = (UInt64(counterKilohertz), UInt64(other.counterKilohertz))
    return own == 0 || other == 0 || max(own, other) - min(own, other) <= other / 4000
  }

  init(_ reader: inout StateReader) throws(StateError) {
    model = try reader.readString(limit: 64)
    counterKilohertz = try reader.read()
    cpuid = []
    let count = try reader.read(UInt32.self)
    guard count <= Self.mostLeaves else { throw reader.invalid("CPUID leaves", UInt64(count)) }
    for _ in 0..<count {
      let (function, index) = (try reader.read(UInt32.self), try reader.read(UInt32.self))
      let hasIndex = try reader.read(Bool.self)
      cpuid.append(
        CPUIDLeaf(
          function: function, index: index, hasIndex: hasIndex, eax: try reader.read(), ebx: try reader.read(),
          ecx: try reader.read(), edx: try reader.read()))
    }
  }

  func write(to writer: inout StateWriter) {
    writer.write(model)
    writer.write(counterKilohertz)
    writer.write(UInt32(cpuid.count))
    for leaf in cpuid {
      writer.write(leaf.function)
      writer.write(leaf.index)
      writer.write(leaf.hasIndex)
      for register in [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] { writer.write(register) }
    }
  }
}
