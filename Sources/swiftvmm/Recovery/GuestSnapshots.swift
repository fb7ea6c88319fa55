import ArgumentParser
import BlockLayer
import Glibc
import Host
import JSON
import Machine
import Monitor
import Synchronization

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
  case bytes(UInt64)
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
    case .bytes(let limit):
      "what is written to attached snapshots is \(limit) bytes, which is as much as there may be: detach one"
    case .notAttached(let serial): "no snapshot is attached as \(serial)"
    case .failed(let reason): reason
    }
  }
}

/// Snapshots of a machine's disks for its guest: asked for through the agent, plugged in as disks of their own.
///
/// Each layer below a disk's top is the disk as it was when the layer above was put on (`SnapshotKeeper`).
final class GuestSnapshots: @unchecked Sendable {
  /// Snapshots that are attached at a time.
  static let mostAttached = 4

  private final class AuditFile: Sendable {
    let file: FileDescriptor
    init(_ path: String) throws(HostError) {
      file = try FileDescriptor.open(path, O_WRONLY | O_CREAT | O_APPEND, mode: 0o600)
    }
  }

  private struct Attached {
    var id: String
    /// The disk's serial number, which is what the guest calls it.
    var serial: String
    var node: String
  }

  private let keeper: SnapshotKeeper
  private var control: DiskControl { keeper.control }
  private var worker: RecoveryWorker { keeper.worker }
  private let agent: AgentControl
  private let policy: RecoveryPolicy
  private let audit: AuditFile?
  // These are the monitor thread's that runs the requests, one at a time.
  /// By the devices' names.
  private var attached: [String: Attached] = [:]
  private var revoked: Set<String> = []
  private var nextNumber = 1
  /// The disks' thread's.
  private let quota: WriteQuota

  /// `quota`: bytes that the guest may write to attached snapshots together.
  init(
    _ keeper: SnapshotKeeper, _ agent: AgentControl, policy: RecoveryPolicy, quota: UInt64, audit: String?
  ) throws(Failure) {
    self.quota = WriteQuota(limit: quota)
    self.keeper = keeper
    self.agent = agent
    self.policy = policy
    do throws(HostError) {
      if let audit { self.audit = try AuditFile(audit) } else { self.audit = nil }
    } catch {
      throw .host(error)
    }
    for request in Request.allCases {
      agent.offer(request.rawValue) { [weak self] arguments, done in
        guard let self else { return done(.failure(.init(text: "the machine ends"))) }
        let answer = Answer(done)
        // Plugging waits for the disks' thread, which this is.
        self.worker.run { self.serve(request, arguments, answer) }
      }
    }
    let refused = Mutex<Set<String>>([])
    self.quota.onRefusal = { [weak self] disk in
      let name = disk.name
      // Once a disk: a guest that goes on trying fills no audit.
      guard let self, refused.withLock({ $0.insert(name).inserted }) else { return }
      self.worker.run { self.quotaUsedUp(name) }
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

  private typealias Snapshot = SnapshotKeeper.Snapshot

  private func catalogue() -> Result<[Snapshot], RecoveryFault> {
    do throws(MonitorError) { return .success(try keeper.snapshots()) } catch { return .failure(.failed("\(error)")) }
  }

  private static let nodePrefix = "#snapshot-"

  /// Whether a disk is a snapshot that was plugged in here: no listing of the machine's disks has it.
  static func isOwn(_ disk: LiveDisk) -> Bool { disk.top.name.hasPrefix(nodePrefix) }

  private func list(_ arguments: JSONObject) -> Result<JSONValue, RecoveryFault> {
    catalogue().map { all in
      let attached = attached.values.map { entry -> JSONValue in
        ["serial": .string(entry.serial), "id": .string(entry.id)]
      }
      return [
        "snapshots": .array(all.map(\.json)), "attached": .array(attached),
        "generations": .object(keeper.generations),
      ]
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
      guard let found = all.first(where: { $0.entry.id == id }) else { throw .noSnapshot("called \(id)") }
      return found
    }
    for (key, choose) in [
      ("at", { snapshots, time in snapshots.first { $0.entry.time == time } }),
      ("before", { snapshots, time in snapshots.last { $0.entry.time < time } }),
      ("after", { snapshots, time in snapshots.first { $0.entry.time > time } }),
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

  static func isIdentifier(_ text: String) -> Bool {
    !text.isEmpty && text.utf8.count <= SnapshotCatalogue.longestIdentifier && !text.hasPrefix(".")
      && text.utf8.allSatisfy(isIdentifier)
  }

  static func isIdentifier(_ byte: UInt8) -> Bool {
    (0x30...0x39).contains(byte) || (0x41...0x5a).contains(byte) || (0x61...0x7a).contains(byte)
      || "-._".utf8.contains(byte)
  }

  // MARK: Attaching

  private func attach(_ arguments: JSONObject) -> Result<JSONValue, RecoveryFault> {
    do throws(RecoveryFault) {
      let snapshot = try find(arguments)
      if revoked.contains(snapshot.entry.id) { throw .revoked(snapshot.entry.id) }
      guard attached.count < Self.mostAttached else { throw .quota(Self.mostAttached) }
      let isUsedUp = control.disks.thread.perform { [quota] in quota.used >= quota.limit }
      if policy == .copyOnWrite, isUsedUp { throw .bytes(quota.limit) }
      let number = nextNumber
      nextNumber += 1
      let serial = serial(of: snapshot.entry, number)
      do throws(MonitorError) {
        try plugIn(snapshot, as: "snapshot-\(number)", serial: serial)
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

  private static let longestSerial = 20

  /// What the disk says that it is (virtio 1.2, 5.2.6): the snapshot's id. Where there is not enough room, or another disk says so,
  /// as much of it as tells most, and a number.
  private func serial(of entry: SnapshotCatalogue.Entry, _ number: Int) -> String {
    let id = entry.id
    if id.utf8.count <= Self.longestSerial, !attached.values.contains(where: { $0.serial == id }) { return id }
    let mark = "+\(number)"
    let room = Self.longestSerial - mark.utf8.count
    // The end is the time, where a schedule has made it.
    return String(entry.isScheduled ? id.suffix(room) : id.prefix(room)) + mark
  }

  private func plugIn(_ snapshot: Snapshot, as name: String, serial: String) throws(MonitorError) {
    let isWritable = policy == .copyOnWrite
    let (header, path) = try control.run { graph throws(BlockError) in
      let layer = try graph.node(snapshot.node)
      return (graph.overlayHeader(above: layer), BlockGraph.absolutePath(layer.path) + ".\(name)-\(getpid())")
    }
    do throws(BlockError) {
      try BlockGraph.makeOverlayFile(path, header, isTemporary: true, queue: control.disks.thread.queue)
    } catch {
      unlink(path)
      throw .refused("\(error)")
    }
    defer {
      // What is open stays until it is closed, and nobody else has a use for it.
      unlink(path)
    }
    try control.run { graph throws(BlockError) in
      _ = try graph.openTemporary(path, name: "#" + name, above: graph.node(snapshot.node), isWritable: isWritable)
    }
    do throws(MonitorError) {
      try control.plugIn(name, layer: "#" + name, serial: serial, quota: quota)
    } catch {
      try? control.delete("#" + name)
      throw error
    }
    attached[name] = Attached(id: snapshot.entry.id, serial: serial, node: "#" + name)
  }

  private func detach(_ arguments: JSONObject) -> Result<JSONValue, RecoveryFault> {
    let serial = arguments["serial"]?.stringValue ?? ""
    guard let name = attached.first(where: { $0.value.serial == serial })?.key else {
      return .failure(.notAttached(String(serial.prefix(64))))
    }
    do throws(MonitorError) { try control.unplug(name) } catch { return .failure(.failed("\(error)")) }
    return .success(["serial": .string(serial)])
  }

  /// The guest wants to write more than it was granted.
  private func quotaUsedUp(_ name: String) {
    guard let entry = attached[name] else { return }
    write([
      "time": .string(RecoveryTime.text(RecoveryTime.now())), "request": "write", "serial": .string(entry.serial),
      "id": .string(entry.id), "refused": .string(RecoveryFault.bytes(quota.limit).text),
    ])
    control.disks.thread.perform { [agent] in
      agent.tell("snapshot-quota", ["serial": .string(entry.serial), "id": .string(entry.id)])
    }
  }

  /// The guest has let go of a disk.
  private func deviceDeleted(_ name: String) {
    worker.run { [self] in
      guard let entry = attached.removeValue(forKey: name) else { return }
      try? control.delete(entry.node)
      write([
        "time": .string(RecoveryTime.text(RecoveryTime.now())), "detached": .string(entry.serial),
        "id": .string(entry.id),
      ])
      control.disks.thread.perform { [agent] in
        agent.tell("snapshot-detached", ["serial": .string(entry.serial), "id": .string(entry.id)])
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

  /// The disks that the guest has of snapshots, by the names that `device_del` takes.
  private var attachedDisks: [JSONValue] {
    worker.wait { [self] in
      attached.sorted { $0.key < $1.key }.map { name, entry in
        ["device": .string(name), "serial": .string(entry.serial), "id": .string(entry.id)]
      }
    }
  }

  /// QMP's commands on the snapshots that a guest may have.
  var commands: [QMPCommand] {
    [
      QMPCommand(
        "x-swiftvmm-snapshot-right", [.required("id", .string), .required("allowed", .bool)]
      ) { [self] _, arguments in
        setRevoked(arguments.text("id"), arguments["allowed"]?.boolValue == false)
        return [:]
      },
      QMPCommand("x-swiftvmm-query-attached-snapshots", returns: .any) { [self] _, _ in .array(attachedDisks) },
    ]
  }
}
