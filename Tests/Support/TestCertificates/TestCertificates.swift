import Foundation

/// A CA and what it has signed, in a folder with QEMU's names, which goes away with its owner. Made by `openssl`.
public final class TestCertificates {
  /// Whether they can be made.
  public static let canBeMade = access("/usr/bin/openssl", X_OK) == 0

  /// The folder.
  public let path: String

  /// A CA, a server called `localhost`, 127.0.0.1 and ::1, and a client.
  public init() throws {
    path = "/tmp/swiftvmm-tls-" + UUID().uuidString.prefix(8)
    try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: true)
    try write("[req]\ndistinguished_name=dn\n[dn]\n", to: "req.cnf")
    try openssl(
      request("ca") + [
        "-x509", "-out", path + "/ca-cert.pem", "-days", "2", "-addext", "basicConstraints=critical,CA:TRUE",
      ]
        + ["-addext", "keyUsage=critical,keyCertSign,cRLSign"])
    try issue("server", purpose: "serverAuth")
    try issue("client", purpose: "clientAuth")
  }

  deinit { try? FileManager.default.removeItem(atPath: path) }

  /// Has the CA sign `NAME-cert.pem` for a new key, `NAME-key.pem`.
  public func issue(
    _ name: String, purpose: String, names: String = "DNS:localhost,IP:127.0.0.1,IP:::1", days: Int = 2,
    key: [String] = TestCertificates.ellipticKey
  ) throws {
    try openssl(request(name, key: key) + ["-out", path + "/\(name).csr"])
    try write("subjectAltName=\(names)\nextendedKeyUsage=\(purpose)\n", to: "extensions")
    try openssl([
      "x509", "-req", "-in", path + "/\(name).csr", "-CA", path + "/ca-cert.pem", "-CAkey", path + "/ca-key.pem",
      "-days", "\(days)", "-extfile", path + "/extensions", "-out", path + "/\(name)-cert.pem",
    ])
  }

  /// Writes the CA's list of what is revoked, which is `NAME-cert.pem`, or nothing.
  public func revoke(_ name: String?) throws {
    try write("[ca]\ndefault_ca=d\n[d]\ndatabase=\(path)/index\ndefault_md=sha256\ndefault_crl_days=2\n", to: "ca.cnf")
    try write("", to: "index")
    let authority = [
      "ca", "-config", path + "/ca.cnf", "-cert", path + "/ca-cert.pem", "-keyfile", path + "/ca-key.pem",
    ]
    if let name { try openssl(authority + ["-revoke", path + "/\(name)-cert.pem"]) }
    try openssl(authority + ["-gencrl", "-out", path + "/ca-crl.pem"])
  }

  /// A copy of files of another folder, over what is here.
  public func copy(_ files: String..., from other: TestCertificates) throws {
    for file in files {
      try? FileManager.default.removeItem(atPath: path + "/" + file)
      try FileManager.default.copyItem(atPath: other.path + "/" + file, toPath: path + "/" + file)
    }
  }

  /// Removes files.
  public func remove(_ files: String...) throws {
    for file in files { try FileManager.default.removeItem(atPath: path + "/" + file) }
  }

  /// Writes a file.
  public func write(_ text: String, to file: String) throws {
    try text.write(toFile: path + "/" + file, atomically: true, encoding: .utf8)
  }

  /// How keys are made unless told.
  public static let ellipticKey = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]

  private func request(_ name: String, key: [String] = TestCertificates.ellipticKey) -> [String] {
    ["req", "-new", "-config", path + "/req.cnf", "-nodes", "-subj", "/CN=\(name)"] + key
      + ["-keyout", path + "/\(name)-key.pem"]
  }

  /// Runs the command.
  public func openssl(_ arguments: [String]) throws {
    let process = Process()
    process.executableURL = URL(fileURLWithPath: "/usr/bin/openssl")
    process.arguments = arguments
    process.standardInput = FileHandle.nullDevice
    process.standardOutput = FileHandle.nullDevice
    let errors = Pipe()
    process.standardError = errors
    try process.run()
    let text = errors.fileHandleForReading.readDataToEndOfFile()
    process.waitUntilExit()
    guard process.terminationStatus == 0 else { throw Failed(text: String(decoding: text, as: UTF8.self)) }
  }

  private struct Failed: Error {
    let text: String
  }
}
