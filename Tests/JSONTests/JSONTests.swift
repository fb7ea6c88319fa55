import JSON
import Testing

@Suite struct JSONParsing {
  @Test(
    arguments: [
      ("null", .null), ("true", true), (" false\n", false), ("0", 0), ("-0", 0), ("-1", -1), ("1e2", 100.0),
      ("9223372036854775807", .integer(.max)), ("-9223372036854775808", .integer(.min)),
      ("9223372036854775808", .unsigned(1 << 63)), ("18446744073709551615", .unsigned(.max)),
      ("100000000000000000000", .number(1e20)), ("-10000000000000000000", .number(-1e19)),
      ("0.5", 0.5), ("-1.5E-1", -0.15), ("1E+2", 100.0), ("0e1", 0.0), ("123.456e-789", 0.0),
      ("\"\"", ""), (#""a\"\\\/\b\f\n\r\t""#, "a\"\\/\u{8}\u{c}\n\r\t"), (#""\u0000""#, "\0"), (#""\u00e9é""#, "éé"),
      (#""\uD834\uDD1E""#, "\u{1D11E}"), (#""\ud834\udd1e""#, "\u{1D11E}"), (#""\uFFFF""#, "\u{FFFF}"),
      ("\"\u{7f}\"", "\u{7f}"),
      ("[]", []), ("[ ]", []), ("{}", [:]), ("[[],{}]", [[], [:]]), ("[1,2 , 3]", [1, 2, 3]),
      (#"{"a":1,"b":{"c":[null]}}"#, ["a": 1, "b": ["c": [nil]]]), (#"{"":0}"#, ["": 0]),
    ] as [(String, JSONValue)])
  func accepts(_ text: String, _ value: JSONValue) throws {
    #expect(try JSONValue(parsing: text) == value)
    #expect(try JSONValue(parsing: value.serialized()) == value)
    #expect(try JSONValue(parsing: value.serialized(pretty: true)) == value)
  }

  @Test(
    arguments: [
      ("", .incomplete(offset: 0)), ("  ", .incomplete(offset: 2)), ("[", .incomplete(offset: 1)),
      (#"{"a":"#, .incomplete(offset: 5)), ("\"a", .incomplete(offset: 2)), ("tru", .incomplete(offset: 3)),
      ("nul1", .unexpected(byte: 0x31, offset: 3)), ("True", .unexpected(byte: 0x54, offset: 0)),
      ("NaN", .unexpected(byte: 0x4e, offset: 0)), ("-Infinity", .number(offset: 1)),
      ("[1,]", .unexpected(byte: 0x5d, offset: 3)), ("[,1]", .unexpected(byte: 0x2c, offset: 1)),
      ("[1 2]", .unexpected(byte: 0x32, offset: 3)), ("[1}", .unexpected(byte: 0x7d, offset: 2)),
      ("{]", .unexpected(byte: 0x5d, offset: 1)), (#"{"a":1]"#, .unexpected(byte: 0x5d, offset: 6)),
      (#"{"a":1,}"#, .unexpected(byte: 0x7d, offset: 7)), (#"{"a" 1}"#, .unexpected(byte: 0x31, offset: 5)),
      ("{1:1}", .unexpected(byte: 0x31, offset: 1)), (#"{"a"}"#, .unexpected(byte: 0x7d, offset: 4)),
      ("{'a':1}", .unexpected(byte: 0x27, offset: 1)), ("]", .unexpected(byte: 0x5d, offset: 0)),
      ("\u{FEFF}1", .unexpected(byte: 0xef, offset: 0)), ("[1]// no", .trailing(offset: 3)),
      ("\u{c}1", .unexpected(byte: 0x0c, offset: 0)), ("+1", .unexpected(byte: 0x2b, offset: 0)),
      (".5", .unexpected(byte: 0x2e, offset: 0)), ("0x1", .unexpected(byte: 0x78, offset: 1)),
      ("01", .number(offset: 2)), ("-", .number(offset: 1)), ("1.", .number(offset: 2)), ("1.e1", .number(offset: 4)),
      ("1e", .number(offset: 2)), ("1e+", .number(offset: 3)), ("-01", .number(offset: 3)), ("--1", .number(offset: 3)),
      ("1.2.3", .number(offset: 5)), ("1-2", .number(offset: 3)), ("1e400", .number(offset: 5)),
      ("[0.]", .number(offset: 3)),
      ("\"\n\"", .controlCharacter(byte: 10, offset: 1)), ("\"\0\"", .controlCharacter(byte: 0, offset: 1)),
      (#""\x""#, .escape(offset: 2)), (#""\u12G4""#, .escape(offset: 5)), (#""\U0041""#, .escape(offset: 2)),
      (#""\uD800""#, .loneSurrogate(offset: 7)), (#""\uDC00""#, .loneSurrogate(offset: 6)),
      (#""\uD800\n""#, .loneSurrogate(offset: 8)), (#""\uD800\uD800""#, .loneSurrogate(offset: 12)),
      (#""\uD800a""#, .loneSurrogate(offset: 7)), (#"{"a":1,"a":2}"#, .duplicateKey("a", offset: 9)),
      (#"{"a":1,"\u0061":2}"#, .duplicateKey("a", offset: 14)), ("1 2", .trailing(offset: 2)),
      ("{}{}", .trailing(offset: 2)), ("1[", .trailing(offset: 1)), ("true true", .trailing(offset: 5)),
    ] as [(String, JSONError)])
  func refuses(_ text: String, _ error: JSONError) {
    #expect(throws: error) { try JSONValue(parsing: text) }
    #expect(!error.description.contains("\n"))
  }

  @Test(
    arguments: [
      [0x80], [0xc0, 0x80], [0xed, 0xa0, 0x80], [0xf4, 0x90, 0x80, 0x80], [0xff], [0xe2, 0x82],
      [0xf8, 0x88, 0x80, 0x80, 0x80],
    ] as [[UInt8]])
  func refusesWhatIsNotUTF8(_ bytes: [UInt8]) {
    #expect(throws: JSONError.invalidUTF8(offset: 1 + bytes.count)) { try JSONValue(parsing: [0x22] + bytes + [0x22]) }
  }

  @Test func limitsDepthAndLength() throws {
    let limits = JSONParser.Limits(depth: 3, bytes: 16)
    #expect(try JSONValue(parsing: "[[[1]]]", limits: limits) == [[[1]]])
    #expect(throws: JSONError.tooDeep(limit: 3)) { try JSONValue(parsing: "[[{\"a\":[]}]]", limits: limits) }
    #expect(try JSONValue(parsing: "\"12345678901234\"", limits: limits) == "12345678901234")
    #expect(throws: JSONError.tooLong(limit: 16)) { try JSONValue(parsing: "\"123456789012345\"", limits: limits) }
    let spaces = String(repeating: " ", count: 100)
    #expect(try JSONValue(parsing: spaces + "1" + spaces, limits: limits) == 1)
    #expect(throws: JSONError.tooDeep(limit: 128)) { try JSONValue(parsing: String(repeating: "[", count: 100_000)) }
  }

  @Test func takesAStreamByteByByte() throws {
    var parser = JSONParser()
    var values: [JSONValue] = []
    for byte in (#"{"a":1}[2]3 "x""y"true"# + "false -4\n").utf8 {
      if let value = try parser.feed(byte) { values.append(value) }
    }
    #expect(values == [["a": 1], [2], 3, "x", "y", true, false, -4])
    #expect(parser.isIdle)
  }

  @Test func startsAfreshAfterAnError() throws {
    var parser = JSONParser()
    for byte in "{\"a\":[".utf8 { _ = try parser.feed(byte) }
    #expect(throws: JSONError.unexpected(byte: 0x7d, offset: 6)) { try parser.feed(0x7d) }
    #expect(parser.isIdle)
    var values: [JSONValue] = []
    for byte in "\"ok\"".utf8 {
      if let value = try parser.feed(byte) { values.append(value) }
    }
    #expect(values == ["ok"])
  }

  /// What is built at random is read back as it was, and what is damaged at random is an error or a value, never a trap.
  @Test func survivesRandomTexts() throws {
    var random = SplitMix(state: 1)
    for _ in 0..<2000 {
      let value = random.value(depth: 4)
      var bytes = Array(value.serialized(pretty: random.next(below: 2) == 0).utf8)
      #expect(try JSONValue(parsing: bytes) == value)
      for _ in 0..<3 { bytes[random.next(below: bytes.count)] = UInt8(random.next(below: 256)) }
      if let damaged = try? JSONValue(parsing: bytes) {
        #expect(try JSONValue(parsing: damaged.serialized()) == damaged)
      }
    }
  }
}

@Suite struct JSONValues {
  @Test func writesAsQMPDoes() {
    let value: JSONValue = ["b": [1, -2.5, nil, true], "a": "\u{1}\"\\\n\u{1f}é", "e": [:], "f": []]
    #expect(value.serialized() == #"{"b": [1, -2.5, null, true], "a": "\u0001\"\\\n\u001fé", "e": {}, "f": []}"#)
    #expect(["a": [1, ["b": 2]], "e": []] as JSONValue == (try? JSONValue(parsing: #"{"e":[],"a":[1,{"b":2}]}"#)))
    #expect(
      (["a": [1], "e": [:]] as JSONValue).serialized(pretty: true) == "{\n  \"a\": [\n    1\n  ],\n  \"e\": {}\n}")
    #expect(JSONValue.number(.infinity).serialized() == "null")
  }

  @Test func keepsTheOrderOfKeys() {
    var object: JSONObject = ["z": 1, "a": 2]
    object["m"] = 3
    object["z"] = 4
    #expect(object.keys == ["z", "a", "m"])
    object["a"] = nil
    object["absent"] = nil
    #expect(JSONValue.object(object).serialized() == #"{"z": 4, "m": 3}"#)
  }

  @Test func givesNumbersOneForm() {
    #expect(JSONValue(UInt64(5)) == .integer(5))
    #expect(JSONValue(UInt64.max) == .unsigned(.max))
    #expect(JSONValue(-5).unsignedValue == nil)
    #expect(JSONValue(UInt64.max).integerValue == nil)
    #expect(JSONValue(7).unsignedValue == 7)
    #expect(JSONValue(7).numberValue == 7.0)
  }
}

/// SplitMix64: small, and the same on every run.
struct SplitMix {
  var state: UInt64

  mutating func next() -> UInt64 {
    state &+= 0x9e37_79b9_7f4a_7c15
    var z = state
    z = (z ^ (z >> 30)) &* 0xbf58_476d_1ce4_e5b9
    z = (z ^ (z >> 27)) &* 0x94d0_49bb_1331_11eb
    return z ^ (z >> 31)
  }

  mutating func next(below bound: Int) -> Int { Int(next() % UInt64(bound)) }

  mutating func value(depth: Int) -> JSONValue {
    switch next(below: depth == 0 ? 6 : 8) {
    case 0: return .null
    case 1: return .bool(next(below: 2) == 0)
    case 2: return JSONValue(next())
    case 3: return JSONValue(Int64(bitPattern: next()))
    case 4:
      let number = Double(bitPattern: next())
      return number.isFinite ? .number(number) : .null
    case 5: return .string(string())
    case 6: return .array((0..<next(below: 5)).map { _ in value(depth: depth - 1) })
    default:
      var object = JSONObject()
      for _ in 0..<next(below: 5) { object[string()] = value(depth: depth - 1) }
      return .object(object)
    }
  }

  mutating func string() -> String {
    var result = ""
    for _ in 0..<next(below: 8) {
      let limits = [0x20, 0x80, 0x800, 0x11_0000]
      if let scalar = UnicodeScalar(UInt32(next(below: limits[next(below: 4)]))) {
        result.unicodeScalars.append(scalar)
      }
    }
    return result
  }
}
