import Glibc
import Host

/// Why a disk operation failed.
public enum BlockError: Error, Equatable, CustomStringConvertible {
  /// A system call on an image file failed.
  case io(call: String, path: String, errno: Int32)
  /// The image's bytes break its format's rules.
  case malformed(path: String, ImageFault)
  /// The image is sound and needs what swiftvmm has not.
  case unsupported(path: String, Unsupported)
  /// Another process uses the file in a way that excludes this one.
  case locked(path: String, use: String)
  /// A request that goes past the end of the disk.
  case outOfRange(offset: UInt64, length: UInt64, size: UInt64)
  /// A change of a disk that was opened for reading.
  case readOnly(path: String)
  /// The image was found to be damaged while in use, and takes no more writes.
  case damaged(path: String, ImageFault)
  /// A backing file that could not be opened.
  case backing(of: String, reason: String)
  /// More layers than the bound, or one that is its own ancestor.
  case chainTooDeep(path: String, limit: Int)
  case chainLoop(path: String)
  /// A name that means nothing here.
  case unknown(what: String, name: String, path: String)
  /// The name is taken.
  case exists(what: String, name: String, path: String)
  /// A value that the operation cannot take.
  case invalid(what: String, value: String, expected: String)
  /// An NBD server that cannot be used, or breaks the protocol.
  case remote(uri: String, NBDFault)
  /// No layer, or no disk, has that name.
  case noNode(String)
  case noDisk(String)
  /// Two layers cannot have one name.
  case nodeNameTaken(String)
  /// Something stands on the layer.
  case nodeInUse(String)
  /// A new top layer that has one below it already.
  case overlayHasBacking(String)
  /// One disk in two places of a transaction.
  case diskTwice(String)
  /// The transaction's own wish.
  case aborted
  /// A layer that is not below another.
  case notBelow(String, of: String)
  /// A job with that id, or on that disk, or none.
  case jobExists(String)
  case diskHasJob(String, job: String)
  /// A disk whose writes are limited takes no more.
  case quota(String, limit: UInt64)
  /// A disk whose writes a backup leads beside it cannot have its layers changed by others.
  case diskIsBackedUp(String)
  case noJob(String)
  /// The copy of a disk has ended.
  case noMirror(String)
  /// The copy of a disk is not in step with it yet.
  case mirrorNotReady(String)
  /// A job cannot do that now.
  case jobState(String, String)
  /// The host can give no I/O queue.
  case queue(HostError)

  /// One line: what failed, the value, the cause, what to do.
  public var description: String {
    switch self {
    case .io(let call, let path, let code): "cannot \(call) \(path): \(HostError.reason(code))"
    case .malformed(let path, let fault): "\(path) is malformed: \(fault)"
    case .unsupported(let path, let feature): "\(path) cannot be used: \(feature)"
    case .locked(let path, let use):
      "\(path) is in use by another process, which does not let others \(use) it; end that process or use --force-share"
    case .outOfRange(let offset, let length, let size):
      "\(length) bytes at \(offset) go past the end of the disk, which has \(size) bytes"
    case .readOnly(let path): "\(path) is open for reading only"
    case .damaged(let path, let fault):
      "\(path) was found damaged (\(fault)) and takes no more writes; run swiftvmm disk check --repair all"
    case .backing(let path, let reason): "cannot open the backing file of \(path): \(reason)"
    case .chainTooDeep(let path, let limit):
      "the backing chain of \(path) has more than \(limit) layers; shorten it with swiftvmm disk commit or rebase"
    case .chainLoop(let path): "the backing chain comes back to \(path), which would be its own backing file"
    case .unknown(let what, let name, let path): "\(path) has no \(what) \(name)"
    case .exists(let what, let name, let path): "\(path) has a \(what) \(name) already; choose another name"
    case .invalid(let what, let value, let expected): "\(what) \(value): expected \(expected)"
    case .remote(let uri, let fault): "cannot use \(uri): \(fault)"
    case .noNode(let name): "Cannot find device='\(name)' nor node-name='\(name)'"
    case .noDisk(let name): "there is no disk \(name), nor one whose top layer is called so"
    case .nodeNameTaken(let name): "there is a layer or disk \(name) already; choose another name"
    case .nodeInUse(let name): "the layer \(name) is in use"
    case .overlayHasBacking(let name): "the layer \(name) has a backing file already; add it with \"backing\": null"
    case .diskTwice(let name): "the disk \(name) is in the transaction twice"
    case .aborted: "the transaction has an action abort"
    case .notBelow(let name, let top): "the layer \(name) is not below \(top)"
    case .jobExists(let id): "Job ID '\(id)' already in use"
    case .quota(let disk, let limit):
      "the disk \(disk) takes no more writes: the quota of \(limit) bytes for writes to snapshots is used up"
    case .diskIsBackedUp(let disk):
      "the disk \(disk) is being backed up, and its layers stay as they are until then; wait for the backup's end or cancel it"
    case .diskHasJob(let disk, let job): "the disk \(disk) has a job, \(job); wait for its end or cancel it"
    case .noMirror(let disk): "the copy of the disk \(disk) has ended before its machine could leave; begin it anew"
    case .mirrorNotReady(let disk):
      "the copy of the disk \(disk) is not ready; wait for its job's event BLOCK_JOB_READY"
    case .noJob(let id): "Job '\(id)' not found"
    case .jobState(let id, let status): "the job \(id) is \(status) and cannot do that now"
    case .queue(let error): "\(error)"
    }
  }
}

extension BlockError {
  /// Whether the host has no room left for what was to be written.
  public var isNoSpace: Bool {
    guard case .io(_, _, let code) = self else { return false }
    return code == ENOSPC || code == EDQUOT
  }
}

/// What is wrong with an image's bytes. Offsets and sizes are in bytes.
public enum ImageFault: Equatable, Sendable, CustomStringConvertible {
  case noMagic
  case truncated(what: String, need: UInt64, have: UInt64)
  case version(UInt32)
  case clusterBits(UInt32)
  case subclusters(clusterBits: UInt32)
  case headerLength(UInt32)
  case refcountOrder(UInt32)
  case misaligned(what: String, offset: UInt64)
  case beyondLimit(what: String, value: UInt64, limit: UInt64)
  case outsideFile(what: String, offset: UInt64, length: UInt64)
  case tableTooSmall(what: String, entries: UInt64, need: UInt64)
  case reservedBits(what: String, value: UInt64)
  case text(what: String)
  case compression(type: UInt8)
  case compressedData(offset: UInt64)
  case overlap(what: String, offset: UInt64)
  case refcount(cluster: UInt64, value: UInt64)
  case bitmaps(String)

  /// A part of a line.
  public var description: String {
    switch self {
    case .noMagic: "it has no qcow2 magic number"
    case .truncated(let what, let need, let have): "its \(what) needs \(need) bytes and it has \(have)"
    case .version(let version): "it is of qcow2 version \(version), and 2 and 3 are known"
    case .subclusters(let bits): "its clusters have 2^\(bits) bytes, and extended L2 entries need 2^14"
    case .clusterBits(let bits): "its clusters have 2^\(bits) bytes, and 2^9 to 2^21 are allowed"
    case .headerLength(let length): "its header has \(length) bytes"
    case .refcountOrder(let order): "its refcounts have 2^\(order) bits, and 2^6 are the most"
    case .misaligned(let what, let offset): "its \(what) at \(offset) is not aligned to a cluster"
    case .beyondLimit(let what, let value, let limit): "its \(what) is \(value), beyond the limit of \(limit)"
    case .outsideFile(let what, let offset, let length):
      "its \(what), \(length) bytes at \(offset), is outside the file"
    case .tableTooSmall(let what, let entries, let need): "its \(what) has \(entries) entries and needs \(need)"
    case .reservedBits(let what, let value): "its \(what) \(String(value, radix: 16)) has reserved bits set"
    case .text(let what): "its \(what) is not UTF-8 text"
    case .compression(let type): "its compression type \(type) is unknown or contradicts its feature bits"
    case .compressedData(let offset): "the compressed cluster at \(offset) cannot be decompressed"
    case .overlap(let what, let offset): "a write to \(offset) would overwrite its \(what)"
    case .refcount(let cluster, let value): "the refcount of cluster \(cluster) is \(value)"
    case .bitmaps(let rule): "its bitmaps break a rule: \(rule)"
    }
  }
}

/// What an image asks for that is not implemented.
public enum Unsupported: Equatable, Sendable, CustomStringConvertible {
  case features(UInt64, names: [String])
  case encryption
  case externalData
  case dirty
  case corrupt
  case format(String)
  case internalSnapshotOfOtherSize
  case refcountOverflow(bits: Int)
  case operation(String)

  /// A part of a line.
  public var description: String {
    switch self {
    case .features(let bits, let names):
      "it has incompatible features that swiftvmm does not know: "
        + (names.isEmpty ? "bits 0x\(String(bits, radix: 16))" : names.joined(separator: ", "))
    case .encryption: "it is encrypted; decrypt it with qemu-img convert"
    case .externalData: "it has an external data file; join them with qemu-img convert"
    case .dirty: "it was not closed and its refcounts may be wrong; run swiftvmm disk check --repair all"
    case .corrupt: "it is marked as corrupt; run swiftvmm disk check --repair all"
    case .format(let name): "the format \(name) is not known; raw and qcow2 are"
    case .internalSnapshotOfOtherSize: "it has internal snapshots, with which its size cannot be changed"
    case .refcountOverflow(let bits): "a cluster would have more references than \(bits)-bit refcounts can count"
    case .operation(let name): "\(name) is not possible for its format"
    }
  }
}
