import Glibc
import Host

/// A CA, a server called `localhost` and a client, for benchmarks with TLS: made by `openssl`, in a folder.
enum BenchCertificates {
  /// Says why there are none.
  static func make(in folder: String) -> String? {
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    for (name, options) in [
      ("ca", ["-addext", "keyUsage=keyCertSign"]), ("server", ["-addext", "subjectAltName=DNS:localhost"]),
      ("client", []),
    ] {
      let authority = ["-CA", folder + "/ca-cert.pem", "-CAkey", folder + "/ca-key.pem"]
      let files = [
        "-subj", "/CN=\(name)", "-keyout", "\(folder)/\(name)-key.pem", "-out", "\(folder)/\(name)-cert.pem",
      ]
      let status: Int32
      do throws(HostError) {
        status = try ChildProcess.run(
          ["openssl", "req", "-x509"] + key + files + options + (name == "ca" ? [] : authority)
        ).status
      } catch {
        return "TLS left out: \(error)"
      }
      if status != 0 { return "TLS left out: openssl ended with \(status)" }
    }
    return nil
  }
}
