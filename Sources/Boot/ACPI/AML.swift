/// A piece of ACPI Machine Language (ACPI 6.5, chapter 20), encoded as it is built.
///
/// Paths are ASL's: `\_SB.PCI0`, `COM1`; segments are padded with underscores. What is passed comes from this program,
/// never from outside.
public struct AML: Equatable, Sendable {
  /// The encoding.
  public let bytes: [UInt8]

  fileprivate init(_ bytes: [UInt8]) { self.bytes = bytes }

  // MARK: Data

  /// An integer in its shortest form.
  public static func integer(_ value: UInt64) -> AML {
    var table = TableBytes()
    switch value {
    case 0, 1: table.append(UInt8(value))
    case ...0xff:
      table.append(UInt8(0x0a))
      table.append(UInt8(value))
    case ...0xffff:
      table.append(UInt8(0x0b))
      table.append(UInt16(value))
    case ...0xffff_ffff:
      table.append(UInt8(0x0c))
      table.append(UInt32(value))
    default:
      table.append(UInt8(0x0e))
      table.append(value)
    }
    return AML(table.bytes)
  }

  /// A string.
  public static func string(_ text: String) -> AML { AML([0x0d] + Array(text.utf8) + [0]) }

  /// ASL's EISAID: three letters and four hexadecimal digits, compressed into an integer (19.3.4).
  public static func eisaID(_ id: String) -> AML {
    let text = Array(id.utf8)
    let letters = text.prefix(3).reduce(UInt32(0)) { $0 << 5 | UInt32($1 & 0x1f) }
    let digits = UInt32(String(decoding: text.dropFirst(3), as: UTF8.self), radix: 16) ?? 0
    return .integer(UInt64((letters << 16 | digits).byteSwapped))
  }

  /// A buffer of these bytes.
  public static func buffer(_ bytes: [UInt8]) -> AML {
    AML([0x11] + sized(integer(UInt64(bytes.count)).bytes + bytes))
  }

  /// ASL's ToUUID: a buffer with the first three groups in little-endian order (19.6.142).
  public static func uuid(_ text: String) -> AML {
    let digits = Array(text.utf8.filter { $0 != 0x2d })
    let bytes = stride(from: 0, to: digits.count - 1, by: 2).map { index in
      UInt8(String(decoding: digits[index...index + 1], as: UTF8.self), radix: 16) ?? 0
    }
    return .buffer([3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15].map { bytes[$0] })
  }

  /// A package of at most 255 elements.
  public static func package(_ elements: [AML]) -> AML {
    AML([0x12] + sized([UInt8(elements.count)] + elements.flatMap(\.bytes)))
  }

  /// A reference to a named object.
  public static func path(_ path: String) -> AML { AML(name(path)) }

  /// A method's argument, 0 to 6.
  public static func argument(_ index: UInt8) -> AML { AML([0x68 + index]) }

  /// A method's local variable, 0 to 7.
  public static func local(_ index: UInt8) -> AML { AML([0x60 + index]) }

  // MARK: Named objects

  /// Adds objects to a scope that exists.
  public static func scope(_ path: String, _ body: [AML]) -> AML {
    AML([0x10] + sized(name(path) + body.flatMap(\.bytes)))
  }

  /// A device with its objects.
  public static func device(_ path: String, _ body: [AML]) -> AML {
    AML([0x5b, 0x82] + sized(name(path) + body.flatMap(\.bytes)))
  }

  /// An object with a value.
  public static func name(_ path: String, _ value: AML) -> AML { AML([0x08] + name(path) + value.bytes) }

  /// A control method.
  public static func method(_ path: String, arguments: UInt8 = 0, serialized: Bool = false, _ body: [AML]) -> AML {
    AML([0x14] + sized(name(path) + [arguments & 7 | (serialized ? 8 : 0)] + body.flatMap(\.bytes)))
  }

  /// The name of an edge-triggered general-purpose event's method (ACPI 6.5, 5.6.4.1).
  static func eventName(_ event: Int) -> String {
    let digits = String(event, radix: 16, uppercase: true)
    return "_E" + (event < 16 ? "0" : "") + digits
  }

  // MARK: Statements

  /// `target = value`.
  public static func store(_ value: AML, in target: AML) -> AML { AML([0x70] + value.bytes + target.bytes) }

  /// `target = a & b`.
  public static func and(_ a: AML, _ b: AML, in target: AML) -> AML { AML([0x7b] + a.bytes + b.bytes + target.bytes) }

  /// `a & b`.
  public static func bitAnd(_ a: AML, _ b: AML) -> AML { AML([0x7b] + a.bytes + b.bytes + [0]) }

  /// `target = a | b`.
  public static func or(_ a: AML, _ b: AML, in target: AML) -> AML { AML([0x7d] + a.bytes + b.bytes + target.bytes) }

  /// Whether two values are equal.
  public static func equal(_ a: AML, _ b: AML) -> AML { AML([0x93] + a.bytes + b.bytes) }

  /// Whether a value is 0.
  public static func not(_ value: AML) -> AML { AML([0x92] + value.bytes) }

  /// `if`, with an `else` where there is one.
  public static func `if`(_ condition: AML, _ body: [AML], else other: [AML] = []) -> AML {
    let first = [0xa0] + sized(condition.bytes + body.flatMap(\.bytes))
    return AML(other.isEmpty ? first : first + [0xa1] + sized(other.flatMap(\.bytes)))
  }

  /// Leaves the method with a value.
  public static func `return`(_ value: AML) -> AML { AML([0xa4] + value.bytes) }

  /// Tells the operating system something about a device (ACPI 6.5, 5.6.6).
  public static func notify(_ path: String, _ value: UInt64) -> AML { AML([0x86] + name(path) + integer(value).bytes) }

  /// Names a range of ports.
  public static func operationRegion(_ path: String, port: UInt16, size: UInt64) -> AML {
    AML([0x5b, 0x80] + name(path) + [1] + integer(UInt64(port)).bytes + integer(size).bytes)
  }

  /// Names a region's registers of 32 bits, which are written as wholes.
  public static func dwordFields(_ region: String, _ names: [String]) -> AML {
    // DWordAcc, NoLock, WriteAsZeros; a length of 32 bits behind each name.
    AML([0x5b, 0x81] + sized(name(region) + [0x43] + names.flatMap { name($0) + [32] }))
  }

  /// Names 32 bits of a buffer.
  public static func dwordField(_ path: String, of buffer: AML, at offset: UInt64) -> AML {
    AML([0x8a] + buffer.bytes + integer(offset).bytes + name(path))
  }

  // MARK: Encoding

  /// A NameString (20.2.2).
  private static func name(_ path: String) -> [UInt8] {
    var rest = Array(path.utf8)
    var bytes: [UInt8] = []
    while let first = rest.first, first == 0x5c || first == 0x5e { bytes.append(rest.removeFirst()) }
    let segments = rest.split(separator: 0x2e)
    switch segments.count {
    case 0: bytes.append(0)
    case 1: break
    case 2: bytes.append(0x2e)
    default: bytes += [0x2f, UInt8(segments.count)]
    }
    for segment in segments { bytes += (segment + [0x5f, 0x5f, 0x5f]).prefix(4) }
    return bytes
  }

  /// A body behind its PkgLength (20.2.4), which counts itself.
  private static func sized(_ body: [UInt8]) -> [UInt8] {
    let limits = [0x3f, 0xfff, 0xf_ffff]
    var width = 0
    while width < limits.count, body.count + width + 1 > limits[width] { width += 1 }
    let length = body.count + width + 1
    if width == 0 { return [UInt8(length)] + body }
    var bytes = [UInt8(width << 6 | length & 15)]
    for index in 0..<width { bytes.append(UInt8(truncatingIfNeeded: length >> (4 + 8 * index))) }
    return bytes + body
  }
}

/// A resource descriptor (ACPI 6.5, 6.4) for `_CRS`.
public enum ACPIResource: Equatable, Sendable {
  /// Ports that the device decodes.
  case io(UInt16, count: UInt8)
  /// An edge-triggered, active-high interrupt, 0 to 15.
  case interrupt(UInt8)
  /// Memory that the device decodes.
  case memory(base: UInt32, size: UInt32)
  /// Buses behind a bridge.
  case buses(UInt16, UInt16)
  /// Ports that a bridge passes on, both ends included.
  case ioWindow(UInt16, UInt16)
  /// Memory that a bridge passes on, below 4 GiB or anywhere.
  case memoryWindow(base: UInt64, size: UInt64)

  fileprivate var bytes: [UInt8] {
    var table = TableBytes()
    func fields<T: FixedWidthInteger>(_ values: T...) { for value in values { table.append(value) } }
    switch self {
    case .io(let base, let count):
      fields(0x47, 1 as UInt8)
      fields(base, base)
      fields(1, count)
    case .interrupt(let number):
      fields(0x22 as UInt8)
      fields(1 << UInt16(number) as UInt16)
    case .memory(let base, let size):
      fields(0x86, 9, 0, 1 as UInt8)
      fields(base, size)
    case .buses(let first, let last):
      fields(0x88, 13, 0, 2, 0x0c, 0 as UInt8)
      fields(0, first, last, 0, last - first + 1)
    case .ioWindow(let first, let last):
      fields(0x88, 13, 0, 1, 0x0c, 3 as UInt8)
      fields(0, first, last, 0, last - first + 1)
    case .memoryWindow(let base, let size):
      let last = base + size - 1
      if last < 1 << 32 {
        fields(0x87, 23, 0, 0, 0x0c, 1 as UInt8)
        fields(0, UInt32(base), UInt32(last), 0, UInt32(size))
      } else {
        fields(0x8a, 43, 0, 0, 0x0c, 1 as UInt8)
        fields(0, base, last, 0, size)
      }
    }
    return table.bytes
  }

  /// A `_CRS` buffer; its end tag has checksum 0, which stands for any.
  public static func template(_ resources: [ACPIResource]) -> AML {
    .buffer(resources.flatMap(\.bytes) + [0x79, 0])
  }
}
