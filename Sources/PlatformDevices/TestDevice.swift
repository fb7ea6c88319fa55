import DeviceModel
import StateTree
import Synchronization

/// QEMU's pc-testdev, which kvm-unit-tests expect: ports that raise interrupt lines, a port that gives back what was
/// written, and memory that is reached through the VMM. Not for ordinary guests.
public final class TestDevice: PlatformDevice {
  /// Interrupt lines from port 0x2000 on.
  public static let interrupts: Range<UInt32> = 0..<24

  private static let echoOffset: UInt64 = 0
  private static let flushOffset: UInt64 = 4
  private static let linesOffset: UInt64 = 0x2000
  private static let memoryOffset: UInt64 = 0x1_0000
  private static let memorySize: UInt64 = 0x1_0000

  /// `test-device`.
  public let name = "test-device"
  /// The echo port, the flush port (without effect: nothing is cached), the lines, and the memory.
  public let windows: [BusWindow] = [
    .ports(0xe0, size: 4, offset: echoOffset), .ports(0xe4, size: 4, offset: flushOffset),
    .ports(0x2000, size: UInt64(interrupts.count), offset: linesOffset),
    .memory(0xff00_0000, size: memorySize, offset: memoryOffset),
  ]
  private let lines: [InterruptLine.Source]
  private let state = Mutex(State())

  private struct State {
    var echo: UInt32 = 0
    var levels: UInt32 = 0
    var memory = [UInt8](repeating: 0, count: Int(memorySize))
  }

  /// A device with a line for each of `interrupts`.
  public init(lines: [InterruptLine.Source]) {
    precondition(lines.count == Self.interrupts.count, "a line for each interrupt")
    self.lines = lines
  }

  /// The echo, or memory; the lines and the flush port read as 0.
  public func read(offset: UInt64, size: Int) -> UInt64 {
    state.withLock { state in
      switch offset {
      case Self.memoryOffset...:
        readBytes(offset - Self.memoryOffset, size, end: Self.memorySize) { state.memory[Int($0)] }
      case ..<Self.flushOffset: UInt64(state.echo) >> (offset * 8)
      default: 0
      }
    }
  }

  /// The echo, memory, or the level of a line.
  public func write(offset: UInt64, size: Int, value: UInt64) {
    state.withLock { state in
      switch offset {
      case Self.memoryOffset...:
        writeBytes(offset - Self.memoryOffset, size, value, end: Self.memorySize) { state.memory[Int($0)] = $1 }
      case Self.linesOffset..<Self.linesOffset + UInt64(Self.interrupts.count):
        let index = UInt32(offset - Self.linesOffset)
        state.levels = value != 0 ? state.levels | 1 << index : state.levels & ~(1 << index)
        lines[Int(index)].set(value != 0)
      case ..<Self.flushOffset:
        writeBytes(offset, size, value, end: Self.flushOffset) { offset, byte in
          let shift = UInt32(offset) * 8
          state.echo = state.echo & ~(0xff << shift) | UInt32(byte) << shift
        }
      default: break
      }
    }
  }

  /// The state after power-on: every line down.
  public func reset() {
    replace(State())
  }

  private func replace(_ replacement: State) {
    state.withLock { state in
      state = replacement
      for (index, line) in lines.enumerated() { line.set(state.levels >> UInt32(index) & 1 == 1) }
    }
  }

  /// Version 1.
  public func save() -> StateNode {
    let state = state.withLock { $0 }
    return StateNode(name, version: 1) { writer in
      writer.write(state.echo)
      writer.write(state.levels)
      writer.write(state.memory)
    }
  }

  /// Puts lines and memory back.
  public func restore(_ node: StateNode) throws(StateError) {
    let restored = try node.read(name, versions: 1...1) { reader, _ throws(StateError) in
      let (echo, levels) = (try reader.read(UInt32.self), try reader.read(UInt32.self))
      let memory = try reader.read(limit: Int(Self.memorySize))
      guard memory.count == Int(Self.memorySize) else { throw reader.invalid("size", UInt64(memory.count)) }
      return State(echo: echo, levels: levels, memory: memory)
    }
    replace(restored)
  }
}
