import TLS

/// What a server does against the NBD protocol, or has not.
public enum NBDFault: Equatable, Sendable, CustomStringConvertible {
  case notNBD
  case oldServer
  case closed
  case noExport
  case needsTLS
  case hasNoTLS
  case noCertificates
  case tls(TLSError)
  case refused(option: UInt32, code: UInt32, text: String)
  case malformedReply(option: UInt32)
  case tooLarge(size: UInt64)
  case blockSizes(minimum: UInt32, maximum: UInt32)
  case readOnly
  case reply(String)

  /// A part of a line.
  public var description: String {
    switch self {
    case .notNBD: "what answers there does not speak NBD"
    case .oldServer: "the server knows the old handshake only"
    case .closed: "the server ended the connection"
    case .noExport: "the server has no export of that name"
    case .needsTLS: "the server asks for TLS: use nbds:// with tls-certificates=DIR"
    case .hasNoTLS: "the server has no TLS: use nbd:// if the network is to be trusted"
    case .noCertificates: "nbds:// needs tls-certificates=DIR, a folder with ca-cert.pem"
    case .tls(let error): "\(error)"
    case .refused(let option, let code, let text):
      "the server refuses option \(option) with 0x\(String(code, radix: 16))" + (text.isEmpty ? "" : ": \(text)")
    case .malformedReply(let option): "the server's reply to option \(option) is malformed"
    case .tooLarge(let size): "its size of \(size) bytes is more than files can have"
    case .blockSizes(let minimum, let maximum):
      "its block sizes, \(minimum) to \(maximum) bytes, are none that disks can have"
    case .readOnly: "the server refuses changes of it; open it for reading"
    case .reply(let rule): "the server's reply breaks the protocol: \(rule)"
    }
  }
}
