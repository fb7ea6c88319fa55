import Foundation
import TestCertificates
import Testing

@testable import TLS

/// What is found wrong with a folder before anybody connects.
@Suite(.enabled(if: TestCertificates.canBeMade, "needs openssl"))
struct CredentialsTests {
  private func failure(_ folder: String, _ endpoint: TLSCredentials.Endpoint) -> TLSError? {
    do throws(TLSError) {
      _ = try TLSCredentials(directory: folder, endpoint: endpoint)
      return nil
    } catch {
      return error
    }
  }

  @Test func aWholeFolderServesBothEnds() throws {
    let certificates = try TestCertificates()
    #expect(failure(certificates.path, .server) == nil)
    #expect(failure(certificates.path, .client) == nil)
    try certificates.remove("client-cert.pem", "client-key.pem")
    #expect(failure(certificates.path, .client) == nil)
  }

  @Test(arguments: ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
  func aMissingFileIsNamed(file: String) throws {
    let certificates = try TestCertificates()
    try certificates.remove(file)
    #expect(failure(certificates.path, .server)?.description.contains("/\(file)") == true)
  }

  @Test func halfOfAClientIsNoClient() throws {
    let certificates = try TestCertificates()
    let path = certificates.path
    try certificates.remove("client-key.pem")
    #expect(
      failure(path, .client) == .incomplete(present: path + "/client-cert.pem", missing: path + "/client-key.pem"))
    try certificates.issue("client", purpose: "clientAuth")
    try certificates.remove("client-cert.pem")
    #expect(
      failure(path, .client) == .incomplete(present: path + "/client-key.pem", missing: path + "/client-cert.pem"))
  }

  @Test(arguments: [
    ("ca-cert.pem", TLSError.FileKind.certificate), ("ca-crl.pem", .revocations), ("server-cert.pem", .certificate),
    ("server-key.pem", .key),
  ])
  func whatIsNoPEMIsNamed(file: String, kind: TLSError.FileKind) throws {
    let certificates = try TestCertificates()
    let path = certificates.path + "/" + file
    try certificates.revoke(nil)
    let whole = try String(contentsOfFile: path, encoding: .utf8)
    for text in ["", "no PEM\n", String(whole.prefix(whole.count * 2 / 3)), String(repeating: "A", count: 5000)] {
      try certificates.write(text, to: file)
      #expect(failure(certificates.path, .server) == .notPEM(path: path, kind), "\(text.prefix(20))")
    }
    if kind != .key {
      // A second one that is cut off.
      try certificates.write(whole + whole.prefix(100), to: file)
      #expect(failure(certificates.path, .server) == .notPEM(path: path, kind))
    }
    try certificates.write(String(repeating: "A", count: 2 << 20), to: file)
    #expect(failure(certificates.path, .server) == .file(path: path, errno: EFBIG))
    try certificates.remove(file)
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: false)
    #expect(failure(certificates.path, .server) == .file(path: path, errno: EISDIR))
  }

  @Test func aKeyThatIsAnothersIsRefused() throws {
    let (certificates, other) = (try TestCertificates(), try TestCertificates())
    try certificates.copy("server-key.pem", from: other)
    let path = certificates.path
    #expect(
      failure(path, .server) == .keyMismatch(key: path + "/server-key.pem", certificate: path + "/server-cert.pem"))
  }

  @Test func nobodyIsAskedForAPassword() throws {
    let certificates = try TestCertificates()
    let path = certificates.path + "/server-key.pem"
    try certificates.openssl(["ec", "-in", path, "-aes128", "-passout", "pass:secret", "-out", path])
    #expect(failure(certificates.path, .server) == .encryptedKey(path: path))
  }

  @Test func anOwnCertificateThatNobodyWouldAcceptIsRefused() throws {
    func fault(_ change: (TestCertificates) throws -> Void) throws -> TLSError.CertificateFault? {
      let certificates = try TestCertificates()
      try change(certificates)
      guard case .ownCertificate(_, let fault) = failure(certificates.path, .server) else { return nil }
      return fault
    }
    #expect(try fault { try $0.issue("server", purpose: "serverAuth", days: -1) } == .expired)
    #expect(try fault { try $0.issue("server", purpose: "clientAuth") } == .purpose)
    #expect(try fault { try $0.copy("ca-cert.pem", from: TestCertificates()) } == .unknownCA)
    #expect(try fault { try $0.revoke("server") } == .revoked)
    #expect(try fault { try $0.issue("server", purpose: "serverAuth", key: ["-newkey", "rsa:1024"]) } == .weak)
    #expect(try fault { try $0.revoke(nil) } == nil)
  }
}
