import Glibc
import Host

/// A CA, a server called `localhost` and a client, for benchmarks with TLS: made by `openssl`, in a folder.
enum BenchCertificates {
  /// Says why there are none.
  static func make(in folder: String) -> String? {
    let roles = [
      ("ca", "basicConstraints=critical,CA:TRUE"), ("server", "subjectAltName=DNS:localhost"),
      ("client", "extendedKeyUsage=clientAuth"),
    ]
    do {
      // The host's own configuration would make all of them CAs.
      let configuration = try TemporaryFile(Array("[req]\ndistinguished_name=dn\n[dn]\n".utf8))
      for (name, extensions) in roles {
        var command = ["openssl", "req", "-x509", "-config", configuration.path, "-subj", "/CN=\(name)", "-days", "2"]
        command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-addext", extensions]
        command += ["-keyout", "\(folder)/\(name)-key.pem", "-out", "\(folder)/\(name)-cert.pem"]
        if name != "ca" { command += ["-CA", folder + "/ca-cert.pem", "-CAkey", folder + "/ca-key.pem"] }
        let status = try ChildProcess.run(command).status
        if status != 0 { return "TLS left out: openssl ended with \(status)" }
      }
      return nil
    } catch {
      return "TLS left out: \(error)"
    }
  }
}
