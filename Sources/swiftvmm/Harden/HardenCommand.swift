import ArgumentParser
import Glibc
import Host
import JSON
import LoaderHardening

/// `swiftvmm harden`: what a hardened guest needs, beside `run --harden`.
struct HardenCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "harden",
    abstract: "Policies, keys, signed modules and audits of hardened guests.",
    discussion: "See docs/hardening.md. The policy is for 'swiftvmm run --harden POLICY'.",
    subcommands: [Check.self, KeyGen.self, Sign.self, Timeline.self])

  struct Check: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Check a policy and say what it means.")

    @Argument(help: "The policy, a JSON file.")
    var policy: String

    func run() throws {
      let policy = try RunHardening.policy(policy)
      for line in policy.summary { print(line) }
    }
  }

  struct KeyGen: ParsableCommand {
    static let configuration = CommandConfiguration(
      commandName: "keygen",
      abstract: "Make a key to sign modules with, and print the public one for policies.")

    @Argument(help: "Where the secret key goes: a new file that its owner alone may read.")
    var secret: String

    func run() throws {
      var key = [UInt8](repeating: 0, count: Ed25519.secretSize)
      guard getentropy(&key, key.count) == 0 else { throw Failure.input("the kernel gave no random bytes") }
      try OutputFile.write(
        Array((Hexadecimal.text(key) + "\n").utf8), to: secret, flags: O_WRONLY | O_CREAT | O_EXCL, mode: 0o600)
      print(Hexadecimal.text(Ed25519.publicKey(key)))
    }
  }

  struct Sign: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Sign a module: its bytes, and the signature after them.")

    @Option(help: "The secret key, as keygen wrote it.")
    var key: String

    @Argument(help: "The module, a relocatable ELF file.")
    var module: String

    @Argument(help: "Where the signed module goes.")
    var output: String

    func run() throws {
      let text = String(decoding: try InputFile.bytes(key), as: UTF8.self)
      guard let secret = Hexadecimal.bytes(text.filter { !$0.isWhitespace }), secret.count == Ed25519.secretSize else {
        throw Failure.notAKey(path: key)
      }
      try OutputFile.write(Hypercall.signed(InputFile.bytes(module), secret: secret), to: output)
    }
  }

  struct Timeline: ParsableCommand {
    static let configuration = CommandConfiguration(
      abstract: "Draw an audit as a page: each vCPU's views over time, and what was denied.")

    @Argument(help: "The audit, as run --audit wrote it.")
    var audit: String

    @Argument(help: "The page, HTML without anything beside it.")
    var page: String

    func run() throws {
      let text = String(decoding: try InputFile.bytes(audit), as: UTF8.self)
      let events: [AuditEvent]
      do { events = try AuditLog.events(text) } catch { throw Failure.hardening(path: audit, error) }
      try OutputFile.write(Array(AuditTimeline(events).html.utf8), to: page)
    }
  }
}

/// Files that commands write whole.
enum OutputFile {
  static func write(
    _ bytes: [UInt8], to path: String, flags: Int32 = O_WRONLY | O_CREAT | O_TRUNC, mode: mode_t = 0o644
  ) throws(Failure) {
    let descriptor = open(path, flags | O_CLOEXEC, mode)
    guard descriptor >= 0 else { throw .output(path: path, reason: HostError.reason(errno)) }
    let file = FileDescriptor(owning: descriptor)
    let result = bytes.withUnsafeBytes { buffer in
      Result { () throws(HostError) in try file.writeAll(buffer) }
    }
    if case .failure(let error) = result { throw .output(path: path, reason: HostError.reason(error.errno)) }
  }
}
