/// One asynchronous request on a disk or on an image's file. Its owner may use it again once it has completed.
///
/// Requests belong to one thread, the owner of the node's `IOQueue`; they complete there, in any order.
public final class BlockRequest {
  /// What is asked.
  public enum Operation: Sendable {
    /// Fills `memory` with the bytes at `offset`.
    case read
    /// Writes `memory` at `offset`. Not durable before a flush.
    case write
    /// Makes every write that has completed before durable.
    case flush
    /// Says that the bytes are not needed; they read as before or as zeros.
    case discard
    /// Makes the bytes read as zeros, without writing them where the format can.
    case writeZeroes
  }

  /// What is asked.
  public var operation: Operation
  /// Bytes from the disk's start.
  public var offset: UInt64
  /// Bytes; for reads and writes the size of `memory`.
  public var length: UInt64
  /// For `writeZeroes`: the host's storage may be given back.
  public var mayUnmap = false
  /// One of many of a job's: nobody waits for it alone.
  var isBulk = false
  /// What is read into or written from.
  public var memory = IOVectors()
  /// Called once, with the error, if any.
  public var completion: (BlockError?) -> Void
  /// The queue's own number for the request while it is under way.
  var token: UInt64 = 0
  /// For an I/O queue: storage is set aside first for what is written.
  var allocates = false
  /// For an I/O queue: a flush is fsync(2), as a folder needs, not fdatasync(2).
  var syncsAll = false
  /// The descriptor and bytes that an I/O queue works on.
  var descriptor: Int32 = -1
  var position: UInt64 = 0

  /// A request without memory.
  public init(
    _ operation: Operation, offset: UInt64 = 0, length: UInt64 = 0, completion: @escaping (BlockError?) -> Void
  ) {
    self.operation = operation
    self.offset = offset
    self.length = length
    self.completion = completion
  }
}

/// What a range of a disk holds, as `qemu-img map` tells it.
public struct BlockExtent: Equatable, Sendable {
  /// Bytes from the disk's start.
  public var offset: UInt64
  /// Bytes with the same state.
  public var length: UInt64
  /// The layer itself says what the bytes are; else its backing file does.
  public var isAllocated: Bool
  /// The bytes are stored somewhere.
  public var isData: Bool
  /// The bytes read as zeros.
  public var isZero: Bool
  /// The bytes are compressed.
  public var isCompressed = false
  /// Where in the layer's file the bytes are, where they are stored as they are.
  public var hostOffset: UInt64?

  /// A range with that state.
  public init(
    offset: UInt64, length: UInt64, isAllocated: Bool, isData: Bool, isZero: Bool, isCompressed: Bool = false,
    hostOffset: UInt64? = nil
  ) {
    self.offset = offset
    self.length = length
    self.isAllocated = isAllocated
    self.isData = isData
    self.isZero = isZero
    self.isCompressed = isCompressed
    self.hostOffset = hostOffset
  }
}

/// A disk, or one layer of it: what virtio-blk, NBD and jobs work on.
///
/// A node and all nodes below it share an `IOQueue` and belong to the thread that runs it.
public protocol BlockNode: AnyObject {
  /// The disk's size in bytes.
  var size: UInt64 { get }
  /// Whether writes are refused.
  var isReadOnly: Bool { get }
  /// Begins a request, whose completion is called later, on the same thread, never from within `submit`'s caller's
  /// stack below a lock. It may be called before `submit` returns.
  func submit(_ request: BlockRequest)
  /// The state of the bytes at `offset`: one extent, of `length` bytes at most.
  ///
  /// It looks at metadata only and may wait for it to be read.
  func extent(at offset: UInt64, length: UInt64) throws(BlockError) -> BlockExtent
  /// Writes back what is held in memory and gives the file up. No request may be under way.
  func close() throws(BlockError)
}

/// The bytes below a format: a host file, or what a test puts in its place to cut, reorder and tear writes.
///
/// Asynchronous requests carry guest data; the other calls carry metadata and wait. What is read past the end is zero.
/// Between two flushes, writes may reach the medium in any order and in part.
public protocol BlockFile: AnyObject {
  /// What messages call the file.
  var path: String { get }
  /// Whether writes are refused.
  var isReadOnly: Bool { get }
  /// The file's length in bytes.
  var length: UInt64 { get }
  /// Begins a request.
  func submit(_ request: BlockRequest)
  /// Reads metadata.
  func read(at offset: UInt64, into bytes: UnsafeMutableRawBufferPointer) throws(BlockError)
  /// Writes metadata.
  func write(at offset: UInt64, from bytes: UnsafeRawBufferPointer) throws(BlockError)
  /// A barrier: what was written is durable, and what is written from now on comes later.
  func flush() throws(BlockError)
  /// Changes the length; what is added reads as zeros.
  func setLength(_ length: UInt64) throws(BlockError)
  /// Makes the file longer, where the host then takes writes there faster; otherwise does nothing. What is added reads as zeros.
  func reserve(upTo length: UInt64)
  /// Gives storage back to the host; the bytes read as zeros. false where the host cannot.
  func punchHole(at offset: UInt64, length: UInt64) throws(BlockError) -> Bool
  /// The next stretch of the file at `offset` of at most `length` bytes, and whether it is a hole.
  func hole(at offset: UInt64, length: UInt64) -> (isHole: Bool, length: UInt64)
  /// Lets writes be, or refuses them, from now on.
  func setWritable(_ writable: Bool) throws(BlockError)
  /// Closes the file.
  func close()
  /// Names the bytes, whatever object and path they are reached by; nil where nothing does.
  var identity: FileIdentity? { get }
  /// Bytes that are set aside for the file; nil where nobody knows.
  var allocatedBytes: UInt64? { get }
}

extension BlockFile {
  /// Nothing does.
  public var identity: FileIdentity? { nil }
  /// Does nothing.
  public func reserve(upTo length: UInt64) {}
  /// Nobody knows.
  public var allocatedBytes: UInt64? { nil }
  /// A file that is for ever what it was opened for.
  public func setWritable(_ writable: Bool) throws(BlockError) {
    if writable == isReadOnly { throw .readOnly(path: path) }
  }

  func readArray(at offset: UInt64, count: Int) throws(BlockError) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: count)
    do {
      try bytes.withUnsafeMutableBytes { buffer in try read(at: offset, into: buffer) }
    } catch let error as BlockError {
      throw error
    } catch {
      throw .io(call: "read", path: path, errno: 5)
    }
    return bytes
  }

  func writeArray(at offset: UInt64, _ bytes: [UInt8]) throws(BlockError) {
    do {
      try bytes.withUnsafeBytes { buffer in try write(at: offset, from: buffer) }
    } catch let error as BlockError {
      throw error
    } catch {
      throw .io(call: "write", path: path, errno: 5)
    }
  }
}

/// Where asynchronous requests on host files wait; one thread owns it.
public protocol IOQueue: AnyObject {
  /// Readable when completions wait for `poll`.
  var notifier: Int32 { get }
  /// Begins a request on an open file: `descriptor`, `offset` and `memory` are the request's.
  func start(_ request: BlockRequest, descriptor: Int32, path: String)
  /// Hands what was begun to the kernel and completes what is done.
  func poll()
  /// As `poll`, and waits for one completion where nothing is done and something is under way. false when nothing is.
  func wait() -> Bool
}

extension IOQueue {
  /// Runs completions until `isDone`. For the command line and tests; loops use `notifier` and `poll`.
  public func run(until isDone: () -> Bool) {
    while !isDone(), wait() {}
  }
}

extension BlockNode {
  /// Does one request and waits for it.
  public func perform(
    _ operation: BlockRequest.Operation, at offset: UInt64 = 0, length: UInt64 = 0,
    memory: UnsafeMutableRawBufferPointer? = nil, mayUnmap: Bool = false, on queue: any IOQueue
  ) throws(BlockError) {
    var outcome: BlockError??
    let request = BlockRequest(operation, offset: offset, length: length) { outcome = .some($0) }
    request.mayUnmap = mayUnmap
    if let memory {
      request.memory.append(memory.baseAddress, memory.count)
      request.length = UInt64(memory.count)
    }
    submit(request)
    queue.run { outcome != nil }
    if let error = outcome ?? .io(call: "complete a request on", path: "a disk", errno: 5) { throw error }
  }
}
