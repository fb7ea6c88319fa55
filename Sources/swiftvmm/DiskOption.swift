import ArgumentParser
import BlockLayer
import Host
import Machine
import Virtio

/// The value of `--disk`: `FILE[,id=][,format=][,readonly=][,cache=][,rerror=][,werror=]`; a comma in a name is doubled.
struct DiskOption: ExpressibleByArgument {
  /// How the host's page cache is used.
  enum Cache: String, CaseIterable, ExpressibleByArgument {
    case writeback, none, unsafe
  }

  /// The words that it was made of.
  let text: String
  init?(argument: String) { text = argument }

  /// What the words say; `number` names a disk that has no id.
  func parse(number: Int) throws(Failure) -> Disk {
    var parts = Self.split(text)
    let path = parts.removeFirst()
    guard !path.isEmpty else {
      throw .badValue(option: "--disk", value: text, expected: "FILE first, then KEY=VALUE")
    }
    var disk = Disk(path: path, name: "disk\(number)")
    for part in parts {
      guard let equals = part.firstIndex(of: "=") else {
        throw .badValue(option: "--disk", value: part, expected: "KEY=VALUE, such as format=qcow2")
      }
      let (key, value) = (String(part[..<equals]), String(part[part.index(after: equals)...]))
      func choice<Choice: RawRepresentable & CaseIterable>(
        _: Choice.Type
      ) throws(Failure) -> Choice where Choice.RawValue == String {
        guard let choice = Choice(rawValue: value) else {
          throw .badValue(
            option: "--disk \(key)", value: value, expected: Choice.allCases.map(\.rawValue).joined(separator: ", "))
        }
        return choice
      }
      switch key {
      case "id":
        guard Self.isName(value) else {
          throw .badValue(option: "--disk id", value: value, expected: "a letter, then letters, digits, - . _")
        }
        disk.name = value
      case "format": disk.format = try choice(ImageFormat.self)
      case "readonly": disk.isReadOnly = try choice(Switch.self) == .on
      case "cache": disk.cache = try choice(Cache.self)
      case "rerror": disk.readErrors = try choice(DiskErrorPolicy.self)
      case "werror": disk.writeErrors = try choice(DiskErrorPolicy.self)
      default:
        throw .badValue(
          option: "--disk", value: part, expected: "id=, format=, readonly=, cache=, rerror= or werror=")
      }
    }
    return disk
  }

  private enum Switch: String, CaseIterable {
    case on, off
  }

  /// The parts between commas; one that is doubled stands for itself.
  static func split(_ text: String) -> [String] {
    var parts = [""]
    var rest = Substring(text)
    while let first = rest.popFirst() {
      if first != "," {
        parts[parts.count - 1].append(first)
      } else if rest.first == "," {
        rest.removeFirst()
        parts[parts.count - 1].append(",")
      } else {
        parts.append("")
      }
    }
    return parts
  }

  /// Whether a device may be called so.
  static func isName(_ text: String) -> Bool {
    guard let first = text.first, first.isASCII, first.isLetter else { return false }
    return text.allSatisfy { $0.isASCII && ($0.isLetter || $0.isNumber || "-._".contains($0)) }
  }
}

/// A disk as the command line describes it.
struct Disk {
  var path: String
  var name: String
  var format: ImageFormat?
  var isReadOnly = false
  var cache = DiskOption.Cache.writeback
  var readErrors = DiskErrorPolicy.report
  var writeErrors = DiskErrorPolicy.enospc

  init(path: String, name: String) {
    self.path = path
    self.name = name
  }

  /// How its file is opened.
  var access: FileAccess {
    FileAccess(writable: !isReadOnly, direct: cache == .none, ignoresFlushes: cache == .unsafe)
  }
}

/// The disks of a run and the layers that they stand on: opened before the machine is built, closed when it is over.
final class RunDisks {
  let thread: IOThread
  /// It belongs to the thread.
  let graph: BlockGraph
  private var disks: [(disk: Disk, live: LiveDisk)] = []

  /// Opens every disk; `followsSnapshots` in its newest layer, where snapshots have been made of the image that is named.
  /// Those that are `absent` belong to a machine that is still elsewhere.
  init(_ options: [DiskOption], followsSnapshots: Bool = false, absent: Bool = false) throws(Failure) {
    do { thread = try IOThread() } catch { throw .host(error) }
    graph = BlockGraph(queue: thread.queue, loop: thread.loop)
    for (number, option) in options.enumerated() {
      var disk = try option.parse(number: number)
      let named = disk.path
      if followsSnapshots, !disk.isReadOnly, let top = SnapshotCatalogue.newestLayer(above: disk.path) {
        printError("swiftvmm: \(disk.name) goes on in \(top), above \(disk.path)")
        (disk.path, disk.format) = (top, .qcow2)
      }
      let overlay = disk.path + BackupJournal.overlaySuffix
      if BackupFiles.exists(overlay) { throw .backup(.needsRecovery(image: disk.path, overlay: overlay)) }
      if graph.disks[disk.name] != nil { throw .machine(.diskName(disk.name)) }
      var lost: (top: String, image: String)?
      do throws(BlockError) {
        var image = BlockGraph.Options(path: disk.path, format: disk.format, access: disk.access)
        image.isImplicit = true
        if absent {
          disks.append((disk, try graph.addAbsentDisk(disk.name, image)))
          continue
        }
        let layer = try graph.open(image)
        let isAbove = layer.chain.contains { BackupFiles.real($0.path) == BackupFiles.real(named) }
        if !isAbove { lost = (disk.path, named) }
        disks.append((disk, try graph.addDisk(disk.name, on: layer)))
      } catch {
        throw .disk(error)
      }
      if let lost {
        throw .notAbove(top: lost.top, image: lost.image, catalogue: SnapshotCatalogue.path(besides: lost.image))
      }
    }
    do { try thread.start() } catch { throw .host(error) }
  }

  /// What the machine is told of them.
  var configuration: MachineDisks {
    MachineDisks(
      thread: thread,
      disks: disks.map { disk, live in
        var machineDisk = MachineDisk(name: disk.name, node: live)
        machineDisk.readErrors = disk.readErrors
        machineDisk.writeErrors = disk.writeErrors
        return machineDisk
      })
  }

  /// Writes everything back. The machine is over.
  func close() throws(Failure) {
    thread.stop()
    // Jobs end where they are.
    for job in graph.jobs.values { job.cancel() }
    while thread.queue.wait() {}
    do throws(BlockError) { try graph.closeAll() } catch { throw .diskClosed(error) }
  }
}
