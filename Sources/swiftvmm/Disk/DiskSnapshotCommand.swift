import ArgumentParser
import BlockLayer
import Glibc
import JSON

/// `swiftvmm disk snapshot`: snapshots inside a qcow2 image.
struct DiskSnapshotCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "snapshot",
    abstract: "List (-l), create (-c), apply (-a) or delete (-d) snapshots inside a qcow2 image.",
    discussion: "Example: swiftvmm disk snapshot -c before-upgrade disk.qcow2")

  @Flag(name: .customShort("l"), help: "List the snapshots.")
  var list = false

  @Option(name: .customShort("c"), help: "Keep the disk as it is now under this name.")
  var create: String?

  @Option(name: .customShort("a"), help: "Make the disk what it was at this snapshot.")
  var apply: String?

  @Option(name: .customShort("d"), help: "Delete this snapshot.")
  var delete: String?

  @Flag(name: .customShort("q"), help: "Print nothing but errors.")
  var quiet = false

  @OptionGroup var output: DiskOutput
  @OptionGroup var image: DiskImage

  func validate() throws {
    if (list ? 1 : 0) + [create, apply, delete].compactMap({ $0 }).count > 1 {
      throw ValidationError("-l, -c, -a and -d exclude each other: give one of them")
    }
  }

  func run() throws {
    let queue = try makeIOQueue()
    let changes = create != nil || apply != nil || delete != nil
    let chain = try image.open(writable: changes, backing: false, queue: queue)
    try withChain(chain) {
      let disk = try image.qcow2(chain, for: "a snapshot")
      if let create {
        var now = timespec()
        clock_gettime(CLOCK_REALTIME, &now)
        try disk.createSnapshot(
          create, seconds: UInt32(truncatingIfNeeded: now.tv_sec), nanoseconds: UInt32(truncatingIfNeeded: now.tv_nsec))
      } else if let apply {
        try disk.applySnapshot(apply)
      } else if let delete {
        try disk.deleteSnapshot(delete)
      } else if output.isJSON {
        print(JSONValue.array(disk.snapshots.map(Self.json)).serialized(pretty: true))
      } else if !disk.snapshots.isEmpty {
        print((["Snapshot list:"] + Self.table(disk.snapshots)).joined(separator: "\n"))
      }
    }
  }

  static func json(_ snapshot: Qcow2Snapshot) -> JSONValue {
    [
      "id": .string(snapshot.id), "name": .string(snapshot.name), "vm-state-size": JSONValue(snapshot.stateSize),
      "date-sec": JSONValue(snapshot.seconds), "date-nsec": JSONValue(snapshot.nanoseconds),
      "vm-clock-sec": JSONValue(snapshot.guestClock / 1_000_000_000),
      "vm-clock-nsec": JSONValue(snapshot.guestClock % 1_000_000_000),
    ]
  }

  /// The list, in qemu-img's columns.
  static func table(_ snapshots: [Qcow2Snapshot]) -> [String] {
    func left(_ text: String, _ width: Int) -> String {
      text + String(repeating: " ", count: max(0, width - text.count))
    }
    func right(_ text: String, _ width: Int) -> String {
      String(repeating: " ", count: max(1, width - text.count)) + text
    }
    let header = left("ID", 10) + left("TAG", 17) + right("VM SIZE", 8) + right("DATE", 20) + right("VM CLOCK", 13)
    return [header]
      + snapshots.map { snapshot in
        left(snapshot.id, 9) + " " + left(snapshot.name, 16) + " " + right(readableSize(snapshot.stateSize), 8)
          + right(date(snapshot.seconds), 20) + right(clock(snapshot.guestClock), 13)
      }
  }

  private static func date(_ seconds: UInt32) -> String {
    var time = time_t(seconds)
    var fields = tm()
    guard localtime_r(&time, &fields) != nil else { return "-" }
    var text = [UInt8](repeating: 0, count: 32)
    let count = text.withUnsafeMutableBytes { buffer in
      strftime(buffer.bindMemory(to: CChar.self).baseAddress, 32, "%Y-%m-%d %H:%M:%S", &fields)
    }
    return String(decoding: text.prefix(count), as: UTF8.self)
  }

  private static func clock(_ nanoseconds: UInt64) -> String {
    func padded(_ value: UInt64, _ width: Int) -> String {
      let text = String(value)
      return String(repeating: "0", count: max(0, width - text.count)) + text
    }
    let seconds = nanoseconds / 1_000_000_000
    let parts = [seconds / 3600, seconds / 60 % 60, seconds % 60].map { padded($0, 2) }
    return parts.joined(separator: ":") + "." + padded(nanoseconds / 1_000_000 % 1000, 3)
  }
}
