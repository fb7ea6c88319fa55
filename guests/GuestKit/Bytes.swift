import CGuest

/// Bytes of physical memory (identity mapped), such as a word of the command line or a table's signature.
struct Bytes {
  var address: UInt64
  var count: UInt64

  func forEach(_ body: (UInt8) -> Void) {
    var offset: UInt64 = 0
    while offset < count {
      body(load8(address &+ offset))
      offset &+= 1
    }
  }

  func starts(with text: StaticString) -> Bool {
    guard count >= text.utf8CodeUnitCount else { return false }
    for index in 0..<text.utf8CodeUnitCount {
      if load8(address &+ UInt64(index)) != text.utf8Start[index] { return false }
    }
    return true
  }

  func equals(_ text: StaticString) -> Bool { count == text.utf8CodeUnitCount && starts(with: text) }

  func dropping(_ prefix: Int) -> Bytes { Bytes(address: address &+ UInt64(prefix), count: count &- UInt64(prefix)) }

  /// The number the text begins with: decimal, or hexadecimal after 0x.
  var number: UInt64 {
    let hexadecimal = starts(with: "0x")
    let radix: UInt64 = hexadecimal ? 16 : 10
    var value: UInt64 = 0
    var offset: UInt64 = hexadecimal ? 2 : 0
    while offset < count {
      let byte = load8(address &+ offset)
      let digit: UInt8
      switch byte {
      case 48...57: digit = byte - 48
      case 97...102 where hexadecimal: digit = byte - 87
      default: return value
      }
      value = value &* radix &+ UInt64(digit)
      offset &+= 1
    }
    return value
  }
}
