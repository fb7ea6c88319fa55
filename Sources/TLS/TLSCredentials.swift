import COpenSSL
import Glibc
import Host

/// Certificates and the key of one side, from a folder with QEMU's names: `ca-cert.pem`, `ca-crl.pem` (optional), and
/// `server-cert.pem` with `server-key.pem` or `client-cert.pem` with `client-key.pem` (a client may have neither).
public final class TLSCredentials: @unchecked Sendable {
  /// Which end of a session they are for.
  public enum Endpoint: String, Sendable {
    case client, server
  }

  /// The folder.
  public let directory: String
  /// The end.
  public let endpoint: Endpoint
  /// Whether the other side must have a certificate by a CA of `ca-cert.pem`, and a server the right name.
  public let verifiesPeer: Bool
  /// Never changed once it is made, so that any thread may make sessions from it.
  let context: OpaquePointer

  /// The largest file that is read, bytes.
  private static let fileLimit = 1 << 20

  /// Reads and checks the folder's files: what the other side could not accept is refused here.
  public init(directory: String, endpoint: Endpoint, verifiesPeer: Bool = true) throws(TLSError) {
    OpenSSL.initialize()
    let method = endpoint == .server ? TLS_server_method() : TLS_client_method()
    guard let context = SSL_CTX_new(method) else { throw OpenSSL.failure() }
    self.directory = directory
    self.endpoint = endpoint
    self.verifiesPeer = verifiesPeer
    self.context = context
    setPolicy()
    try loadAuthorities()
    try loadOwn()
  }

  deinit { SSL_CTX_free(context) }

  private func setPolicy() {
    copenssl_set_versions(context, TLS1_2_VERSION)
    copenssl_set_modes(context)
    SSL_CTX_set_num_tickets(context, 0)
    SSL_CTX_set_security_level(context, Self.securityLevel)
    SSL_CTX_set_cipher_list(context, "ECDHE+AESGCM:ECDHE+CHACHA20")
    SSL_CTX_set_ciphersuites(context, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256")
    SSL_CTX_set_default_read_buffer_len(context, 128 << 10)
    let wanted = endpoint == .server ? SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT : SSL_VERIFY_PEER
    SSL_CTX_set_verify(context, verifiesPeer ? wanted : SSL_VERIFY_NONE, nil)
  }

  /// 112 bits: RSA keys of 2048 bits, no SHA-1.
  private static let securityLevel: Int32 = 2

  // MARK: Files

  private func path(_ name: String) -> String { directory + "/" + name }

  private func loadAuthorities() throws(TLSError) {
    let store = SSL_CTX_get_cert_store(context)
    // As with QEMU, whoever stands in the file is trusted, be it a root or not.
    X509_STORE_set_flags(store, UInt(X509_V_FLAG_PARTIAL_CHAIN))
    let authorities = try certificates(path("ca-cert.pem"))
    defer { for authority in authorities { X509_free(authority) } }
    for authority in authorities {
      X509_STORE_add_cert(store, authority)
      if endpoint == .server { SSL_CTX_add_client_CA(context, authority) }
    }
    guard let revocations = try read(path("ca-crl.pem"), isOptional: true) else { return }
    try revocations.parse(path("ca-crl.pem"), .revocations, { PEM_read_bio_X509_CRL($0, nil, nil, nil) }) { list in
      X509_STORE_add_crl(store, list)
      X509_CRL_free(list)
    }
    X509_STORE_set_flags(store, UInt(X509_V_FLAG_CRL_CHECK))
  }

  private func loadOwn() throws(TLSError) {
    let (certificateFile, keyFile) = (path("\(endpoint.rawValue)-cert.pem"), path("\(endpoint.rawValue)-key.pem"))
    let isOptional = endpoint == .client
    let keyBytes = try read(keyFile, isOptional: isOptional)
    guard let certificateBytes = try read(certificateFile, isOptional: isOptional) else {
      if keyBytes != nil { throw .incomplete(present: keyFile, missing: certificateFile) }
      return
    }
    guard let keyBytes else { throw .incomplete(present: certificateFile, missing: keyFile) }
    let chain = try certificates(certificateBytes, certificateFile)
    defer { for certificate in chain { X509_free(certificate) } }
    let key = try keyBytes.key(keyFile)
    defer { EVP_PKEY_free(key) }
    guard X509_check_private_key(chain[0], key) == 1 else {
      throw .keyMismatch(key: keyFile, certificate: certificateFile)
    }
    if let fault = checkOwn(chain) { throw .ownCertificate(path: certificateFile, fault) }
    guard SSL_CTX_use_certificate(context, chain[0]) == 1, SSL_CTX_use_PrivateKey(context, key) == 1 else {
      throw OpenSSL.failure()
    }
    for issuer in chain.dropFirst() where copenssl_add_chain(context, issuer) != 1 { throw OpenSSL.failure() }
  }

  /// What the other side will find, if it trusts the same CA.
  private func checkOwn(_ chain: [OpaquePointer]) -> TLSError.CertificateFault? {
    let others = copenssl_certificates()
    defer { copenssl_free_certificates(others) }
    for issuer in chain.dropFirst() { copenssl_push(others, issuer) }
    guard let check = X509_STORE_CTX_new() else { return .other("out of memory") }
    defer { X509_STORE_CTX_free(check) }
    guard X509_STORE_CTX_init(check, SSL_CTX_get_cert_store(context), chain[0], others) == 1 else {
      return .other("out of memory")
    }
    X509_STORE_CTX_set_default(check, endpoint == .server ? "ssl_server" : "ssl_client")
    X509_VERIFY_PARAM_set_auth_level(X509_STORE_CTX_get0_param(check), Self.securityLevel)
    guard X509_verify_cert(check) != 1 else { return nil }
    return OpenSSL.certificateFault(Int(X509_STORE_CTX_get_error(check)), host: "")
  }

  private func certificates(_ path: String) throws(TLSError) -> [OpaquePointer] {
    guard let bytes = try read(path, isOptional: false) else { return [] }
    return try certificates(bytes, path)
  }

  /// At least one.
  private func certificates(_ bytes: PEMFile, _ path: String) throws(TLSError) -> [OpaquePointer] {
    var found: [OpaquePointer] = []
    do throws(TLSError) {
      try bytes.parse(path, .certificate, { PEM_read_bio_X509($0, nil, nil, nil) }) { found.append($0) }
    } catch {
      for certificate in found { X509_free(certificate) }
      throw error
    }
    return found
  }

  private func read(_ path: String, isOptional: Bool) throws(TLSError) -> PEMFile? {
    do throws(HostError) {
      let file = try FileDescriptor.open(path, O_RDONLY)
      var bytes = [UInt8](repeating: 0, count: Self.fileLimit + 1)
      var count = 0
      while count < bytes.count {
        let got = bytes.withUnsafeMutableBytes { Glibc.read(file.rawValue, $0.baseAddress! + count, $0.count - count) }
        guard got >= 0 else { throw .path("read", path: path, errno: errno) }
        if got == 0 { break }
        count += got
      }
      guard count <= Self.fileLimit else { throw .path("read", path: path, errno: EFBIG) }
      return PEMFile(bytes: Array(bytes[..<count]))
    } catch {
      if isOptional, error.errno == ENOENT { return nil }
      throw .file(path: path, errno: error.errno)
    }
  }
}

/// The bytes of a file in PEM.
private struct PEMFile {
  var bytes: [UInt8]

  /// Calls `take` with everything of its kind in the file, which `read` takes from it; there must be something.
  func parse(
    _ path: String, _ kind: TLSError.FileKind, _ read: (OpaquePointer?) -> OpaquePointer?,
    _ take: (OpaquePointer) -> Void
  ) throws(TLSError) {
    var count = 0
    var isWhole = false
    withBIO { bio in
      ERR_clear_error()
      while let object = read(bio) {
        take(object)
        count += 1
      }
      // It ends where nothing more begins.
      isWhole = ERR_GET_REASON(ERR_peek_last_error()) == PEM_R_NO_START_LINE
      ERR_clear_error()
    }
    guard count > 0, isWhole else { throw .notPEM(path: path, kind) }
  }

  func key(_ path: String) throws(TLSError) -> OpaquePointer {
    var isEncrypted = false
    var key: OpaquePointer?
    withUnsafeMutablePointer(to: &isEncrypted) { flag in
      withBIO { bio in
        // Nobody is asked for a password.
        key = PEM_read_bio_PrivateKey(
          bio, nil,
          { _, _, _, flag in
            flag?.assumingMemoryBound(to: Bool.self).pointee = true
            return -1
          }, flag)
        ERR_clear_error()
      }
    }
    guard let key else { throw isEncrypted ? .encryptedKey(path: path) : .notPEM(path: path, .key) }
    return key
  }

  private func withBIO(_ body: (OpaquePointer?) -> Void) {
    bytes.withUnsafeBytes { buffer in
      let bio = BIO_new_mem_buf(buffer.baseAddress, Int32(buffer.count))
      body(bio)
      BIO_free(bio)
    }
  }
}
