import BlockLayer
import GuestAgent
import Host
import JSON
import Machine
import Monitor
import StateTree
import Virtio

/// The agent in the guest (docs/agent.md): what the host asks of it, and what it asks of the host.
final class AgentControl: @unchecked Sendable {
  static let portName = "org.swiftvmm.agent.0"
  /// Requests of the guest's that are answered in a burst at most: an agent that floods the host is not answered.
  private static let mostWaiting = 64

  /// What the host does for the guest. On the disks' thread; the answer may come later.
  typealias Service = (JSONObject, @escaping (Result<JSONValue, ServiceError>) -> Void) -> Void

  /// Why the guest does not get what it has asked for.
  struct ServiceError: Error {
    let text: String
  }

  private let ports: MachinePorts
  // These are the disks' thread's.
  private var lines = AgentLines()
  private var isOpen = false
  private var hello: JSONObject?
  private var malformed = 0
  private var nextID: UInt64 = 1
  private var waiting: [UInt64: (Result<JSONValue, AgentFault>) -> Void] = [:]
  private var services: [String: Service] = [:]
  /// Requests of the guest's that are being answered.
  private var answering: [UInt64] = []

  init(_ ports: MachinePorts) {
    self.ports = ports
    services["ping"] = { arguments, done in done(.success(.object(arguments))) }
    ports.thread.perform { [self] in
      ports.device?.onInput = { [weak self] _, bytes in self?.take(bytes) }
      ports.device?.onOpen = { [weak self] _, isOpen in self?.opened(isOpen) }
      ports.device?.onSave = { [weak self] in self?.save() }
      ports.device?.onRestore = { [weak self] node throws(StateError) in try self?.restore(node) }
    }
  }

  /// Offers something to the guest. Before it runs.
  func offer(_ name: String, _ service: @escaping Service) { services[name] = service }

  // MARK: What comes from the guest

  private func opened(_ isOpen: Bool) {
    self.isOpen = isOpen
    lines = AgentLines()
    hello = nil
    for (_, done) in waiting { done(.failure(.gone)) }
    waiting = [:]
  }

  private func take(_ bytes: [UInt8]) {
    lines.feed(bytes) { line in
      switch line {
      case .success(let message): take(message)
      case .failure(let error):
        malformed += 1
        // One answer a line, to nobody in particular: whoever sent it may look.
        send(.event(name: "malformed", arguments: ["reason": .string("\(error)")]))
      }
    }
  }

  private func take(_ message: AgentMessage) {
    switch message {
    case .event("hello", let arguments): hello = arguments
    case .event: break
    case .result(let id, let value): waiting.removeValue(forKey: id)?(.success(value))
    case .failure(let id, let text): waiting.removeValue(forKey: id)?(.failure(.refused(text)))
    case .request(let id, let name, let arguments):
      guard let service = services[name] else { return send(.failure(id: id, "unknown request \(name)")) }
      guard answering.count < Self.mostWaiting else {
        return send(.failure(id: id, "too many requests at a time"))
      }
      answering.append(id)
      service(arguments) { [self] outcome in
        if let place = answering.firstIndex(of: id) { answering.remove(at: place) }
        switch outcome {
        case .success(let value): send(.result(id: id, value))
        case .failure(let error): send(.failure(id: id, error.text))
        }
      }
    }
  }

  private func send(_ message: AgentMessage) {
    // A guest that does not read its answers does without them.
    _ = ports.device?.send(message.line, to: 0)
  }

  // MARK: Saved machines

  private static let nodeName = "agent"
  private static let longestHello = 64 << 10

  /// The conversation so far. What the host asks and waits for is this process's, and an answer to it nobody's.
  private func save() -> StateNode {
    StateNode(Self.nodeName, version: 1) { writer in
      writer.write(nextID)
      writer.write(UInt64(malformed))
      writer.write(lines.isDropping)
      writer.write(lines.line)
      writer.write(hello.map { JSONValue.object($0).serialized() } ?? "")
      writer.write(UInt32(answering.count))
      for id in answering { writer.write(id) }
    }
  }

  /// Goes on with it. Requests of the guest's that were being answered get no other answer.
  private func restore(_ node: StateNode) throws(StateError) {
    var unanswered: [UInt64] = []
    try node.read(Self.nodeName, versions: 1...1) { reader, _ throws(StateError) in
      nextID = try reader.read()
      malformed = Int(clamping: try reader.read(UInt64.self))
      let isDropping = try reader.read(Bool.self)
      lines = AgentLines(line: try reader.read(limit: AgentMessage.longestLine), isDropping: isDropping)
      let text = try reader.readString(limit: Self.longestHello)
      hello = (try? JSONValue(parsing: text))?.objectValue
      let count = try reader.read(UInt32.self)
      guard count <= Self.mostWaiting else { throw reader.invalid("requests", UInt64(count)) }
      for _ in 0..<count { unanswered.append(try reader.read()) }
    }
    for id in unanswered { send(.failure(id: id, "the machine was moved or restored meanwhile: ask again")) }
  }

  /// Tells the agent something. On the disks' thread.
  func tell(_ name: String, _ arguments: JSONObject) { send(.event(name: name, arguments: arguments)) }

  // MARK: What the host asks

  /// What is known of the agent.
  var state: JSONValue {
    ports.thread.perform { [self] in
      [
        "open": .bool(isOpen), "hello": hello.map { .object($0) } ?? .null, "malformed": JSONValue(malformed),
      ]
    }
  }

  /// Asks the agent and waits for its answer, `milliseconds` at most.
  func ask(_ name: String, _ arguments: JSONObject, milliseconds: UInt64) throws(AgentFault) -> JSONValue {
    let outcome = Condition<Result<JSONValue, AgentFault>?>(nil)
    let thread = ports.thread
    thread.perform { [self] in
      let id = nextID
      nextID += 1
      let timer = thread.loop.makeTimer { [weak self] in
        self?.waiting.removeValue(forKey: id)?(.failure(.timeout(name, milliseconds: milliseconds)))
      }
      waiting[id] = { result in
        timer.cancel()
        outcome.withLock { $0 = result }
      }
      timer.arm(at: monotonicNanoseconds() + milliseconds * 1_000_000)
      let line = AgentMessage.request(id: id, name: name, arguments: arguments).line
      if ports.device?.send(line, to: 0) != true { waiting.removeValue(forKey: id)?(.failure(.gone)) }
    }
    return try outcome.wait { $0 }.get()
  }
}

/// Why the agent in the guest has not done what it was asked for.
enum AgentFault: Error, CustomStringConvertible {
  case gone
  case timeout(String, milliseconds: UInt64)
  case refused(String)

  var description: String {
    switch self {
    case .gone: "no agent answers in the guest; start swiftvmm-agent there"
    case .timeout(let request, let milliseconds):
      "the agent in the guest has not answered \(request) within \(milliseconds) ms"
    case .refused(let text): "the agent in the guest refuses: \(text.prefix(200))"
    }
  }
}

/// QMP's commands on the agent.
enum AgentCommands {
  static func all(_ agent: AgentControl) -> [QMPCommand] {
    [
      QMPCommand("x-swiftvmm-query-agent", returns: .any) { _, _ in agent.state },
      QMPCommand(
        "x-swiftvmm-agent",
        [.required("request", .string), .optional("arguments", .any), .optional("timeout", .integer)], returns: .any
      ) { _, arguments throws(MonitorError) in
        let milliseconds = arguments["timeout"]?.unsignedValue ?? 5000
        guard (1...600_000).contains(milliseconds) else {
          throw .parameterValue("timeout", value: "\(milliseconds)")
        }
        do throws(AgentFault) {
          return try agent.ask(
            arguments.text("request"), arguments["arguments"]?.objectValue ?? [:], milliseconds: milliseconds)
        } catch {
          throw .refused("\(error)")
        }
      },
    ]
  }
}
