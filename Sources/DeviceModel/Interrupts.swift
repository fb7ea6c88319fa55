import Synchronization

/// What carries interrupts to the vCPUs.
public protocol InterruptSink: AnyObject, Sendable {
  /// Drives a global system interrupt.
  func setInterruptLine(_ gsi: UInt32, level: Bool)
  /// Sends a message-signalled interrupt.
  func signalMSI(address: UInt64, data: UInt32)
}

/// One interrupt input, which several devices may share: it is up while any of them holds it up.
public final class InterruptLine: Sendable {
  /// The global system interrupt it drives.
  public let gsi: UInt32
  private let sink: any InterruptSink
  private let holders = Mutex<UInt64>(0)
  private let sources = Atomic<Int>(0)

  /// A line that nobody holds up.
  public init(gsi: UInt32, sink: any InterruptSink) {
    self.gsi = gsi
    self.sink = sink
  }

  /// A device's own end of the line; at most 64 on one line.
  public func makeSource() -> Source {
    let index = sources.wrappingAdd(1, ordering: .relaxed).oldValue
    precondition(index < 64, "more than 64 devices on one interrupt line")
    return Source(line: self, bit: 1 << UInt64(index))
  }

  fileprivate func set(bit: UInt64, level: Bool) {
    // The sink is called under the lock, so that the levels it sees are in the order in which they were set.
    holders.withLock { holders in
      let before = holders != 0
      holders = level ? holders | bit : holders & ~bit
      if (holders != 0) != before { sink.setInterruptLine(gsi, level: !before) }
    }
  }

  /// One device's end of an interrupt line.
  public struct Source: Sendable {
    private let line: InterruptLine
    private let bit: UInt64

    fileprivate init(line: InterruptLine, bit: UInt64) {
      self.line = line
      self.bit = bit
    }

    /// Holds the line up or lets it go.
    public func set(_ level: Bool) {
      line.set(bit: bit, level: level)
    }

    /// A rising edge and the fall after it.
    public func pulse() {
      set(true)
      set(false)
    }
  }
}
