import JSON

/// Why a policy, a key or a signed file cannot be used.
public enum HardeningError: Error, Equatable, CustomStringConvertible {
  case json(JSONError)
  case notAnObject(where: String)
  case unknownKey(String, where: String, known: [String])
  case version(Int64?, known: Int)
  case value(key: String, expected: String)
  case key(index: Int)
  case keysMissing
  case range(index: Int)
  case auditTooOld(line: Int)

  /// One line: what is wrong, where, and what to do.
  public var description: String {
    switch self {
    case .json(let error): "the policy is not JSON: \(error)"
    case .notAnObject(let place): "\(place) is not a JSON object"
    case .unknownKey(let key, let place, let known):
      "\(place) has no member \(key): known are \(known.joined(separator: ", "))"
    case .version(let found, let known):
      "the policy's version is \(found.map { "\($0)" } ?? "missing"): write \"version\": \(known)"
    case .value(let key, let expected): "the policy's \(key) is not what it must be: \(expected)"
    case .key(let index):
      "key \(index) of the policy is no Ed25519 public key: 64 hexadecimal digits, as harden keygen prints"
    case .keysMissing: "the policy requires signatures and has no keys: add some, or set signatures.required to false"
    case .range(let index):
      "range \(index) of the policy's protect is not whole pages: give start and size as multiples of 0x1000"
    case .auditTooOld(let line): "line \(line) is not an audit event of swiftvmm"
    }
  }
}

/// The texts that an audit gives as reasons.
enum DenialReason: CustomStringConvertible {
  case loaderMiddle
  case loaderData
  case loaderMoved
  case protected(String)
  case notExecutable
  case notReadable
  case notWritable
  case exitNotRegistered
  case permissionFromKernel
  case registeredAfterLock
  case writableAndExecutable
  case signatureMissing
  case signatureWrong
  case moduleWritable
  case device
  case pinned(String)
  case loaderRange
  case repeated

  var description: String {
    switch self {
    case .loaderMiddle: "entry into the loader elsewhere than at an entry point"
    case .loaderData: "access to the loader's memory from outside"
    case .loaderMoved: "the page tables no longer lead to the registered loader"
    case .protected(let name): "access to protected range \(name)"
    case .notExecutable: "execution of a page that is not executable"
    case .notReadable: "read of a page that is not readable"
    case .notWritable: "write to a page that is not writable"
    case .exitNotRegistered: "the loader was left elsewhere than at an exit"
    case .permissionFromKernel: "request for a permission from outside the loader"
    case .registeredAfterLock: "registration after the lock"
    case .writableAndExecutable: "a page would be writable and executable"
    case .signatureMissing: "execution asked for without a verified module"
    case .signatureWrong: "the module's signature is missing or not by a known key"
    case .moduleWritable: "the module can still be written while it is verified"
    case .device: "a device's access to protected memory"
    case .pinned(let register): "change of \(register)"
    case .loaderRange: "request for a permission on the loader's own memory"
    case .repeated: "the guest cannot take the exception for an access that is forbidden"
    }
  }
}
