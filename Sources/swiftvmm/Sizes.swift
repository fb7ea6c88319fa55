/// A number of bytes with an optional suffix K, M, G or T (powers of 1024), as `--memory` takes it.
func parseSize(_ text: String, option: String) throws(Failure) -> UInt64 {
  let shifts: [Character: UInt64] = ["K": 10, "k": 10, "M": 20, "m": 20, "G": 30, "g": 30, "T": 40, "t": 40]
  let shift = text.last.flatMap { shifts[$0] }
  let digits = shift == nil ? Substring(text) : text.dropLast()
  guard let number = UInt64(digits), number <= UInt64.max >> (shift ?? 0), number > 0 else {
    throw .badSize(option: option, value: text)
  }
  return number << (shift ?? 0)
}

/// Hexadecimal with 0x, or decimal.
func parseAddress(_ text: String, option: String) throws(Failure) -> UInt64 {
  let value = text.hasPrefix("0x") ? UInt64(text.dropFirst(2), radix: 16) : UInt64(text)
  guard let value else { throw .badValue(option: option, value: text, expected: "an address such as 0x100000") }
  return value
}
