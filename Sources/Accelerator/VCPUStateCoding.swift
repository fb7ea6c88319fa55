import StateTree

extension GeneralRegisters {
  /// All of them, in the order in which a vCPU's state has them.
  public func write(to writer: inout StateWriter) {
    for path in Self.fields { writer.write(self[keyPath: path]) }
  }

  /// Reads what `write` wrote.
  public init(from reader: inout StateReader) throws(StateError) {
    self.init()
    for path in Self.fields { self[keyPath: path] = try reader.read() }
  }
}

extension VCPUState {
  private static let versions: ClosedRange<UInt32> = 1...1

  /// The state as a node called `vcpu`, version 1.
  public func node(index: Int) -> StateNode {
    StateNode("vcpu\(index)", version: Self.versions.upperBound) { writer in
      general.write(to: &writer)
      for path in SystemRegisters.segments { writer.write(system[keyPath: path]) }
      for table in [system.gdt, system.idt] {
        writer.write(table.base)
        writer.write(table.limit)
      }
      for path in SystemRegisters.scalars { writer.write(system[keyPath: path]) }
      writer.write(extended)
      writer.write(xcr0)
      writer.write(UInt32(modelSpecific.count))
      for register in modelSpecific {
        writer.write(register.index)
        writer.write(register.value)
      }
      writer.write(localAPIC)
      events.encode(into: &writer)
      for address in debug.addresses { writer.write(address) }
      writer.write(debug.dr6)
      writer.write(debug.dr7)
      writer.write(activity.rawValue)
      writer.write(tscKilohertz)
    }
  }

  /// Reads what `node(index:)` wrote.
  public init(_ node: StateNode, index: Int) throws(StateError) {
    self = try node.read("vcpu\(index)", versions: Self.versions) { reader, _ throws(StateError) in
      var state = VCPUState()
      state.general = try GeneralRegisters(from: &reader)
      for path in SystemRegisters.segments { state.system[keyPath: path] = try SegmentRegister(from: &reader) }
      state.system.gdt = DescriptorTable(base: try reader.read(), limit: try reader.read())
      state.system.idt = DescriptorTable(base: try reader.read(), limit: try reader.read())
      for path in SystemRegisters.scalars { state.system[keyPath: path] = try reader.read() }
      state.extended = try reader.read(limit: 1 << 20)
      state.xcr0 = try reader.read()
      let count = try reader.read(UInt32.self)
      guard count <= 4096 else { throw reader.invalid("MSR count", UInt64(count)) }
      for _ in 0..<count {
        state.modelSpecific.append(ModelSpecificRegister(index: try reader.read(), value: try reader.read()))
      }
      state.localAPIC = try reader.read(limit: 4096)
      state.events = try PendingEvents(from: &reader)
      for slot in 0..<4 { state.debug.addresses[slot] = try reader.read() }
      state.debug.dr6 = try reader.read()
      state.debug.dr7 = try reader.read()
      let activity = try reader.read(UInt32.self)
      guard let known = ActivityState(rawValue: activity) else {
        throw reader.invalid("activity state", UInt64(activity))
      }
      state.activity = known
      state.tscKilohertz = try reader.read()
      return state
    }
  }
}

extension GeneralRegisters {
  /// The registers in the processor's numbering (RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8-R15), then RIP and RFLAGS.
  nonisolated(unsafe) public static let fields: [WritableKeyPath<GeneralRegisters, UInt64>] = [
    \.rax, \.rcx, \.rdx, \.rbx, \.rsp, \.rbp, \.rsi, \.rdi, \.r8, \.r9, \.r10, \.r11, \.r12, \.r13, \.r14, \.r15,
    \.rip, \.rflags,
  ]
}

extension SystemRegisters {
  nonisolated(unsafe) static let segments: [WritableKeyPath<SystemRegisters, SegmentRegister>] = [
    \.es, \.cs, \.ss, \.ds, \.fs, \.gs, \.ldt, \.tr,
  ]
  nonisolated(unsafe) static let scalars: [WritableKeyPath<SystemRegisters, UInt64>] = [
    \.cr0, \.cr2, \.cr3, \.cr4, \.cr8, \.efer, \.apicBase,
  ]
}

extension StateWriter {
  fileprivate mutating func write(_ segment: SegmentRegister) {
    write(segment.base)
    write(segment.limit)
    write(segment.selector)
    write(segment.attributes)
  }
}

extension SegmentRegister {
  fileprivate init(from reader: inout StateReader) throws(StateError) {
    self.init(
      base: try reader.read(), limit: try reader.read(), selector: try reader.read(), attributes: try reader.read())
  }
}

extension PendingEvents {
  fileprivate func encode(into writer: inout StateWriter) {
    writer.write(exceptionInjected)
    writer.write(exceptionPending)
    writer.write(exceptionVector)
    writer.write(exceptionHasErrorCode)
    writer.write(exceptionErrorCode)
    writer.write(exceptionPayload != nil)
    writer.write(exceptionPayload ?? 0)
    writer.write(interruptInjected)
    writer.write(interruptVector)
    writer.write(interruptIsSoftware)
    writer.write(interruptShadow)
    writer.write(nmiInjected)
    writer.write(nmiPending)
    writer.write(nmiMasked)
    writer.write(startupVector)
    writer.write(tripleFaultPending)
  }

  fileprivate init(from reader: inout StateReader) throws(StateError) {
    exceptionInjected = try reader.read()
    exceptionPending = try reader.read()
    exceptionVector = try reader.read()
    exceptionHasErrorCode = try reader.read()
    exceptionErrorCode = try reader.read()
    let hasPayload = try reader.read(Bool.self)
    let payload = try reader.read(UInt64.self)
    exceptionPayload = hasPayload ? payload : nil
    interruptInjected = try reader.read()
    interruptVector = try reader.read()
    interruptIsSoftware = try reader.read()
    interruptShadow = try reader.read()
    nmiInjected = try reader.read()
    nmiPending = try reader.read()
    nmiMasked = try reader.read()
    startupVector = try reader.read()
    tripleFaultPending = try reader.read()
  }
}
