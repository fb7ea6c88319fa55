import Host

/// Where an NBD export is: `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`, as NBD's doc/uri.md has it.
public struct NBDURI: Equatable, Sendable, CustomStringConvertible {
  /// The port that a URI without one means.
  public static let defaultPort: UInt16 = 10809

  /// The server.
  public let endpoint: StreamEndpoint
  /// The export's name.
  public let export: String

  /// An export of a server.
  public init(_ endpoint: StreamEndpoint, export: String) {
    self.endpoint = endpoint
    self.export = export
  }

  /// Whether a name is meant as an NBD URI rather than as a path.
  public static func isURI(_ text: String) -> Bool {
    ["nbd://", "nbd+unix://", "nbds://", "nbds+unix://"].contains { text.hasPrefix($0) }
  }

  /// Reads a URI.
  public init(_ text: String) throws(BlockError) {
    func fault(_ expected: String) -> BlockError { .invalid(what: "NBD URI", value: text, expected: expected) }
    guard let colon = text.firstIndex(of: ":") else { throw fault("nbd:// or nbd+unix://") }
    let scheme = text[..<colon]
    guard scheme == "nbd" || scheme == "nbd+unix" else { throw fault("nbd:// or nbd+unix://; there is no TLS") }
    var rest = text[colon...].dropFirst(3)
    var query = Substring()
    if let mark = rest.firstIndex(of: "?") {
      query = rest[mark...].dropFirst()
      rest = rest[..<mark]
    }
    let slash = rest.firstIndex(of: "/") ?? rest.endIndex
    let authority = rest[..<slash]
    guard let export = Self.decoded(rest[slash...].dropFirst()), export.utf8.count <= NBDProtocol.longestString else {
      throw fault("an export's name of at most \(NBDProtocol.longestString) bytes")
    }
    self.export = export
    do {
      if scheme == "nbd+unix" {
        guard query.hasPrefix("socket="), let path = Self.decoded(query.dropFirst(7)), authority.isEmpty else {
          throw fault("nbd+unix:///EXPORT?socket=PATH")
        }
        endpoint = try StreamEndpoint("unix:" + path)
      } else {
        guard query.isEmpty, !authority.isEmpty else { throw fault("nbd://HOST[:PORT]/EXPORT") }
        let hasPort = authority.last != "]" && authority.contains(":")
        endpoint = try StreamEndpoint("tcp:" + authority + (hasPort ? "" : ":\(Self.defaultPort)"))
      }
    } catch let error as BlockError {
      throw error
    } catch {
      throw fault("\(error)")
    }
  }

  /// The URI.
  public var description: String {
    switch endpoint {
    case .unix(let path): "nbd+unix:///\(Self.encoded(export))?socket=\(Self.encoded(path))"
    case .tcp: "nbd://\(endpoint)/\(Self.encoded(export))"
    }
  }

  private static func encoded(_ text: String) -> String {
    var result = ""
    for byte in text.utf8 {
      let character = Character(UnicodeScalar(byte))
      if byte < 128, character.isLetter || character.isNumber || "-._~/".contains(character) {
        result.append(character)
      } else {
        result += "%" + (byte < 16 ? "0" : "") + String(byte, radix: 16, uppercase: true)
      }
    }
    return result
  }

  /// nil where an escape is none, or what it makes is no text.
  private static func decoded(_ text: Substring) -> String? {
    var bytes: [UInt8] = []
    var rest = text.utf8[...]
    while let byte = rest.popFirst() {
      guard byte == UInt8(ascii: "%") else {
        bytes.append(byte)
        continue
      }
      guard rest.count >= 2, let digits = String(rest.prefix(2)), let value = UInt8(digits, radix: 16) else {
        return nil
      }
      bytes.append(value)
      rest = rest.dropFirst(2)
    }
    return String(validating: bytes, as: UTF8.self)
  }
}
