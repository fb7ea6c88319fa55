import CGuest

/// COM1, a polled 16550. Lines are gathered and sent in bursts: where each access is an exit, asking the UART before every
/// byte would double the price.
enum Console {
  private static let port: UInt16 = 0x3f8
  nonisolated(unsafe) private static var burst = 1
  nonisolated(unsafe) private static var gathered = 0
  nonisolated(unsafe) private static var line = InlineArray<256, UInt8>(repeating: 0)

  static func begin() {
    outb(port + 1, 0x00)
    outb(port + 3, 0x80)
    outb(port, 1)
    outb(port + 1, 0)
    outb(port + 3, 0x03)
    outb(port + 2, 0x07)
    outb(port + 4, 0x03)
    if inb(port + 2) & 0xc0 == 0xc0 { burst = 16 }
  }

  static func write(_ byte: UInt8) {
    line[gathered] = byte
    gathered += 1
    if byte == 10 || gathered == 256 { flush() }
  }

  static func write(_ text: StaticString) {
    let count = text.utf8CodeUnitCount
    if count > 256 - gathered { flush() }
    var left = count
    var from = text.utf8Start
    while left > 0 {
      let part = min(left, 256 - gathered)
      withUnsafeMutablePointer(to: &line) { copy_bytes(UnsafeMutableRawPointer($0) + gathered, from, part) }
      gathered += part
      from += part
      left -= part
      if gathered == 256 { flush() }
    }
  }

  static func flush() {
    var sent = 0
    while sent < gathered {
      while inb(port + 5) & 0x20 == 0 { cpu_pause() }
      let count = min(burst, gathered - sent)
      withUnsafePointer(to: &line) { outsb(port, UnsafeRawPointer($0) + sent, count) }
      sent += count
    }
    gathered = 0
  }

  /// Waits until the last bit has left: a machine that is switched off takes what is left with it.
  static func drain() {
    flush()
    while inb(port + 5) & 0x40 == 0 { cpu_pause() }
  }

  static func write(decimal value: UInt64) {
    if value >= 10 { write(decimal: value / 10) }
    write(UInt8(truncatingIfNeeded: value % 10) + 48)
  }

  static func write(hex value: UInt64) {
    var shift: UInt64 = 60
    while shift > 0 && value >> shift == 0 { shift -= 4 }
    while true {
      let digit = UInt8(truncatingIfNeeded: value >> shift & 15)
      write(digit < 10 ? digit + 48 : digit + 87)
      if shift == 0 { return }
      shift -= 4
    }
  }
}

/// A text that is on the console as soon as it is evaluated: interpolation without strings, arrays or a heap.
struct ConsoleText: ExpressibleByStringInterpolation {
  init(stringLiteral text: StaticString) { Console.write(text) }
  init(stringInterpolation: Pieces) {}

  struct Pieces: StringInterpolationProtocol {
    init(literalCapacity: Int, interpolationCount: Int) {}
    func appendLiteral(_ text: StaticString) { Console.write(text) }
    func appendInterpolation(_ text: StaticString) { Console.write(text) }
    func appendInterpolation(_ text: Bytes) { text.forEach { Console.write($0) } }
    func appendInterpolation(_ value: some FixedWidthInteger & UnsignedInteger) {
      Console.write(decimal: UInt64(truncatingIfNeeded: value))
    }
    func appendInterpolation(_ value: Int) {
      if value < 0 { Console.write(45) }
      Console.write(decimal: value.magnitude.asUInt64)
    }
    /// Hexadecimal with a 0x prefix.
    func appendInterpolation(hex value: some FixedWidthInteger) {
      Console.write("0x")
      Console.write(hex: UInt64(truncatingIfNeeded: value))
    }
  }
}

extension UInt {
  var asUInt64: UInt64 { UInt64(truncatingIfNeeded: self) }
}

/// Prints one line.
@inline(never)
func say(_ text: ConsoleText) { Console.write(10) }

/// Prints without ending the line.
@inline(never)
func sayPart(_ text: ConsoleText) {}
