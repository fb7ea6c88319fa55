import ArgumentParser
import BlockLayer
import Glibc
import Host
import JSON
import Machine
import Monitor

/// What a guest may do with the snapshots of its disks.
enum RecoveryPolicy: String, CaseIterable, ExpressibleByArgument {
  /// Nothing.
  case off
  /// Look at them.
  case readOnly = "read-only"
  /// Look at them, and write into layers that are thrown away.
  case copyOnWrite = "copy-on-write"
}

/// Why a guest does not get a snapshot. The guest and the audit are told the same.
enum RecoveryFault: Error {
  case notAllowed
  case revoked(String)
  case badIdentifier
  case noSnapshot(String)
  case noDisk(String)
  case badTime(String)
  case needsOne
  case quota(Int)
  case notAttached(String)
  case failed(String)

  var text: String {
    switch self {
    case .notAllowed: "this machine's guest has no right to its snapshots"
    case .revoked(let id): "the right to the snapshot \(id) was revoked"
    case .badIdentifier: "a snapshot's id is letters, digits, - . and _, 128 at most"
    case .noSnapshot(let wish): "no snapshot of this machine's disks is \(wish)"
    case .noDisk(let name): "there is no disk \(name)"
    case .badTime(let text): "\(text) is no time: give milliseconds since 1970, or YYYY-MM-DDTHH:MM:SSZ"
    case .needsOne: "say which one: snapshot, at, before or after"
    case .quota(let limit): "\(limit) snapshots are attached, which is as many as there may be: detach one"
    case .notAttached(let serial): "no snapshot is attached as \(serial)"
    case .failed(let reason): reason
    }
  }
}

/// Snapshots of a machine's disks for its guest: asked for through the agent, plugged in as disks of their own.
///
/// The catalogue is the chain: each layer below a disk's top is the disk as it was when that layer took its last write.
final class GuestSnapshots: @unchecked Sendable {
  /// Snapshots that are attached at a time.
  static let mostAttached = 4

  /// A snapshot of a disk.
  struct Snapshot {
    var id: String
    var disk: String
    var parent: String?
    /// Milliseconds since 1970, of its last write.
    var time: UInt64
    var size: UInt64
    var format: String
    var node: String

    var json: JSONValue {
      [
        "id": .string(id), "disk": .string(disk), "parent": parent.map { .string($0) } ?? .null,
        "time": JSONValue(time), "utc": .string(RecoveryTime.text(time)), "size": JSONValue(size),
        "format": .string(format),
      ]
    }
  }

  private final class AuditFile: Sendable {
    let file: FileDescriptor
    init(_ path: String) throws(HostError) {
      file = try FileDescriptor.open(path, O_WRONLY | O_CREAT | O_APPEND, mode: 0o600)
    }
  }

  private struct Attached {
    var id: String
    var node: String
    var file: String
  }

  private let control: DiskControl
  private let agent: AgentControl
  private let policy: RecoveryPolicy
  private let audit: AuditFile?
  // These are the monitor thread's that runs the requests, one at a time.
  private let worker: RecoveryWorker
  private var attached: [String: Attached] = [:]
  private var revoked: Set<String> = []
  private var nextNumber = 1

  init(_ control: DiskControl, _ agent: AgentControl, policy: RecoveryPolicy, audit: String?) throws(Failure) {
    self.control = control
    self.agent = agent
    self.policy = policy
    do throws(HostError) {
      if let audit { self.audit = try AuditFile(audit) } else { self.audit = nil }
      worker = try RecoveryWorker()
    } catch {
      throw .host(error)
    }
    for request in Request.allCases {
      agent.offer(request.rawValue) { [weak self] arguments, done in
        guard let self else { return done(.failure(.init(text: "the machine ends"))) }
        let answer = Answer(done)
        // Plugging waits for the disks' thread, which this is.
        worker.run { self.serve(request, arguments, answer) }
      }
    }
    control.onDeviceDeleted = { [weak self] name in self?.deviceDeleted(name) }
  }

  private struct Answer: @unchecked Sendable {
    let done: (Result<JSONValue, AgentControl.ServiceError>) -> Void
    init(_ done: @escaping (Result<JSONValue, AgentControl.ServiceError>) -> Void) { self.done = done }
  }

  /// What a guest may ask.
  private enum Request: String, CaseIterable {
    case list = "snapshots"
    case attach = "snapshot-attach"
    case detach = "snapshot-detach"
  }

  private func answer(_ request: Request, _ arguments: JSONObject) -> Result<JSONValue, RecoveryFault> {
    if policy == .off { return .failure(.notAllowed) }
    return switch request {
    case .list: list(arguments)
    case .attach: attach(arguments)
    case .detach: detach(arguments)
    }
  }

  private func serve(_ request: Request, _ arguments: JSONObject, _ answer: Answer) {
    let outcome = self.answer(request, arguments)
    var entry: JSONObject = [
      "time": .string(RecoveryTime.text(RecoveryTime.now())), "request": .string(request.rawValue),
    ]
    entry["arguments"] = .object(arguments)
    switch outcome {
    case .success(let value): entry["granted"] = value
    case .failure(let fault): entry["refused"] = .string(fault.text)
    }
    write(entry)
    control.disks.thread.perform {
      answer.done(outcome.mapError { AgentControl.ServiceError(text: $0.text) })
    }
  }

  private func write(_ entry: JSONObject) {
    guard let audit else { return }
    let bytes = Array((JSONValue.object(entry).serialized() + "\n").utf8)
    _ = bytes.withUnsafeBytes { buffer in
      Result { () throws(HostError) in try audit.file.writeAll(buffer) }
    }
  }

  // MARK: The catalogue

  private func catalogue() -> Result<[Snapshot], RecoveryFault> {
    do throws(MonitorError) {
      let all = try control.run { graph in
        graph.disks.values.filter { !Self.isOwn($0) }.flatMap { Self.snapshots(of: $0) }
      }
      return .success(all.sorted { $0.time < $1.time })
    } catch {
      return .failure(.failed("\(error)"))
    }
  }

  private static func snapshots(of disk: LiveDisk) -> [Snapshot] {
    disk.top.chain.compactMap { upper in
      // What a backup has put on top is gone soon, and with it this state of the disk.
      guard let layer = upper.backing, !upper.path.hasSuffix(BackupJournal.overlaySuffix) else { return nil }
      guard let time = RecoveryTime.modified(layer.path) else { return nil }
      return Snapshot(
        id: name(layer.path), disk: disk.name, parent: layer.backing.map { name($0.path) }, time: time,
        size: layer.node.size, format: layer.format.rawValue, node: layer.name)
    }
  }

  private static let nodePrefix = "#snapshot-"

  /// Whether a disk is a snapshot that was plugged in here: no listing of the machine's disks has it.
  static func isOwn(_ disk: LiveDisk) -> Bool { disk.top.name.hasPrefix(nodePrefix) }

  private static func name(_ path: String) -> String { String(path.split(separator: "/").last ?? "") }

  private func list(_ arguments: JSONObject) -> Result<JSONValue, RecoveryFault> {
    catalogue().map { all in
      let attached = attached.map { serial, entry -> JSONValue in
        ["serial": .string(serial), "id": .string(entry.id)]
      }
      return ["snapshots": .array(all.map(\.json)), "attached": .array(attached)]
    }
  }

  private func find(_ arguments: JSONObject) throws(RecoveryFault) -> Snapshot {
    var all = try catalogue().get()
    if let disk = arguments["disk"] {
      all.removeAll { $0.disk != disk.stringValue }
      if all.isEmpty { throw .noDisk(disk.stringValue.map { String($0.prefix(64)) } ?? "of that name") }
    }
    if let wish = arguments["snapshot"] {
      guard let id = wish.stringValue, Self.isIdentifier(id) else { throw .badIdentifier }
      guard let found = all.first(where: { $0.id == id }) else { throw .noSnapshot("called \(id)") }
      return found
    }
    for (key, choose) in [
      ("at", { snapshots, time in snapshots.first { $0.time == time } }),
      ("before", { snapshots, time in snapshots.last { $0.time < time } }),
      ("after", { snapshots, time in snapshots.first { $0.time > time } }),
    ] as [(String, ([Snapshot], UInt64) -> Snapshot?)] {
      guard let value = arguments[key] else { continue }
      guard let time = value.unsignedValue ?? value.stringValue.flatMap(RecoveryTime.parse) else {
        throw .badTime(String(value.serialized().prefix(64)))
      }
      guard let found = choose(all, time) else { throw .noSnapshot("\(key) \(RecoveryTime.text(time))") }
      return found
    }
    throw .needsOne
  }

  private static func isIdentifier(_ text: String) -> Bool {
    !text.isEmpty && text.utf8.count <= 128 && !text.hasPrefix(".")
      && text.utf8.allSatisfy { byte in
        (0x30...0x39).contains(byte) || (0x41...0x5a).contains(byte) || (0x61...0x7a).contains(byte)
          || "-._".utf8.contains(byte)
      }
  }

  // MARK: Attaching

  private func attach(_ arguments: JSONObject) -> Result<JSONValue, RecoveryFault> {
    do throws(RecoveryFault) {
      let snapshot = try find(arguments)
      if revoked.contains(snapshot.id) { throw .revoked(snapshot.id) }
      guard attached.count < Self.mostAttached else { throw .quota(Self.mostAttached) }
      let serial = "snapshot-\(nextNumber)"
      nextNumber += 1
      do throws(MonitorError) {
        try plugIn(snapshot, as: serial)
      } catch {
        throw .failed("\(error)")
      }
      var value = snapshot.json.objectValue ?? [:]
      value["serial"] = .string(serial)
      value["writable"] = .bool(policy == .copyOnWrite)
      let event = value
      control.disks.thread.perform { [agent] in agent.tell("snapshot-attached", event) }
      return .success(.object(value))
    } catch {
      return .failure(error)
    }
  }

  private func plugIn(_ snapshot: Snapshot, as serial: String) throws(MonitorError) {
    let isWritable = policy == .copyOnWrite
    let (header, path) = try control.run { graph throws(BlockError) in
      let layer = try graph.node(snapshot.node)
      return (graph.overlayHeader(above: layer), BlockGraph.absolutePath(layer.path) + ".\(serial)-\(getpid())")
    }
    do throws(BlockError) {
      try BlockGraph.makeOverlayFile(path, header, queue: control.disks.thread.queue)
    } catch {
      unlink(path)
      throw .refused("\(error)")
    }
    defer {
      // What is open stays until it is closed, and nobody else has a use for it.
      unlink(path)
    }
    try control.run { graph throws(BlockError) in
      _ = try graph.openTemporary(path, name: "#" + serial, above: graph.node(snapshot.node), isWritable: isWritable)
    }
    do throws(MonitorError) {
      try control.plugIn(serial, layer: "#" + serial, serial: serial)
    } catch {
      try? control.delete("#" + serial)
      throw error
    }
    attached[serial] = Attached(id: snapshot.id, node: "#" + serial, file: path)
  }

  private func detach(_ arguments: JSONObject) -> Result<JSONValue, RecoveryFault> {
    let serial = arguments["serial"]?.stringValue ?? ""
    guard attached[serial] != nil else { return .failure(.notAttached(String(serial.prefix(64)))) }
    do throws(MonitorError) { try control.unplug(serial) } catch { return .failure(.failed("\(error)")) }
    return .success(["serial": .string(serial)])
  }

  /// The guest has let go of a disk.
  private func deviceDeleted(_ name: String) {
    worker.run { [self] in
      guard let entry = attached.removeValue(forKey: name) else { return }
      try? control.delete(entry.node)
      write([
        "time": .string(RecoveryTime.text(RecoveryTime.now())), "detached": .string(name), "id": .string(entry.id),
      ])
      control.disks.thread.perform { [agent] in
        agent.tell("snapshot-detached", ["serial": .string(name), "id": .string(entry.id)])
      }
    }
  }

  // MARK: The host's side

  /// Takes the right to a snapshot away, or gives it back.
  private func setRevoked(_ id: String, _ isRevoked: Bool) {
    worker.wait { [self] in
      if isRevoked { revoked.insert(id) } else { revoked.remove(id) }
      write([
        "time": .string(RecoveryTime.text(RecoveryTime.now())), "right": .string(isRevoked ? "revoked" : "given"),
        "id": .string(id),
      ])
    }
  }

  /// QMP's commands on the snapshots that a guest may have.
  var commands: [QMPCommand] {
    [
      QMPCommand("x-swiftvmm-query-snapshots", returns: .any) { [self] _, _ throws(MonitorError) in
        switch worker.wait({ [self] in list([:]) }) {
        case .success(let value): value
        case .failure(let fault): throw .refused(fault.text)
        }
      },
      QMPCommand(
        "x-swiftvmm-snapshot-right", [.required("id", .string), .required("allowed", .bool)]
      ) { [self] _, arguments in
        setRevoked(arguments.text("id"), arguments["allowed"]?.boolValue == false)
        return [:]
      },
    ]
  }
}

/// A thread for what waits for the disks' thread.
final class RecoveryWorker: @unchecked Sendable {
  private let loop: EventLoop
  private var thread: HostThread?

  init() throws(HostError) {
    loop = try EventLoop()
    let loop = loop
    thread = try HostThread(name: "recovery") { loop.run() }
  }

  deinit {
    loop.stop()
    thread?.join()
  }

  func run(_ body: @escaping @Sendable () -> Void) { loop.execute(body) }

  /// Runs `body` on the thread and waits for what it returns.
  func wait<Result>(_ body: @escaping () -> Result) -> Result {
    let outcome = Condition<Carried<Result>?>(nil)
    let work = Carried(body)
    loop.execute {
      let result = Carried(work.value())
      outcome.withLock { $0 = result }
    }
    return outcome.wait { $0 }.value
  }

  private struct Carried<Value>: @unchecked Sendable {
    let value: Value
    init(_ value: Value) { self.value = value }
  }
}

/// Times of snapshots: milliseconds since 1970, UTC.
enum RecoveryTime {
  static func now() -> UInt64 {
    var time = timespec()
    clock_gettime(CLOCK_REALTIME, &time)
    return UInt64(time.tv_sec) * 1000 + UInt64(time.tv_nsec) / 1_000_000
  }

  /// When a file was last written to.
  static func modified(_ path: String) -> UInt64? {
    var status = stat()
    guard stat(path, &status) == 0, status.st_mtim.tv_sec >= 0 else { return nil }
    return UInt64(status.st_mtim.tv_sec) * 1000 + UInt64(status.st_mtim.tv_nsec) / 1_000_000
  }

  static func text(_ milliseconds: UInt64) -> String {
    var seconds = time_t(clamping: milliseconds / 1000)
    var parts = tm()
    guard gmtime_r(&seconds, &parts) != nil else { return "\(milliseconds)" }
    func two(_ value: Int32) -> String { value < 10 ? "0\(value)" : "\(value)" }
    return "\(parts.tm_year + 1900)-\(two(parts.tm_mon + 1))-\(two(parts.tm_mday))T\(two(parts.tm_hour)):"
      + "\(two(parts.tm_min)):\(two(parts.tm_sec))Z"
  }

  /// `YYYY-MM-DDTHH:MM:SSZ`.
  static func parse(_ text: String) -> UInt64? {
    let bytes = Array(text.utf8)
    guard bytes.count == 20 else { return nil }
    for (place, mark) in [(4, "-"), (7, "-"), (10, "T"), (13, ":"), (16, ":"), (19, "Z")] {
      guard bytes[place] == mark.utf8.first else { return nil }
    }
    func number(_ range: Range<Int>) -> Int32? {
      guard range.allSatisfy({ (0x30...0x39).contains(bytes[$0]) }) else { return nil }
      return range.reduce(0) { $0 * 10 + Int32(bytes[$1] - 0x30) }
    }
    guard let year = number(0..<4), let month = number(5..<7), let day = number(8..<10), let hour = number(11..<13),
      let minute = number(14..<16), let second = number(17..<19), year >= 1970, (1...12).contains(month),
      (1...31).contains(day), hour < 24, minute < 60, second < 61
    else { return nil }
    var parts = tm()
    (parts.tm_year, parts.tm_mon, parts.tm_mday) = (year - 1900, month - 1, day)
    (parts.tm_hour, parts.tm_min, parts.tm_sec) = (hour, minute, second)
    let seconds = timegm(&parts)
    return seconds < 0 ? nil : UInt64(seconds) * 1000
  }
}
