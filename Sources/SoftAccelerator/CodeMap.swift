import CSoftCPU
import Glibc

/// Which pages of host memory hold code that some CPU has decoded: a bit a CPU for every page.
///
/// Pages are named by their host address, so that one page mapped at several guest-physical addresses, or by several
/// views, is one page here. Two levels: the table grows by a leaf a gibibyte of memory that holds code.
final class CodeMap: @unchecked Sendable {
  private static let leafBits = 18
  private static let topBits = 17
  private static let leafSize = 8 << leafBits
  private let top: UnsafeMutablePointer<UInt64>

  init() {
    // Zeroed without being touched: most machines use a word or two of it.
    guard let zeroed = calloc(1 << Self.topBits, 8) else { fatalError("no memory for the map of code pages") }
    top = zeroed.bindMemory(to: UInt64.self, capacity: 1 << Self.topBits)
  }

  deinit {
    for index in 0..<1 << Self.topBits where top[index] != 0 {
      munmap(UnsafeMutableRawPointer(bitPattern: UInt(top[index])), Self.leafSize)
    }
    free(top)
  }

  /// The CPUs that hold code of the page: the word to read and change atomically. nil where none ever did.
  @inline(__always)
  func owners(_ page: UInt) -> UnsafeMutablePointer<UInt64>? {
    let number = page >> 12
    let leaf = soft_load(top + Int(number >> UInt(Self.leafBits)) & (1 << Self.topBits - 1))
    return UnsafeMutablePointer<UInt64>(bitPattern: UInt(leaf)).map { $0 + Int(number & (1 << Self.leafBits - 1)) }
  }

  /// The same, made where it is missing; nil where the host has no memory for it.
  func makeOwners(_ page: UInt) -> UnsafeMutablePointer<UInt64>? {
    if let owners = owners(page) { return owners }
    guard
      let fresh = mmap(nil, Self.leafSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0),
      fresh != MAP_FAILED
    else { return nil }
    var expected: UInt64 = 0
    let slot = top + Int((page >> 12) >> UInt(Self.leafBits)) & (1 << Self.topBits - 1)
    if !soft_cas64(slot, &expected, UInt64(UInt(bitPattern: fresh))) { munmap(fresh, Self.leafSize) }
    return owners(page)
  }
}
