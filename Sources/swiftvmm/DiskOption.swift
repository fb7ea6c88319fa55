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

  private static func split(_ text: String) -> [String] {
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

  private static func isName(_ text: String) -> Bool {
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
}

/// The disks of a run: opened before the machine is built, closed when it is over.
final class RunDisks {
  let thread: IOThread
  private(set) var disks: [(disk: Disk, chain: BlockChain)] = []

  /// Opens every disk; nil where there are none.
  init?(_ options: [DiskOption]) throws(Failure) {
    if options.isEmpty { return nil }
    do { thread = try IOThread() } catch { throw .host(error) }
    for (number, option) in options.enumerated() {
      let disk = try option.parse(number: number)
      do throws(BlockError) {
        let access = FileAccess(
          writable: !disk.isReadOnly, direct: disk.cache == .none, ignoresFlushes: disk.cache == .unsafe)
        let chain = try BlockChain(path: disk.path, format: disk.format, access: access, queue: thread.queue)
        disks.append((disk, chain))
      } catch {
        throw .disk(error)
      }
    }
    do { try thread.start() } catch { throw .host(error) }
  }

  /// What the machine is told of them.
  var configuration: MachineDisks {
    MachineDisks(
      thread: thread,
      disks: disks.map { disk, chain in
        var machineDisk = MachineDisk(name: disk.name, node: chain.top)
        machineDisk.readErrors = disk.readErrors
        machineDisk.writeErrors = disk.writeErrors
        return machineDisk
      })
  }

  /// Writes everything back. The machine is over.
  func close() throws(Failure) {
    thread.stop()
    var first: BlockError?
    for (_, chain) in disks {
      do throws(BlockError) { try chain.close() } catch { first = first ?? error }
    }
    if let first { throw .diskClosed(first) }
  }
}
