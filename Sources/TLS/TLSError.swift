import Host

/// Why there is no TLS session, or why it has ended.
public enum TLSError: Error, Equatable, Sendable, CustomStringConvertible {
  /// A file of the credentials cannot be read.
  case file(path: String, errno: Int32)
  /// A file does not hold what it should.
  case notPEM(path: String, FileKind)
  /// A key that only a password opens.
  case encryptedKey(path: String)
  /// A certificate without its key, or the other way round.
  case incomplete(present: String, missing: String)
  /// The key is another certificate's.
  case keyMismatch(key: String, certificate: String)
  /// This side's own certificate is one that the other side could not accept.
  case ownCertificate(path: String, CertificateFault)
  /// The other side's certificate is not accepted.
  case peerCertificate(TLSCredentials.Endpoint, CertificateFault)
  /// The client shows no certificate.
  case noPeerCertificate
  /// Nothing says which name the server's certificate must have.
  case noHostName
  /// The other side says why it ends the session.
  case refused(alert: String)
  /// What the other side says is no TLS.
  case notTLS
  /// The other side has no version that is allowed.
  case version
  /// The other side has ended the connection before there was a session.
  case closedInHandshake
  /// There was no session after so long.
  case handshakeTime(seconds: Int)
  /// Nothing moved for so long.
  case stalled(seconds: Int)
  /// The other side has ended the connection, or whoever is between.
  case closed
  /// What came is no record of this session.
  case malformed(reason: String)
  /// A socket failed.
  case socket(HostError)
  /// OpenSSL cannot do something.
  case library(reason: String)

  /// What a file of the credentials holds.
  public enum FileKind: String, Sendable {
    case certificate, key = "private key", revocations = "revocation list"
  }

  /// What is wrong with a certificate.
  public enum CertificateFault: Equatable, Sendable, CustomStringConvertible {
    case unknownCA
    case expired
    case notYetValid
    case revoked
    case purpose
    case hostName(wanted: String)
    case weak
    case other(String)

    /// A part of a line.
    public var description: String {
      switch self {
      case .unknownCA: "no CA of ca-cert.pem has signed it"
      case .expired: "it or its CA's certificate has expired"
      case .notYetValid: "it or its CA's certificate is not valid yet; compare the hosts' clocks"
      case .revoked: "ca-crl.pem says that it has been revoked"
      case .purpose: "it is not meant for this end of a TLS session"
      case .hostName(let wanted): "it is not one of \(wanted); say with tls-hostname which name it has"
      case .weak: "its key or its signature is too weak"
      case .other(let reason): reason
      }
    }
  }

  /// One line: what failed, which value, what to do.
  public var description: String {
    switch self {
    case .file(let path, let code): "cannot read \(path): \(HostError.reason(code))"
    case .notPEM(let path, let kind): "\(path) holds no \(kind.rawValue) as PEM"
    case .encryptedKey(let path): "the key in \(path) is encrypted; store it without a password"
    case .incomplete(let present, let missing): "\(present) is there and \(missing) is not: they belong together"
    case .keyMismatch(let key, let certificate): "the key in \(key) is not that of \(certificate)"
    case .ownCertificate(let path, let fault): "the certificate in \(path) cannot be used: \(fault)"
    case .peerCertificate(let endpoint, let fault): "the \(endpoint.rawValue)'s certificate is not accepted: \(fault)"
    case .noPeerCertificate: "the client shows no certificate: it needs client-cert.pem and client-key.pem"
    case .noHostName: "a unix socket has no host name to compare the server's certificate with: give tls-hostname"
    case .refused(let alert): "the other side refuses this side's TLS: \(alert)"
    case .notTLS: "the other side does not speak TLS: use it on both sides or on none"
    case .version: "the other side has neither TLS 1.2 nor 1.3"
    case .closedInHandshake: "the other side has ended the connection in the TLS handshake: does it expect TLS?"
    case .handshakeTime(let seconds): "the other side has not ended the TLS handshake within \(seconds) s"
    case .stalled(let seconds): "nothing could be sent or received for \(seconds) s: is the other side stopped?"
    case .closed: "the other side has ended the connection"
    case .malformed(let reason): "what came is not of this TLS session: \(reason)"
    case .socket(let error): "\(error)"
    case .library(let reason): "OpenSSL: \(reason)"
    }
  }
}
