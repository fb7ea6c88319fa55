import Accelerator
import StateTree

/// What lets a saved machine go on in another engine: a node beside the engine's own, and what is done to its vCPUs' states.
struct EngineChange {
  static let nodeName = "portable"

  /// Nanoseconds of the paravirtual clock.
  var clock: UInt64
  /// By vCPU: registers of the engine alone that the guest has changed, so that they matter.
  var changed: [[UInt32]]

  var node: StateNode {
    StateNode(Self.nodeName, version: 1) { writer in
      writer.write(clock)
      writer.write(UInt32(changed.count))
      for indices in changed {
        writer.write(UInt32(indices.count))
        for index in indices { writer.write(index) }
      }
    }
  }

  init(clock: UInt64, changed: [[UInt32]]) {
    self.clock = clock
    self.changed = changed
  }

  init(_ node: StateNode) throws(StateError) {
    self = try node.read(Self.nodeName, versions: 1...1) { reader, _ throws(StateError) in
      let clock = try reader.read(UInt64.self)
      var changed: [[UInt32]] = []
      for _ in 0..<(try reader.read(UInt32.self)) {
        var indices: [UInt32] = []
        for _ in 0..<(try reader.read(UInt32.self)) { indices.append(try reader.read()) }
        changed.append(indices)
      }
      return EngineChange(clock: clock, changed: changed)
    }
  }

  /// The engine's own registers in `state` that are not as after reset.
  static func changed(_ state: VCPUState, since reset: VCPUState) -> [UInt32] {
    let before = Dictionary(reset.modelSpecific.map { ($0.index, $0.value) }) { first, _ in first }
    return state.modelSpecific.filter { !portable.contains($0.index) && $0.value != before[$0.index] }.map(\.index)
  }

  /// Makes the state of vCPU `index` one of an engine whose vCPUs have the state `reset` after reset and these components of
  /// the extended state. Returns what of it that engine has not.
  func adapt(_ state: inout VCPUState, index: Int, to reset: VCPUState, components: UInt64) -> [String] {
    var lost = index < changed.count ? changed[index].map { Self.name($0) } : []
    state.modelSpecific.removeAll { !Self.portable.contains($0.index) }
    // x87 and SSE are everywhere.
    let known = components | 3
    let enabled = state.xcr0 & ~known
    lost += (0..<63).filter { enabled >> UInt64($0) & 1 != 0 }.map { "xsave component \($0)" }
    // What both have lies at the same places, and behind it there is nothing.
    let size = reset.extended.count
    state.extended = Array(state.extended.prefix(size))
    state.extended += [UInt8](repeating: 0, count: size - state.extended.count)
    // XSTATE_BV (SDM vol. 1, 13.4.2): what the guest has not enabled is the host's.
    for index in 0..<min(8, max(0, size - 512)) {
      state.extended[512 + index] &= UInt8(truncatingIfNeeded: known >> UInt64(index * 8))
    }
    return lost
  }

  private static func name(_ register: UInt32) -> String {
    switch register {
    case 0x11, 0x12, 0x4b56_4d00...0x4b56_4d01: "kvmclock (MSR 0x\(String(register, radix: 16)))"
    default: "MSR 0x\(String(register, radix: 16))"
    }
  }

  /// Registers that every engine has, as far as the guest's CPUID has them (SDM vol. 4): the time-stamp counter with its
  /// adjustment, deadline and number, SPEC_CTRL, SYSENTER, MISC_ENABLE, DEBUGCTL, PAT, MTRRs, XSS, SYSCALL, GS.
  private static let portable: Set<UInt32> = Set(
    [
      0x10, 0x3b, 0x6e0, 0xc000_0103, 0x48, 0x174, 0x175, 0x176, 0x1a0, 0x1d9, 0x277, 0x250, 0x258, 0x259, 0x2ff, 0xda0,
      0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0102,
    ] + (0x200...0x20f) + (0x268...0x26f))
}

extension VCPUState {
  /// IA32_TSC_DEADLINE; 0 where the timer is not armed by it, or the local APIC is apart.
  var timestampDeadline: UInt64 {
    get { modelSpecific.first { $0.index == 0x6e0 }?.value ?? 0 }
    set {
      modelSpecific.removeAll { $0.index == 0x6e0 }
      modelSpecific.append(ModelSpecificRegister(index: 0x6e0, value: newValue))
    }
  }
}
