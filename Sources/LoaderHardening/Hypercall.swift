/// The hypercall ABI, version 1.0: docs/hardening.md. A guest reads four bytes from `port` with the function in EDI and
/// arguments in RSI, RBX, RCX and R8; what it reads is the result, negative for an error. A port, since a hypercall
/// instruction never leaves some KVMs.
public enum Hypercall: UInt32, Sendable, CaseIterable {
  /// The result is the version: major << 16 | minor.
  case version = 0
  /// RSI: the loader's guest-physical start; RBX: bytes; RCX: its linear start. Whole pages.
  case registerLoader = 1
  /// RSI: guest-physical address where the loader may be entered.
  case addEntry = 2
  /// RSI: guest-physical address where the loader may be left to; without any, all that the kernel may execute.
  case addExit = 3
  /// Nothing is registered after this, and permissions change by the loader's request alone.
  case lock = 4
  /// RSI: guest-physical start; RBX: bytes; RCX: bit 0 the kernel's view, bit 1 the loader's; R8: bit 0 R, 1 W, 2 X.
  case setPermission = 5
  /// RSI: guest-physical address. Bits 0-2 of the result: R, W, X in the kernel's view; 4-6: in the loader's; 8: the loader's
  /// is active; 9: locked.
  case query = 6
  /// RSI: guest-physical start of a signed module; RBX: bytes. The result is the number of the key.
  case verify = 7
  /// RSI and RBX go to the audit.
  case note = 8

  /// Where guests call.
  public static let port: UInt16 = 0x560
  /// The version of this ABI.
  public static let versionNumber: UInt32 = 1 << 16

  /// What a call failed with.
  enum Failure: Int32 {
    case denied = -1
    case badSignature = -5
    case invalid = -22
    case unknown = -38
    case full = -28

    var result: UInt32 { UInt32(bitPattern: rawValue) }
  }

  /// Bytes that signed modules end with: 8 bytes `SVMMSIG1`, then the signature of all before them.
  public static let signatureMagic: [UInt8] = Array("SVMMSIG1".utf8)
  /// Bytes of what follows a signed module.
  public static var trailerSize: Int { signatureMagic.count + Ed25519.signatureSize }

  /// A module with its signature.
  public static func signed(_ module: [UInt8], secret: [UInt8]) -> [UInt8] {
    module + signatureMagic + Ed25519.sign(module, secret: secret)
  }

  /// Which of the keys signed a module; nil where none did.
  public static func signer(of module: [UInt8], keys: [[UInt8]]) -> Int? {
    let size = module.count - trailerSize
    guard size > 0, Array(module[size..<size + signatureMagic.count]) == signatureMagic else { return nil }
    let signature = Array(module[(size + signatureMagic.count)...])
    let message = Array(module[..<size])
    return keys.firstIndex { Ed25519.verify(signature, message, key: $0) }
  }
}
