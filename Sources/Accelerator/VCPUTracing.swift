/// What a vCPU did, for whoever traces it.
public enum VCPUTraceEvent {
  /// An instruction that has retired. A repeated string instruction may come more than once: each time it starts again.
  case instruction(rip: UInt64, bytes: InstructionBytes, text: String)
  /// An exception on its way to its handler; `rip` is where that returns to, `address` what CR2 holds for a page fault.
  case exception(vector: UInt8, errorCode: UInt32?, rip: UInt64, address: UInt64?)
  /// An interrupt that the processor has taken at `rip`, or an instruction there that stands for one.
  case interrupt(vector: UInt8, rip: UInt64, source: Origin)

  /// Where an interrupt came from.
  public enum Origin: String, Sendable {
    /// The local APIC or the PIC.
    case external
    /// A non-maskable interrupt.
    case nonMaskable = "nmi"
    /// INT n, INT3 or INTO.
    case software
  }
}

/// What of a vCPU's doing is traced.
public enum VCPUTraceKind: String, Sendable, CaseIterable {
  /// Every instruction.
  case instructions
  /// Every exception that is raised.
  case exceptions
  /// Every interrupt that is taken.
  case interrupts
}

/// Takes a vCPU's trace, on the vCPU's thread.
public protocol VCPUTracer: AnyObject, Sendable {
  /// Takes an event; `time` is virtual time in nanoseconds, where the machine has that.
  func record(_ event: VCPUTraceEvent, vcpu: Int, time: UInt64?)
}

extension VirtualCPU {
  /// Refused: what happens in the guest is not seen here.
  public func trace(_ kind: VCPUTraceKind, to tracer: any VCPUTracer) throws(AcceleratorError) {
    throw .unsupported(engine: "kvm", what: "traces of \(kind.rawValue)")
  }
}
