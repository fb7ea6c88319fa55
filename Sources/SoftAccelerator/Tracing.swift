import Accelerator
import CSoftCPU
import X86

/// Who is told what the CPU does; nobody, as a rule.
struct Tracers {
  var instructions: (any VCPUTracer)?
  var exceptions: (any VCPUTracer)?
  var interrupts: (any VCPUTracer)?
}

/// Traces. They stand where no block is executed: instructions that are traced go one by one, and events are rare.
extension Processor {
  /// Tells `tracer` of everything of a kind from now on.
  func trace(_ kind: VCPUTraceKind, to tracer: any VCPUTracer) {
    switch kind {
    case .instructions:
      tracers.instructions = tracer
      tracesInstructions = true
    case .exceptions: tracers.exceptions = tracer
    case .interrupts: tracers.interrupts = tracer
    }
  }

  private var traceTime: UInt64? { isDeterministic ? timeSource.read(timeSource.context) : nil }

  /// Called for an instruction that is done, before it counts.
  func traceInstruction(_ instruction: Instruction, at ip: UInt64) {
    guard let tracer = tracers.instructions else { return }
    let bytes = InstructionBytes(low: fetchedBytes.0, high: fetchedBytes.1, count: instruction.length)
    tracer.record(
      .instruction(rip: ip, bytes: bytes, text: instruction.text(at: ip)), vcpu: number, time: traceTime)
  }

  func traceException(_ vector: ExceptionVector, _ event: Event) {
    tracers.exceptions?.record(
      .exception(
        vector: vector.rawValue, errorCode: event.errorCode, rip: event.returnIP,
        address: vector == .pageFault ? cpu.pointee.cr2 : nil), vcpu: number, time: traceTime)
  }

  func traceInterrupt(_ vector: UInt8, at ip: UInt64, _ source: VCPUTraceEvent.Origin) {
    tracers.interrupts?.record(.interrupt(vector: vector, rip: ip, source: source), vcpu: number, time: traceTime)
  }
}
