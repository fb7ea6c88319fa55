import GuestMemory
import Synchronization

/// What may be done with a page of guest-physical memory.
public struct PageRights: OptionSet, Hashable, Sendable {
  /// A bit a right.
  public let rawValue: UInt8
  /// A bit a right.
  @inlinable public init(rawValue: UInt8) { self.rawValue = rawValue }
  /// Data reads, and the reads of page walks.
  @inlinable public static var read: Self { Self(rawValue: 1) }
  /// Data writes, and the updates of accessed and dirty bits by page walks.
  @inlinable public static var write: Self { Self(rawValue: 2) }
  /// Instruction fetches.
  @inlinable public static var execute: Self { Self(rawValue: 4) }
  /// Everything.
  public static let all: Self = [.read, .write, .execute]
}

/// A set of hypervisor page tables: what a vCPU may do with each page of guest-physical memory while the view is active,
/// and, where the view says so, which page of host memory it finds there.
///
/// A radix tree of four levels of 512 entries over 48-bit guest-physical addresses, as nested paging has it (SDM vol. 3,
/// 29.3; here without its memory types). vCPUs walk it without a lock while others change it: a change is seen by a vCPU
/// at the latest when its translations are flushed. A view made from another shares its tables until one of the two
/// changes them: making one costs one table, whatever is in it.
public final class MemoryView: Sendable {
  /// What a view says of one page.
  public struct Entry: Equatable, Sendable {
    /// What may be done.
    public var rights: PageRights
    /// The address of the host page that stands in for the guest's own; 0 for the guest's own.
    public var hostPage: UInt

    /// An entry.
    public init(rights: PageRights, hostPage: UInt) {
      self.rights = rights
      self.hostPage = hostPage
    }
  }

  /// Tells views apart; 1 or more, since 0 stands for no view.
  public let number: UInt32
  private let standard: Atomic<UInt8>
  private let root: Node
  nonisolated(unsafe) private let rootWords: UnsafeMutablePointer<Atomic<UInt64>>
  /// Who may change a table in place: those that carry this. A copy takes it from view and copy alike, since they share
  /// their tables from then on; roots are never shared.
  private let owner = Mutex(Owner())

  /// The rights of pages that the view has no entry for.
  public var defaultRights: PageRights {
    get { PageRights(rawValue: standard.load(ordering: .acquiring)) }
    set { standard.store(newValue.rawValue, ordering: .releasing) }
  }

  /// A view whose pages all have `defaultRights` and are the guest's own.
  public init(number: UInt32, defaultRights: PageRights = .all) {
    self.number = number
    standard = Atomic(defaultRights.rawValue)
    root = Node(owner: nil)
    rootWords = root.words
  }

  /// A view that says what `base` says now; either may then change without the other.
  public init(number: UInt32, base: MemoryView) {
    self.number = number
    standard = Atomic(base.defaultRights.rawValue)
    root = base.owner.withLock { owner in
      owner = Owner()
      return Node(copying: base.root, owner: nil)
    }
    rootWords = root.words
  }

  /// What the view has been told of the page with a guest-physical address; nil where its default holds.
  public func entry(_ address: GuestPhysicalAddress) -> Entry? {
    word(address).map { Entry($0) }
  }

  /// What the view says of the page with a guest-physical address.
  public subscript(_ address: GuestPhysicalAddress) -> Entry {
    word(address).map { Entry($0) } ?? Entry(rights: defaultRights, hostPage: 0)
  }

  /// The leaf's word of a page; nil where there is none. Readers go from words to words, and count no references.
  @inline(__always)
  private func word(_ address: GuestPhysicalAddress) -> UInt64? {
    var words = rootWords
    var level = 3
    while true {
      let word = words[Self.index(address.rawValue, level)].load(ordering: .acquiring)
      guard word & Self.present != 0 else { return nil }
      if level == 0 { return word }
      words = Self.words(word)
      level -= 1
    }
  }

  /// Gives the pages that `range` touches new rights; which host page is there does not change.
  public func set(_ rights: PageRights, for range: GuestRange) {
    guard range.size > 0 else { return }
    let last = (range.start.rawValue &+ (range.size - 1)) >> 12
    change(range.start.rawValue >> 12...last) { word in
      UInt64(rights.rawValue) | Self.present | (word & Self.present != 0 ? word & ~0xfff : 0)
    }
  }

  /// Puts a host page in the place of a guest page.
  ///
  /// - Parameters:
  ///   - address: any address in the guest page.
  ///   - hostPage: the address of 4 KiB that outlive the view, aligned to their size; nil for the guest's own.
  ///   - rights: what may be done with the page.
  public func replace(
    _ address: GuestPhysicalAddress, by hostPage: UnsafeMutableRawPointer?, rights: PageRights
  ) {
    let host = UInt64(UInt(bitPattern: hostPage)) & ~0xfff
    change(address.rawValue >> 12...address.rawValue >> 12) { _ in UInt64(rights.rawValue) | Self.present | host }
  }

  // MARK: The tree

  /// Set in every word that says something: a leaf's, beside the rights; a table's, which is aligned to 16 bytes.
  private static let present: UInt64 = 8

  /// The words of the table that a word names.
  @inline(__always)
  private static func words(_ word: UInt64) -> UnsafeMutablePointer<Atomic<UInt64>> {
    UnsafeMutablePointer(bitPattern: UInt(word & ~present)).unsafelyUnwrapped
  }

  /// The table that a word names.
  private static func table(_ word: UInt64) -> Node {
    let node = (words(word) - Node.header).pointee.load(ordering: .relaxed)
    return Unmanaged<Node>.fromOpaque(UnsafeRawPointer(bitPattern: UInt(node)).unsafelyUnwrapped).takeUnretainedValue()
  }

  private static func index(_ address: UInt64, _ level: Int) -> Int {
    Int(address >> UInt64(12 + 9 * level) & 0x1ff)
  }

  private func change(_ pages: ClosedRange<UInt64>, _ change: (UInt64) -> UInt64) {
    owner.withLock { owner in
      var page = pages.lowerBound
      while page <= pages.upperBound {
        let leaf = leaf(page << 12, owner)
        repeat {
          let slot = leaf.words + Int(page & 0x1ff)
          slot.pointee.store(change(slot.pointee.load(ordering: .relaxed)), ordering: .releasing)
          page += 1
        } while page <= pages.upperBound && page & 0x1ff != 0
      }
    }
  }

  /// Calls `body` with every page that there is an entry of, by rising address.
  func forEachEntry(_ body: (_ address: UInt64, Entry) -> Void) {
    func visit(_ node: Node, _ base: UInt64, _ level: Int) {
      for index in 0..<512 {
        let word = node.words[index].load(ordering: .acquiring)
        guard word & Self.present != 0 else { continue }
        let address = base | UInt64(index) << UInt64(12 + 9 * level)
        if level == 0 {
          body(address, Entry(word))
        } else {
          visit(Self.table(word), address, level - 1)
        }
      }
    }
    visit(root, 0, 3)
  }

  /// The lowest table for an address, made where it is missing and copied where another view has it too.
  private func leaf(_ address: UInt64, _ owner: Owner) -> Node {
    var node = root
    for level in [3, 2, 1] {
      let slot = node.words + Self.index(address, level)
      let word = slot.pointee.load(ordering: .relaxed)
      if word & Self.present != 0, Self.table(word).owner === owner {
        node = Self.table(word)
      } else {
        let table =
          word & Self.present != 0 ? Node(copying: Self.table(word), owner: owner) : Node(owner: owner)
        // A table that this one replaces stays: a vCPU may be reading it.
        node.children.withLock { $0.append(table) }
        slot.pointee.store(UInt64(UInt(bitPattern: table.words)) | Self.present, ordering: .releasing)
        node = table
      }
    }
    return node
  }

  /// The right to change tables, by identity.
  private final class Owner: Sendable {}

  /// One table. Its parents own it through `children`; words refer to its words without counting.
  private final class Node: Sendable {
    /// Words before the table's own, of which the first leads back to the node; two keep the table aligned to 16 bytes.
    static let header = 2
    nonisolated(unsafe) let words: UnsafeMutablePointer<Atomic<UInt64>>
    let children: Mutex<[Node]>
    let owner: Owner?

    init(owner: Owner?) {
      self.owner = owner
      children = Mutex([])
      words = Self.allocate()
      fill { _ in 0 }
    }

    /// The same words, and so the same tables below; while nobody changes `other`.
    init(copying other: Node, owner: Owner?) {
      self.owner = owner
      children = Mutex(other.children.withLock { $0 })
      words = Self.allocate()
      fill { other.words[$0].load(ordering: .relaxed) }
    }

    private static func allocate() -> UnsafeMutablePointer<Atomic<UInt64>> {
      let size = (512 + header) * MemoryLayout<UInt64>.stride
      let words = UnsafeMutableRawPointer.allocate(byteCount: size, alignment: 16)
      return words.bindMemory(to: Atomic<UInt64>.self, capacity: 512 + header) + header
    }

    private func fill(_ word: (Int) -> UInt64) {
      let node = UInt64(UInt(bitPattern: Unmanaged.passUnretained(self).toOpaque()))
      for index in 0..<Self.header { (words - Self.header + index).initialize(to: Atomic(node)) }
      for index in 0..<512 { (words + index).initialize(to: Atomic(word(index))) }
    }

    deinit {
      let all = words - Self.header
      all.deinitialize(count: 512 + Self.header)
      UnsafeMutableRawPointer(all).deallocate()
    }
  }
}

extension MemoryView.Entry {
  /// What a leaf's word says.
  fileprivate init(_ word: UInt64) {
    self.init(rights: PageRights(rawValue: UInt8(truncatingIfNeeded: word & 7)), hostPage: UInt(word & ~0xfff))
  }
}
