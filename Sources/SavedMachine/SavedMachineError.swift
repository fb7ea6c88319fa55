import Host
import StateTree

/// Why a saved machine could not be written or read.
public enum SavedMachineError: Error, Equatable, CustomStringConvertible {
  /// The file does not begin as one.
  case notASavedMachine(path: String)
  /// A version that this program does not read.
  case version(path: String, found: UInt32, known: [UInt32])
  /// The file was changed or cut, or is no work of this program.
  case damaged(path: String, part: Part)
  /// The state in it is not what was written.
  case state(path: String, StateError)
  /// The machine's RAM has another size.
  case memorySize(path: String, saved: UInt64, here: UInt64)
  /// The machine is made in another way.
  case differs(path: String, what: String, saved: String, here: String)
  /// The guest has what the engine here cannot give it.
  case lacks(path: String, engine: String, [String])
  /// The host failed.
  case host(HostError)

  /// A part of the file.
  public enum Part: String, Sendable {
    /// The first page.
    case header
    /// Where the header says that something is.
    case bounds = "size"
    /// The table of RAM's checksums.
    case checksums
    /// RAM.
    case memory
  }

  /// One line: the file, what is wrong with it, and what to do.
  public var description: String {
    switch self {
    case .notASavedMachine(let path): "\(path) is no saved machine; give a file that 'swiftvmm save' wrote"
    case .version(let path, let found, let known):
      "\(path) is a saved machine of version \(found), and this program reads "
        + "\(known.map { "\($0)" }.joined(separator: ", ")): use the swiftvmm that wrote it"
    case .damaged(let path, let part): "\(path) is damaged: its \(part.rawValue) is not as it was written; save again"
    case .state(let path, let error): "\(path): \(error)"
    case .memorySize(let path, let saved, let here):
      "\(path) holds \(saved >> 10) KiB of RAM, and this machine has \(here >> 10) KiB: give the --memory it was saved with"
    case .differs(let path, let what, let saved, let here):
      "\(path) was saved with \(what) \(saved), and this machine has \(here): give the options that it was started with"
    case .lacks(let path, let engine, let what):
      "\(path) cannot go on in engine \(engine) here, which lacks what its guest has seen: \(what.joined(separator: ", ")); "
        + "a machine that is to change engines is started with --cpu common"
    case .host(let error): "\(error)"
    }
  }
}
