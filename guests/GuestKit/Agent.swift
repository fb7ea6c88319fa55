import CGuest

/// The guest's end of the agent's channel (docs/agent.md): lines of JSON, sent and received.
final class Agent {
  private static let longestLine: UInt64 = 16384
  /// How often the port's interrupt has come.
  nonisolated(unsafe) private(set) static var interrupts: UInt64 = 0

  private let port: VirtioConsole
  private let outgoing = guest_allocate(longestLine, 16)
  private var outgoingCount: UInt64 = 0
  /// Bytes from the host that no line was made of yet.
  private let incoming = guest_allocate(longestLine * 2, 16)
  private var incomingCount: UInt64 = 0
  private let current = guest_allocate(longestLine, 16)
  private var nextID: UInt64 = 1

  init(vector: UInt8) {
    guard let function = VirtioConsole.function else {
      say("FAIL an agent's port: run with --agent")
      Power.fail()
    }
    set_interrupt_handler(vector) { _ in
      Agent.interrupts += 1
      LocalAPIC.endOfInterrupt()
    }
    port = VirtioConsole(function, port: "org.swiftvmm.agent.0", vector: vector)
    add(#"{"event": "hello", "version": 1, "agent": "GuestKit", "system": "swiftvmm sample guest"}"#)
    end()
  }

  // MARK: Sending

  func add(_ text: StaticString) {
    add(Bytes(address: UInt64(UInt(bitPattern: text.utf8Start)), count: UInt64(text.utf8CodeUnitCount)))
  }

  func add(_ text: Bytes) {
    var rest = text
    while rest.count > 0 {
      if outgoingCount == Self.longestLine { flush() }
      let count = min(rest.count, Self.longestLine - outgoingCount)
      copy_bytes(pointer(outgoing + outgoingCount), UnsafeRawPointer(pointer(rest.address)), Int(count))
      outgoingCount += count
      rest = rest.dropping(Int(count))
    }
  }

  func add(_ value: UInt64) {
    if value >= 10 { add(value / 10) }
    add(byte: UInt8(truncatingIfNeeded: value % 10) + 48)
  }

  private func add(byte: UInt8) {
    if outgoingCount == Self.longestLine { flush() }
    store8(outgoing + outgoingCount, byte)
    outgoingCount += 1
  }

  private func flush() {
    port.send(Bytes(address: outgoing, count: outgoingCount))
    outgoingCount = 0
  }

  /// Ends a line and sends it.
  func end() {
    add(byte: 10)
    flush()
  }

  /// Begins a request, whose members follow.
  ///
  /// - Returns: Its id.
  func request(_ name: StaticString) -> UInt64 {
    add(#"{"id": "#)
    add(nextID)
    add(#", "request": ""#)
    add(name)
    add("\"")
    nextID += 1
    return nextID - 1
  }

  // MARK: Receiving

  /// The next whole line; it holds until the next call.
  func line() -> Bytes? {
    while true {
      if let line = takeLine() { return line }
      let isAny = port.receive { bytes in
        // A host that sends longer lines than it may loses them.
        if incomingCount + bytes.count > Self.longestLine * 2 { incomingCount = 0 }
        copy_bytes(pointer(incoming + incomingCount), UnsafeRawPointer(pointer(bytes.address)), Int(bytes.count))
        incomingCount += bytes.count
      }
      if !isAny { return nil }
    }
  }

  private func takeLine() -> Bytes? {
    let end = scan_byte(incoming, 0, incomingCount, 10)
    if end == incomingCount { return nil }
    let count = min(end, Self.longestLine)
    copy_bytes(pointer(current), UnsafeRawPointer(pointer(incoming)), Int(count))
    incomingCount -= end + 1
    // Copied upwards, which a string instruction does in this order.
    copy_bytes(pointer(incoming), UnsafeRawPointer(pointer(incoming + end + 1)), Int(incomingCount))
    return Bytes(address: current, count: count)
  }

  private func pointer(_ address: UInt64) -> UnsafeMutableRawPointer {
    UnsafeMutableRawPointer(bitPattern: UInt(address))!
  }
}

extension Bytes {
  /// The value of the first member of this name in a line of JSON, without a text's quotation marks; its escapes stay.
  func member(_ key: StaticString) -> Bytes? {
    let length = UInt64(key.utf8CodeUnitCount)
    let initial = key.utf8Start[0]
    var start: UInt64 = 0
    while true {
      start = scan_byte(address, start, count, 34)
      if start + length + 3 >= count { return nil }
      if load8(address + start + 1) != initial {
        start += 1
        continue
      }
      let rest = Bytes(address: address + start + 1, count: count - start - 1)
      if rest.starts(with: key), load8(rest.address + length) == 34, load8(rest.address + length + 1) == 58 {
        return rest.dropping(Int(length) + 2).value
      }
      start += 1
    }
  }

  private var value: Bytes {
    var start: UInt64 = 0
    while start < count && load8(address + start) == 32 { start += 1 }
    let isText = start < count && load8(address + start) == 34
    if isText { start += 1 }
    var end = start
    if isText {
      end = scan_byte(address, start, count, 34)
    } else {
      while end < count && load8(address + end) != 44 && load8(address + end) | 32 != 125 { end += 1 }
    }
    return Bytes(address: address + start, count: end - start)
  }

  func equals(_ other: Bytes) -> Bool {
    if count != other.count { return false }
    for offset in 0..<count where load8(address + offset) != load8(other.address + offset) { return false }
    return true
  }
}
