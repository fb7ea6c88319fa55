/// Ed25519 signatures (RFC 8032, 5.1). Not in constant time: what signs is a tool on its user's own machine, and what
/// verifies knows no secret.
public enum Ed25519 {
  /// Bytes of a secret key, a public key and a signature.
  public static let secretSize = 32
  /// See `secretSize`.
  public static let publicSize = 32
  /// See `secretSize`.
  public static let signatureSize = 64

  /// The public key of a secret one; `secret` has 32 bytes.
  public static func publicKey(_ secret: [UInt8]) -> [UInt8] {
    (EdwardsPoint.base * expand(secret).scalar).encoded
  }

  /// The signature of a message: 64 bytes.
  public static func sign(_ message: [UInt8], secret: [UInt8]) -> [UInt8] {
    let (scalar, prefix) = expand(secret)
    let key = (EdwardsPoint.base * scalar).encoded
    let nonce = EdwardsScalar(reducing: SHA512.digest(prefix, message))
    let point = (EdwardsPoint.base * nonce).encoded
    let challenge = EdwardsScalar(reducing: SHA512.digest(point, key, message))
    return point + nonce.adding(challenge, times: scalar).encoded
  }

  /// Whether the signature is the message's by the key; false for anything malformed.
  public static func verify(_ signature: [UInt8], _ message: [UInt8], key: [UInt8]) -> Bool {
    guard signature.count == signatureSize, key.count == publicSize, let holder = EdwardsPoint(decoding: key),
      let response = EdwardsScalar(canonical: Array(signature[32...]))
    else { return false }
    let point = Array(signature[..<32])
    let challenge = EdwardsScalar(reducing: SHA512.digest(point, key, message))
    return (EdwardsPoint.base * response + holder.negated * challenge).encoded == point
  }

  private static func expand(_ secret: [UInt8]) -> (scalar: EdwardsScalar, prefix: [UInt8]) {
    var hash = SHA512.digest(secret)
    hash[0] &= 0xf8
    hash[31] = hash[31] & 0x7f | 0x40
    return (EdwardsScalar(reducing: Array(hash[..<32])), Array(hash[32...]))
  }
}

/// A number modulo the order of the base point, 2^252 + 27742317777372353535851937790883648493.
private struct EdwardsScalar {
  /// Little-endian.
  let words: [UInt64]
  private static let order: [UInt64] = [0x5812_631a_5cf5_d3ed, 0x14de_f9de_a2f7_9cd6, 0, 0x1000_0000_0000_0000]

  /// The remainder of a little-endian number, bit by bit.
  init(reducing bytes: [UInt8]) {
    var rest: [UInt64] = [0, 0, 0, 0]
    for byte in bytes.reversed() {
      for bit in (0..<8).reversed() {
        for index in (1..<4).reversed() { rest[index] = rest[index] << 1 | rest[index - 1] >> 63 }
        rest[0] = rest[0] << 1 | UInt64(byte >> UInt8(bit) & 1)
        if !Self.isLess(rest, Self.order) { rest = Self.subtract(rest, Self.order) }
      }
    }
    words = rest
  }

  /// A number that is below the order already.
  init?(canonical bytes: [UInt8]) {
    var words: [UInt64] = [0, 0, 0, 0]
    for (position, byte) in bytes.enumerated() { words[position / 8] |= UInt64(byte) << UInt64(position % 8 * 8) }
    guard Self.isLess(words, Self.order) else { return nil }
    self.words = words
  }

  var encoded: [UInt8] { words.flatMap { word in (0..<8).map { UInt8(truncatingIfNeeded: word >> UInt64($0 * 8)) } } }

  /// self + a * b.
  func adding(_ a: EdwardsScalar, times b: EdwardsScalar) -> EdwardsScalar {
    var product = words + [0, 0, 0, 0, 0]
    for i in 0..<4 {
      var carry: UInt64 = 0
      for j in 0..<4 {
        let (high, low) = a.words[i].multipliedFullWidth(by: b.words[j])
        let sum = UInt128(high) << 64 + UInt128(low) + UInt128(product[i + j]) + UInt128(carry)
        product[i + j] = UInt64(truncatingIfNeeded: sum)
        carry = UInt64(truncatingIfNeeded: sum >> 64)
      }
      var position = i + 4
      while carry != 0 {
        let (sum, overflow) = product[position].addingReportingOverflow(carry)
        product[position] = sum
        carry = overflow ? 1 : 0
        position += 1
      }
    }
    return EdwardsScalar(
      reducing: product.flatMap { word in (0..<8).map { UInt8(truncatingIfNeeded: word >> UInt64($0 * 8)) } })
  }

  private static func isLess(_ a: [UInt64], _ b: [UInt64]) -> Bool {
    for index in (0..<4).reversed() where a[index] != b[index] { return a[index] < b[index] }
    return false
  }

  private static func subtract(_ a: [UInt64], _ b: [UInt64]) -> [UInt64] {
    var result = a
    var borrow = false
    for index in 0..<4 {
      let (first, one) = a[index].subtractingReportingOverflow(b[index])
      let (second, two) = first.subtractingReportingOverflow(borrow ? 1 : 0)
      result[index] = second
      borrow = one || two
    }
    return result
  }
}

/// A point of edwards25519 in extended coordinates (RFC 8032, 5.1.4).
private struct EdwardsPoint {
  var x: FieldElement
  var y: FieldElement
  var z: FieldElement
  var t: FieldElement

  static let base: EdwardsPoint = {
    // y is 4/5; there is such a point.
    let y = FieldElement(4) * FieldElement(5).inverted
    return EdwardsPoint(y: y, isOdd: false) ?? neutral
  }()
  private static let neutral = EdwardsPoint(
    x: FieldElement(0), y: FieldElement(1), z: FieldElement(1), t: FieldElement(0))
  /// -121665/121666.
  private static let d = FieldElement(0) - FieldElement(121_665) * FieldElement(121_666).inverted
  private static let twiceD = d + d

  private init(x: FieldElement, y: FieldElement, z: FieldElement, t: FieldElement) {
    (self.x, self.y, self.z, self.t) = (x, y, z, t)
  }

  /// The point with a y (RFC 8032, 5.1.3); nil where there is none.
  private init?(y: FieldElement, isOdd: Bool) {
    let square = y * y
    let ratio = (square - FieldElement(1)) * (Self.d * square + FieldElement(1)).inverted
    var x = ratio.raisedToRootPower
    if x * x != ratio { x = x * FieldElement.rootOfMinusOne }
    guard x * x == ratio else { return nil }
    if x == FieldElement(0), isOdd { return nil }
    if x.isOdd != isOdd { x = FieldElement(0) - x }
    self.init(x: x, y: y, z: FieldElement(1), t: x * y)
  }

  /// 32 bytes: y, and x's lowest bit in the highest one.
  init?(decoding bytes: [UInt8]) {
    var plain = bytes
    plain[31] &= 0x7f
    let y = FieldElement(plain)
    guard y.encoded == plain else { return nil }
    self.init(y: y, isOdd: bytes[31] & 0x80 != 0)
  }

  var encoded: [UInt8] {
    let inverse = z.inverted
    var bytes = (y * inverse).encoded
    if (x * inverse).isOdd { bytes[31] |= 0x80 }
    return bytes
  }

  var negated: EdwardsPoint { EdwardsPoint(x: FieldElement(0) - x, y: y, z: z, t: FieldElement(0) - t) }

  static func + (p: EdwardsPoint, q: EdwardsPoint) -> EdwardsPoint {
    let a = (p.y - p.x) * (q.y - q.x)
    let b = (p.y + p.x) * (q.y + q.x)
    let c = p.t * twiceD * q.t
    let d = (p.z + p.z) * q.z
    let (e, f, g, h) = (b - a, d - c, d + c, b + a)
    return EdwardsPoint(x: e * f, y: g * h, z: f * g, t: e * h)
  }

  static func * (point: EdwardsPoint, scalar: EdwardsScalar) -> EdwardsPoint {
    var result = neutral
    for word in scalar.words.reversed() {
      for bit in (0..<64 as Range<UInt64>).reversed() {
        result = result + result
        if word >> bit & 1 != 0 { result = result + point }
      }
    }
    return result
  }
}

/// A number modulo 2^255 - 19, in five limbs of 51 bits, each a little more at times.
private struct FieldElement: Equatable {
  var a: UInt64
  var b: UInt64
  var c: UInt64
  var d: UInt64
  var e: UInt64

  private static let mask: UInt64 = 1 << 51 &- 1
  /// (p - 1) / 4, (p + 3) / 8 and p - 2 are this many ones above a few low bits.
  static let rootOfMinusOne = FieldElement(2).raised(low: 0xfb, bits: 253)

  init(_ small: UInt64) { (a, b, c, d, e) = (small, 0, 0, 0, 0) }

  private init(_ a: UInt64, _ b: UInt64, _ c: UInt64, _ d: UInt64, _ e: UInt64) {
    (self.a, self.b, self.c, self.d, self.e) = (a, b, c, d, e)
  }

  /// 32 bytes, little-endian; bit 255 is clear.
  init(_ bytes: [UInt8]) {
    func limb(_ number: Int) -> UInt64 {
      var value: UInt64 = 0
      for bit in 0..<51 {
        let position = number * 51 + bit
        value |= UInt64(bytes[position / 8] >> UInt8(position % 8) & 1) << UInt64(bit)
      }
      return value
    }
    self.init(limb(0), limb(1), limb(2), limb(3), limb(4))
  }

  /// The smallest representative.
  private var canonical: FieldElement {
    var x = carried.carried
    // Whether x + 19 reaches 2^255.
    var q = (x.a &+ 19) >> 51
    q = (x.b &+ q) >> 51
    q = (x.c &+ q) >> 51
    q = (x.d &+ q) >> 51
    q = (x.e &+ q) >> 51
    x.a &+= 19 &* q
    x.b &+= x.a >> 51
    x.c &+= x.b >> 51
    x.d &+= x.c >> 51
    x.e &+= x.d >> 51
    return FieldElement(
      x.a & Self.mask, x.b & Self.mask, x.c & Self.mask, x.d & Self.mask, x.e & Self.mask)
  }

  var encoded: [UInt8] {
    let x = canonical
    let limbs = [x.a, x.b, x.c, x.d, x.e]
    var bytes = [UInt8](repeating: 0, count: 32)
    for position in 0..<255 where limbs[position / 51] >> UInt64(position % 51) & 1 != 0 {
      bytes[position / 8] |= 1 << UInt8(position % 8)
    }
    return bytes
  }

  var isOdd: Bool { canonical.a & 1 != 0 }

  private var carried: FieldElement {
    var x = self
    x.b &+= x.a >> 51
    x.c &+= x.b >> 51
    x.d &+= x.c >> 51
    x.e &+= x.d >> 51
    return FieldElement(
      x.a & Self.mask &+ 19 &* (x.e >> 51), x.b & Self.mask, x.c & Self.mask, x.d & Self.mask, x.e & Self.mask)
  }

  static func == (x: FieldElement, y: FieldElement) -> Bool {
    let (p, q) = (x.canonical, y.canonical)
    return p.a == q.a && p.b == q.b && p.c == q.c && p.d == q.d && p.e == q.e
  }

  static func + (x: FieldElement, y: FieldElement) -> FieldElement {
    FieldElement(x.a &+ y.a, x.b &+ y.b, x.c &+ y.c, x.d &+ y.d, x.e &+ y.e).carried
  }

  /// 4p is added first, so that no limb goes below zero.
  static func - (x: FieldElement, y: FieldElement) -> FieldElement {
    let low: UInt64 = 4 &* (mask &- 18)
    let high: UInt64 = 4 &* mask
    return FieldElement(
      x.a &+ low &- y.a, x.b &+ high &- y.b, x.c &+ high &- y.c, x.d &+ high &- y.d, x.e &+ high &- y.e
    ).carried
  }

  static func * (x: FieldElement, y: FieldElement) -> FieldElement {
    func product(_ p: UInt64, _ q: UInt64) -> UInt128 {
      let (high, low) = p.multipliedFullWidth(by: q)
      return UInt128(truncatingIfNeeded: high) << 64 | UInt128(truncatingIfNeeded: low)
    }
    let (b, c, d, e) = (19 &* y.b, 19 &* y.c, 19 &* y.d, 19 &* y.e)
    let p0 = product(x.a, y.a) &+ product(x.b, e) &+ product(x.c, d) &+ product(x.d, c) &+ product(x.e, b)
    var p1 = product(x.a, y.b) &+ product(x.b, y.a) &+ product(x.c, e) &+ product(x.d, d) &+ product(x.e, c)
    var p2 = product(x.a, y.c) &+ product(x.b, y.b) &+ product(x.c, y.a) &+ product(x.d, e) &+ product(x.e, d)
    var p3 = product(x.a, y.d) &+ product(x.b, y.c) &+ product(x.c, y.b) &+ product(x.d, y.a) &+ product(x.e, e)
    var p4 = product(x.a, y.e) &+ product(x.b, y.d) &+ product(x.c, y.c) &+ product(x.d, y.b) &+ product(x.e, y.a)
    func low(_ value: UInt128) -> UInt64 { UInt64(truncatingIfNeeded: value) & mask }
    p1 &+= p0 >> 51
    p2 &+= p1 >> 51
    p3 &+= p2 >> 51
    p4 &+= p3 >> 51
    let first = low(p0) &+ 19 &* UInt64(truncatingIfNeeded: p4 >> 51)
    return FieldElement(first & mask, low(p1) &+ first >> 51, low(p2), low(p3), low(p4))
  }

  /// The power with an exponent of `bits` bits, all ones but for the low byte.
  private func raised(low: UInt8, bits: Int) -> FieldElement {
    var result = FieldElement(1)
    for bit in (0..<bits).reversed() {
      result = result * result
      if bit >= 8 || low >> UInt8(bit) & 1 != 0 { result = result * self }
    }
    return result
  }

  /// To the power of p - 2; 0 for 0.
  var inverted: FieldElement { raised(low: 0xeb, bits: 255) }
  /// To the power of (p + 3) / 8: a square root, up to a root of -1, where there is one.
  var raisedToRootPower: FieldElement { raised(low: 0xfe, bits: 252) }
}
