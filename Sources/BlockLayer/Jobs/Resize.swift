extension BlockNode {
  /// Changes a disk's size and waits. What is added reads as zeros, whatever a backing file has there; what is cut off
  /// is given up.
  public func resize(to newSize: UInt64, on queue: any IOQueue) throws(BlockError) {
    let newSize = newSize.roundedUp(to: 512)
    let oldSize = size
    switch self {
    case let raw as RawImage: try raw.resize(to: newSize)
    case let image as Qcow2Image:
      if newSize < oldSize {
        try image.perform(.writeZeroes, at: newSize, length: oldSize - newSize, mayUnmap: true, on: queue)
      }
      try image.setSize(newSize)
      if newSize > oldSize, image.backing.map({ $0.size > oldSize }) == true {
        try image.perform(.writeZeroes, at: oldSize, length: newSize - oldSize, mayUnmap: true, on: queue)
      }
    default: throw .unsupported(path: "the disk", .operation("resizing"))
    }
  }
}
