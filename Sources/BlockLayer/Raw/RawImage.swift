/// A disk whose file holds its bytes as they are. Holes of the file are the disk's zeros.
public final class RawImage: BlockNode {
  /// The file.
  public let file: any BlockFile
  /// The file's length, rounded up to whole sectors of 512 bytes.
  public private(set) var size: UInt64

  /// The disk that a file holds.
  public init(_ file: any BlockFile) {
    self.file = file
    size = file.length.roundedUp(to: 512)
  }

  /// Whether writes are refused.
  public var isReadOnly: Bool { file.isReadOnly }

  /// Begins a request.
  public func submit(_ request: BlockRequest) {
    if let error = rangeError(request) { return request.completion(error) }
    if request.length == 0, request.operation != .flush { return request.completion(nil) }
    file.submit(request)
  }

  /// Data, or a hole, which reads as zeros.
  public func extent(at offset: UInt64, length: UInt64) throws(BlockError) -> BlockExtent {
    let (isHole, count) = file.hole(at: offset, length: min(length, size - min(offset, size)))
    return BlockExtent(
      offset: offset, length: count, isAllocated: true, isData: !isHole, isZero: isHole,
      hostOffset: offset)
  }

  /// Changes the disk's size; what is added reads as zeros.
  public func resize(to size: UInt64) throws(BlockError) {
    try file.setLength(size)
    self.size = size
  }

  /// Flushes and closes the file.
  public func close() throws(BlockError) {
    if !file.isReadOnly { try file.flush() }
    file.close()
  }
}

extension BlockNode {
  /// What is wrong with a request's range, if anything.
  func rangeError(_ request: BlockRequest) -> BlockError? {
    let (end, overflow) = request.offset.addingReportingOverflow(request.length)
    guard !overflow, end <= size else {
      return .outOfRange(offset: request.offset, length: request.length, size: size)
    }
    return nil
  }
}
