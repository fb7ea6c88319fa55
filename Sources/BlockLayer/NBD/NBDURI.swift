import Host

/// Where an NBD export is: `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`, as NBD's doc/uri.md has it; with TLS
/// `nbds` instead of `nbd`, and libnbd's parameters `tls-certificates=DIR`, `tls-hostname=NAME` and `tls-verify-peer=false`.
public struct NBDURI: Equatable, Sendable, CustomStringConvertible {
  /// The port that a URI without one means.
  public static let defaultPort: UInt16 = 10809

  /// How the connection is encrypted.
  public struct TLS: Equatable, Sendable {
    /// The folder of `TLSCredentials`; a client needs one.
    public var certificates: String?
    /// The name that the server's certificate has, where it is not the host's.
    public var hostName: String?
    /// Whether the server's certificate is looked at.
    public var verifiesPeer: Bool

    /// A connection by TLS.
    public init(certificates: String? = nil, hostName: String? = nil, verifiesPeer: Bool = true) {
      self.certificates = certificates
      self.hostName = hostName
      self.verifiesPeer = verifiesPeer
    }
  }

  /// The server.
  public let endpoint: StreamEndpoint
  /// The export's name.
  public let export: String
  /// nil for a connection that is not encrypted.
  public let tls: TLS?

  /// An export of a server.
  public init(_ endpoint: StreamEndpoint, export: String, tls: TLS? = nil) {
    self.endpoint = endpoint
    self.export = export
    self.tls = tls
  }

  /// Whether a name is meant as an NBD URI rather than as a path.
  public static func isURI(_ text: String) -> Bool {
    ["nbd://", "nbd+unix://", "nbds://", "nbds+unix://"].contains { text.hasPrefix($0) }
  }

  /// Reads a URI.
  public init(_ text: String) throws(BlockError) {
    func fault(_ expected: String) -> BlockError { .invalid(what: "NBD URI", value: text, expected: expected) }
    guard Self.isURI(text), let colon = text.firstIndex(of: ":") else {
      throw fault("nbd://, nbds://, nbd+unix:// or nbds+unix://")
    }
    let scheme = text[..<colon]
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
    var tls = scheme.hasPrefix("nbds") ? TLS() : nil
    var socket: String?
    for part in query.split(separator: "&") {
      let words = part.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
      guard words.count == 2, let value = Self.decoded(words[1]), !value.isEmpty else {
        throw fault("KEY=VALUE after ?")
      }
      switch words[0] {
      case "socket": socket = value
      case "tls-certificates": tls?.certificates = value
      case "tls-hostname": tls?.hostName = value
      case "tls-verify-peer" where ["true", "false"].contains(value): tls?.verifiesPeer = value == "true"
      default: throw fault("socket=, tls-certificates=, tls-hostname= or tls-verify-peer=true|false after ?")
      }
      if words[0].hasPrefix("tls-"), tls == nil { throw fault("nbds:// or nbds+unix:// for TLS") }
    }
    self.tls = tls
    do throws(HostError) {
      if scheme.hasSuffix("+unix") {
        guard let socket, authority.isEmpty else { throw .endpoint(text) }
        endpoint = try StreamEndpoint("unix:" + socket)
      } else {
        guard socket == nil, !authority.isEmpty else { throw .endpoint(text) }
        let hasPort = authority.last != "]" && authority.contains(":")
        endpoint = try StreamEndpoint("tcp:" + authority + (hasPort ? "" : ":\(Self.defaultPort)"))
      }
    } catch {
      if case .endpoint = error { throw fault("nbd[s]://HOST[:PORT]/EXPORT or nbd[s]+unix:///EXPORT?socket=PATH") }
      throw fault("\(error)")
    }
  }

  /// The URI.
  public var description: String {
    let scheme = tls == nil ? "nbd" : "nbds"
    var parameters: [(String, String)] = []
    let start: String
    switch endpoint {
    case .unix(let path):
      start = "\(scheme)+unix:///\(Self.encoded(export))"
      parameters.append(("socket", path))
    case .tcp: start = "\(scheme)://\(endpoint)/\(Self.encoded(export))"
    }
    if let certificates = tls?.certificates { parameters.append(("tls-certificates", certificates)) }
    if let hostName = tls?.hostName { parameters.append(("tls-hostname", hostName)) }
    if tls?.verifiesPeer == false { parameters.append(("tls-verify-peer", "false")) }
    let query = parameters.map { "\($0)=\(Self.encoded($1))" }.joined(separator: "&")
    return query.isEmpty ? start : start + "?" + query
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
