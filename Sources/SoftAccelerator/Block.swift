import CSoftCPU
import X86

/// One instruction of a block, with all that can be known beforehand; 32 bytes.
struct FastOperation {
  /// What to do.
  var code: OperationCode
  /// Byte offsets of the first and second register operand among the general registers.
  var a: UInt8 = 0
  var b: UInt8 = 0
  /// The memory operand: byte offsets of base and index (of the zero register where there is none), the index's shift,
  /// and the segment register whose base counts.
  var base: UInt8 = FastOperation.zero
  var index: UInt8 = FastOperation.zero
  var shift: UInt8 = 0
  var segment: UInt8 = UInt8(SOFT_FLAT_SEGMENT)
  /// Where the instruction is, from the block's start; and how many were retired before it.
  var distance: UInt16 = 0
  var number: UInt8 = 0
  var length: UInt8 = 0
  /// The immediate; for a conditional branch, where it falls through to; for a call, where it returns to.
  var immediate: UInt64 = 0
  /// The memory operand's displacement; for a direct branch, its target; for a generic operation, its `Instruction`.
  var address: UInt64 = 0

  /// The byte offset of the register that is always 0.
  static let zero = UInt8(SOFT_ZERO_REGISTER) * 8
}

extension UnsafeMutablePointer<FastOperation> {
  /// The linear address of the memory operand.
  @inline(__always)
  func address(_ s: FastState) -> UInt64 {
    s.get(pointee.base, as: UInt64.self) &+ s.get(pointee.index, as: UInt64.self) &<< UInt64(pointee.shift)
      &+ pointee.address &+ soft_segments(s.cpu)[Int(pointee.segment)].base
  }
}

/// Instructions that follow one another in one page, decoded for one address: at most `Block.limit`, up to the first
/// that may go elsewhere.
struct Block {
  /// Instructions at most.
  static let limit = 64

  /// The instruction pointer of the first instruction.
  var ip: UInt64
  /// The code context in which the block was last found to be what lies at `ip`; 0 where it is stale.
  var context: UInt64
  /// The operations; the last one ends the block.
  var ops: UnsafeMutablePointer<FastOperation>
  /// Retired instructions.
  var count: Int64
  /// The block that follows, and the one that the branch at the end goes to, as far as they are known.
  var next: UnsafeMutablePointer<Block>?
  var taken: UnsafeMutablePointer<Block>?
  /// The host's address of the first byte.
  var host: UInt
  /// Bytes of code.
  var size: UInt16
  /// The mode that it was decoded for.
  var mode: UInt8
  /// The next block in the same bucket of the cache, and the next with code in the same page.
  var sameBucket: UnsafeMutablePointer<Block>?
  var samePage: UnsafeMutablePointer<Block>?

  /// Where the jump cache keeps the block at an address.
  @inline(__always)
  static func jumpIndex(_ ip: UInt64) -> Int { Int((ip ^ ip >> 12) & UInt64(BlockCache.jumpCount &- 1)) }
}

/// The blocks with code in one page.
struct CodePageBlocks {
  /// One of them; the others are linked to it.
  var first: UnsafeMutablePointer<Block>
  /// The pieces of 64 bytes, a bit each, that blocks have been made of.
  var chunks: UInt64

  /// The pieces that `count` bytes (at least one) at an offset in the page touch.
  static func chunks(_ offset: UInt, count: UInt) -> UInt64 {
    let first = UInt64(offset >> 6 & 63)
    let last = UInt64((offset &+ count &- 1) >> 6 & 63)
    return (~0 << first) & (~0 >> (63 &- last))
  }
}

/// The decoded code of one CPU.
///
/// Blocks, operations and instructions lie in one arena that is emptied as a whole when it is full. Nothing here is
/// reference-counted: the loop that executes blocks sees plain pointers.
final class BlockCache {
  static let jumpCount = 4096
  private static let bucketCount = 1 << 15
  private static let arenaSize = 48 << 20

  /// Blocks by the address that a jump goes to. Never empty: stale blocks and `nowhere` match no jump.
  let jumps = UnsafeMutablePointer<UnsafeMutablePointer<Block>>.allocate(capacity: jumpCount)
  /// A block whose only operation executes the instruction at its `ip` the slow way.
  let nowhere: UnsafeMutablePointer<Block>
  private let nowhereOperation: UnsafeMutablePointer<FastOperation>
  private let buckets = UnsafeMutablePointer<UnsafeMutablePointer<Block>?>.allocate(capacity: bucketCount)
  private let arena = UnsafeMutableRawPointer.allocate(byteCount: arenaSize, alignment: 64)
  private var used = 0
  /// How often the cache was emptied: blocks of an earlier epoch are gone.
  private(set) var epoch = 0
  /// The first block of every page (named by its host address) that has blocks.
  private(set) var pages: [UInt: CodePageBlocks] = [:]

  init() {
    nowhereOperation = .allocate(capacity: 1)
    nowhereOperation.initialize(to: FastOperation(code: .step))
    nowhere = .allocate(capacity: 1)
    nowhere.initialize(
      to: Block(
        ip: 0, context: 0, ops: nowhereOperation, count: 0, next: nil, taken: nil, host: 0, size: 0, mode: 0,
        sameBucket: nil, samePage: nil))
    jumps.initialize(repeating: nowhere, count: Self.jumpCount)
    buckets.initialize(repeating: nil, count: Self.bucketCount)
  }

  deinit {
    jumps.deallocate()
    buckets.deallocate()
    arena.deallocate()
    nowhere.deallocate()
    nowhereOperation.deallocate()
  }

  private static func bucket(_ host: UInt, _ ip: UInt64) -> Int {
    Int((UInt64(host) ^ ip &* 0x9e37_79b9 ^ ip >> 15) & UInt64(bucketCount - 1))
  }

  /// The block of what lies at a host address, decoded for an instruction pointer and mode.
  func block(_ host: UInt, ip: UInt64, mode: UInt8) -> UnsafeMutablePointer<Block>? {
    var candidate = buckets[Self.bucket(host, ip)]
    while let block = candidate {
      if block.pointee.host == host, block.pointee.ip == ip, block.pointee.mode == mode { return block }
      candidate = block.pointee.sameBucket
    }
    return nil
  }

  /// Whether a block of the largest kind still fits; when not, the cache must be emptied first.
  var hasRoom: Bool { Self.arenaSize - used >= Block.limit * 160 + 1024 }

  /// Room in the arena for values; there is enough, as `hasRoom` said.
  func allocate<T>(_ type: T.Type, count: Int) -> UnsafeMutablePointer<T> {
    let start = (used + 31) & ~31
    used = start + MemoryLayout<T>.stride * count
    return (arena + start).bindMemory(to: T.self, capacity: count)
  }

  /// Makes a block findable.
  func insert(_ block: UnsafeMutablePointer<Block>) {
    let bucket = Self.bucket(block.pointee.host, block.pointee.ip)
    block.pointee.sameBucket = buckets[bucket]
    buckets[bucket] = block
    let page = block.pointee.host & ~0xfff
    let chunks = CodePageBlocks.chunks(block.pointee.host & 0xfff, count: UInt(block.pointee.size))
    let others = pages[page]
    block.pointee.samePage = others?.first
    pages[page] = CodePageBlocks(first: block, chunks: chunks | (others?.chunks ?? 0))
  }

  /// Forgets the blocks that contain a byte of `range`, offsets in a page; true when the page has no block left.
  func forget(page: UInt, range: Range<UInt>) -> Bool {
    guard let blocks = pages[page] else { return true }
    // Data beside code is written often: most of it is not among the bytes that blocks are made of.
    guard blocks.chunks & CodePageBlocks.chunks(range.lowerBound, count: range.upperBound &- range.lowerBound) != 0
    else { return false }
    var first: UnsafeMutablePointer<Block>? = blocks.first
    var link: UnsafeMutablePointer<Block>? = nil
    var candidate = first
    while let block = candidate {
      let following = block.pointee.samePage
      let start = block.pointee.host & 0xfff
      if start < range.upperBound, start + UInt(block.pointee.size) > range.lowerBound {
        remove(block)
        if let link { link.pointee.samePage = following } else { first = following }
      } else {
        link = block
      }
      candidate = following
    }
    pages[page] = first.map { CodePageBlocks(first: $0, chunks: blocks.chunks) }
    return first == nil
  }

  /// Takes a block out of its bucket; jumps and links to it no longer match.
  private func remove(_ block: UnsafeMutablePointer<Block>) {
    block.pointee.context = 0
    // A number that no page has: it cannot be found again even while its bucket is being walked.
    let bucket = Self.bucket(block.pointee.host, block.pointee.ip)
    var previous: UnsafeMutablePointer<Block>? = nil
    var candidate = buckets[bucket]
    while let other = candidate {
      if other == block {
        if let previous {
          previous.pointee.sameBucket = block.pointee.sameBucket
        } else {
          buckets[bucket] = block.pointee.sameBucket
        }
        return
      }
      previous = other
      candidate = other.pointee.sameBucket
    }
  }

  /// Forgets every block.
  func removeAll() {
    jumps.update(repeating: nowhere, count: Self.jumpCount)
    buckets.update(repeating: nil, count: Self.bucketCount)
    pages.removeAll(keepingCapacity: true)
    used = 0
    epoch &+= 1
  }
}
