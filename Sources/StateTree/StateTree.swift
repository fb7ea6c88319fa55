/// Why a saved state cannot be used.
public enum StateError: Error, Equatable, CustomStringConvertible {
  /// The bytes are not a saved state of this format.
  case notAState
  /// The bytes end early or a length points outside them.
  case truncated(node: String)
  /// A node was written by a version that this reader does not know.
  case version(node: String, found: UInt32, known: ClosedRange<UInt32>)
  /// Another node was expected here.
  case unexpected(node: String, wanted: String)
  /// A child that the reader needs is missing.
  case missing(node: String, child: String)
  /// A value that the reader cannot accept.
  case invalid(node: String, field: String, value: UInt64)
  /// The node holds more than its version defines.
  case trailing(node: String, bytes: Int)
  /// The tree is deeper than any that is ever written.
  case tooDeep

  /// One line: the node, what is wrong with it.
  public var description: String {
    switch self {
    case .notAState: "not a saved machine state"
    case .truncated(let node): "saved state of \(node) is truncated"
    case .version(let node, let found, let known):
      "saved state of \(node) has version \(found); this program reads \(known.lowerBound) to \(known.upperBound)"
    case .unexpected(let node, let wanted): "saved state holds \(node) where \(wanted) was expected"
    case .missing(let node, let child): "saved state of \(node) lacks \(child)"
    case .invalid(let node, let field, let value): "saved state of \(node): \(field) cannot be \(value)"
    case .trailing(let node, let bytes): "saved state of \(node) has \(bytes) bytes too many"
    case .tooDeep: "saved state is nested too deeply"
    }
  }
}

/// One component's saved state: a name, the version of its payload, the payload, and its parts.
///
/// Every component versions its own payload, so that adding a device or a field never breaks the rest.
public struct StateNode: Equatable, Sendable {
  /// The component's name, unique among its siblings.
  public var name: String
  /// Version of the payload's layout.
  public var version: UInt32
  /// Little-endian fields, as `StateWriter` lays them out.
  public var payload: [UInt8]
  /// The component's parts.
  public var children: [StateNode]

  /// A node with the fields that `body` writes.
  public init(
    _ name: String, version: UInt32, children: [StateNode] = [], _ body: (inout StateWriter) -> Void = { _ in }
  ) {
    self.name = name
    self.version = version
    self.children = children
    var writer = StateWriter()
    body(&writer)
    payload = writer.bytes
  }

  /// The child called `name`.
  public func child(_ name: String) throws(StateError) -> StateNode {
    guard let child = children.first(where: { $0.name == name }) else {
      throw .missing(node: self.name, child: name)
    }
    return child
  }

  /// Reads the payload of a node that must be called `name` and have one of `versions`; all of it must be read.
  public func read<Value>(
    _ name: String, versions: ClosedRange<UInt32>,
    _ body: (inout StateReader, _ version: UInt32) throws(StateError) -> Value
  ) throws(StateError) -> Value {
    guard self.name == name else { throw .unexpected(node: self.name, wanted: name) }
    guard versions.contains(version) else { throw .version(node: name, found: version, known: versions) }
    var reader = StateReader(node: name, bytes: payload)
    let value = try body(&reader, version)
    guard reader.remaining == 0 else { throw .trailing(node: name, bytes: reader.remaining) }
    return value
  }
}

/// A component whose state can be saved and restored.
public protocol Stateful: AnyObject {
  /// The state now. The machine is paused while it is called.
  func save() -> StateNode
  /// Puts a saved state in place of the present one; the present one is kept on an error.
  func restore(_ node: StateNode) throws(StateError)
}
