/// What a check of a qcow2 image found, in the words of `qemu-img check`.
public struct Qcow2CheckReport: Equatable, Sendable {
  /// Things that are wrong: data may be lost.
  public var corruptions = 0
  /// Clusters that are counted and that nothing uses.
  public var leaks = 0
  /// Things that could not be looked at.
  public var checkErrors = 0
  /// Corruptions that a repair put right.
  public var corruptionsFixed = 0
  /// Leaks that a repair gave back.
  public var leaksFixed = 0
  /// Clusters of the disk that are allocated.
  public var allocatedClusters: UInt64 = 0
  /// Those that are compressed.
  public var compressedClusters: UInt64 = 0
  /// Those that do not lie behind the one before.
  public var fragmentedClusters: UInt64 = 0
  /// Clusters that the disk has.
  public var totalClusters: UInt64 = 0
  /// The end of the last cluster in use, in bytes.
  public var imageEnd: UInt64 = 0
  /// A line for each of the first findings.
  public var findings: [String] = []

  /// Nothing is wrong.
  public var isClean: Bool { corruptions == 0 && leaks == 0 && checkErrors == 0 }

  mutating func note(_ text: @autoclosure () -> String) {
    if findings.count < 100 { findings.append(text()) }
  }
}

/// What a repair may put right.
public struct Qcow2Repairs: OptionSet, Sendable {
  /// Bits.
  public let rawValue: Int
  /// Bits.
  public init(rawValue: Int) { self.rawValue = rawValue }
  /// Clusters that nothing uses.
  public static let leaks = Qcow2Repairs(rawValue: 1)
  /// Refcounts that are too low, and flags that contradict them.
  public static let errors = Qcow2Repairs(rawValue: 2)
}

/// References by cluster, as they were counted; sparse, since a hostile file may name any cluster.
struct ReferenceMap {
  private static let chunk: UInt64 = 4096
  private var chunks: [UInt64: [UInt64]] = [:]
  private(set) var end: UInt64 = 0

  mutating func add(_ cluster: UInt64, _ weight: UInt64) {
    chunks[cluster / Self.chunk, default: [UInt64](repeating: 0, count: Int(Self.chunk))][Int(cluster % Self.chunk)] &+=
      weight
    end = max(end, cluster + 1)
  }

  subscript(_ cluster: UInt64) -> UInt64 { chunks[cluster / Self.chunk]?[Int(cluster % Self.chunk)] ?? 0 }

  /// Clusters with references, in order.
  func forEach(_ body: (UInt64, UInt64) -> Void) {
    for key in chunks.keys.sorted() {
      for (index, count) in (chunks[key] ?? []).enumerated() where count > 0 {
        body(key * Self.chunk + UInt64(index), count)
      }
    }
  }
}

/// One pass over everything that an image's tables name.
struct Qcow2Checker {
  let image: Qcow2Image
  var report = Qcow2CheckReport()
  var references = ReferenceMap()
  /// L2 tables by how often they are named: each is looked at once, however often a hostile image names it.
  private var tables: [UInt64: UInt64] = [:]

  init(_ image: Qcow2Image) { self.image = image }

  mutating func run() throws(BlockError) {
    let header = image.header
    report.totalClusters = header.size.dividedUp(by: header.clusterSize)
    count(0, header.clusterSize, 1, "header")
    countTable(image.l1, header.l1Offset, "L1 table")
    for snapshot in image.snapshotTable {
      let table = try Qcow2Image.readTable(image.file, at: snapshot.l1Offset, entries: UInt64(snapshot.l1Entries))
      countTable(table, snapshot.l1Offset, "snapshot's L1 table")
    }
    let snapshotBytes = image.snapshotTable.reduce(0) { $0 + $1.serialized(diskSize: header.size).count }
    count(header.snapshotsOffset, UInt64(snapshotBytes), 1, "snapshot table")
    try countL2Tables()
    countRefcounts()
    try countBitmaps()
    try countActive()
    try compare()
    report.imageEnd = references.end << image.clusterBits
  }

  private mutating func count(_ offset: UInt64, _ length: UInt64, _ weight: UInt64, _ what: @autoclosure () -> String) {
    guard length > 0 else { return }
    let (end, overflow) = offset.addingReportingOverflow(length)
    guard !overflow, offset < image.file.length, end < image.file.length + image.clusterSize else {
      report.corruptions += 1
      report.note("the \(what()) at 0x\(String(offset, radix: 16)) goes past the end of the file")
      return
    }
    for cluster in (offset >> image.clusterBits)...((end - 1) >> image.clusterBits) { references.add(cluster, weight) }
  }

  private mutating func countTable(_ table: [UInt64], _ offset: UInt64, _ what: String) {
    count(offset, UInt64(table.count) * 8, 1, what)
    for entry in table where entry & Qcow2Entry.offsetMask != 0 {
      let l2 = entry & Qcow2Entry.offsetMask
      guard l2 % image.clusterSize == 0, entry & Qcow2Entry.l1Reserved == 0 else {
        report.corruptions += 1
        report.note("an entry of the \(what) is 0x\(String(entry, radix: 16))")
        continue
      }
      count(l2, image.clusterSize, 1, "L2 table")
      tables[l2, default: 0] += 1
    }
  }

  private mutating func countL2Tables() throws(BlockError) {
    for (table, weight) in tables where table < image.file.length {
      for index in 0..<Int(image.header.l2Entries) {
        let value = try image.l2Value(table, index)
        let entry = value.descriptor
        guard value != Qcow2L2Entry() else { continue }
        if image.hasExtendedL2, !value.isSound {
          report.corruptions += 1
          report.note("an L2 entry is 0x\(String(entry, radix: 16)), its bitmap 0x\(String(value.bits, radix: 16))")
        }
        if entry & Qcow2Entry.compressed != 0 {
          if entry & Qcow2Entry.copied != 0 {
            report.corruptions += 1
            report.note("a compressed cluster's entry is 0x\(String(entry, radix: 16))")
          }
          let (offset, length) = image.compressedRange(entry)
          // The last sector may be cut off by the file's end; what counts is where it begins.
          let inFile = min(length, max(image.file.length.roundedUp(to: image.clusterSize), offset) - offset)
          count(offset, max(inFile, 1), weight, "compressed cluster")
          continue
        }
        let host = entry & Qcow2Entry.offsetMask
        guard host % image.clusterSize == 0, entry & Qcow2Entry.l2Reserved == 0 else {
          report.corruptions += 1
          report.note("an L2 entry is 0x\(String(entry, radix: 16))")
          continue
        }
        if host != 0 { count(host, image.clusterSize, weight, "data cluster") }
      }
    }
  }

  private mutating func countRefcounts() {
    let refcounts = image.refcounts
    count(refcounts.tableOffset, UInt64(refcounts.table.count) * 8, 1, "refcount table")
    for entry in refcounts.table where entry != 0 {
      guard entry & 511 == 0, entry % image.clusterSize == 0 else {
        report.corruptions += 1
        report.note("an entry of the refcount table is 0x\(String(entry, radix: 16))")
        continue
      }
      count(entry, image.clusterSize, 1, "refcount block")
    }
  }

  private mutating func countBitmaps() throws(BlockError) {
    let store: Qcow2Bitmaps
    do throws(BlockError) {
      store = try Qcow2Bitmaps(file: image.file, header: image.header)
    } catch {
      report.corruptions += 1
      report.note("\(error)")
      return
    }
    count(store.directoryOffset, store.directorySize, 1, "bitmap directory")
    for bitmap in store.all {
      count(bitmap.tableOffset, UInt64(bitmap.tableEntries) * 8, 1, "bitmap table")
      for cluster in bitmap.dataClusters { count(cluster << image.clusterBits, image.clusterSize, 1, "bitmap") }
    }
  }

  /// What the disk is made of now, and whether its flags agree with the refcounts.
  private mutating func countActive() throws(BlockError) {
    // A table that a hostile L1 names many times is gone through once.
    var seen: Set<UInt64> = []
    for entry in image.l1 {
      let table = entry & Qcow2Entry.offsetMask
      guard table != 0, table % image.clusterSize == 0, table < image.file.length, seen.insert(table).inserted else {
        continue
      }
      try checkFlag(entry, table >> image.clusterBits, "L1")
      // As qemu-img has it: table by table.
      var expected: UInt64 = 0
      for index in 0..<Int(image.header.l2Entries) {
        let entry = try image.l2Value(table, index).descriptor
        guard entry & (Qcow2Entry.offsetMask | Qcow2Entry.compressed) != 0 else { continue }
        report.allocatedClusters += 1
        if entry & Qcow2Entry.compressed != 0 {
          report.compressedClusters += 1
          // As qemu-img has it: compressed clusters are fragmented by nature.
          report.fragmentedClusters += 1
          continue
        }
        let host = entry & Qcow2Entry.offsetMask
        guard host % image.clusterSize == 0 else { continue }
        if expected != 0, host != expected { report.fragmentedClusters += 1 }
        expected = host + image.clusterSize
        try checkFlag(entry, host >> image.clusterBits, "L2")
      }
    }
  }

  private mutating func checkFlag(_ entry: UInt64, _ cluster: UInt64, _ what: String) throws(BlockError) {
    guard cluster << image.clusterBits < image.file.length.roundedUp(to: image.clusterSize) else { return }
    let count = try refcount(cluster)
    guard (count == 1) != (entry & Qcow2Entry.copied != 0) else { return }
    report.corruptions += 1
    report.note("\(what) entry 0x\(String(entry, radix: 16)) contradicts its cluster's refcount \(count)")
  }

  private mutating func refcount(_ cluster: UInt64) throws(BlockError) -> UInt64 {
    do throws(BlockError) {
      return try image.refcounts.count(cluster)
    } catch {
      // A block that cannot be: counted as a corruption of its own, and nothing is counted by it.
      if case .malformed = error { return 0 }
      throw error
    }
  }

  private mutating func compare() throws(BlockError) {
    var clusters: [(UInt64, UInt64)] = []
    references.forEach { clusters.append(($0, $1)) }
    for (cluster, used) in clusters {
      let count = try refcount(cluster)
      if count < used {
        report.corruptions += 1
        report.note("cluster \(cluster) has refcount \(count) and \(used) references")
      } else if count > used {
        report.leaks += 1
        report.note("cluster \(cluster) has refcount \(count) and \(used) references: leaked")
      }
    }
    let perBlock = image.header.refcountBlockEntries
    for (block, entry) in image.refcounts.table.enumerated() where entry != 0 {
      guard entry % image.clusterSize == 0, entry < image.file.length else { continue }
      for cluster in (UInt64(block) * perBlock)..<(UInt64(block + 1) * perBlock) {
        // A small block counts many clusters that no file reaches.
        guard references[cluster] == 0 else { continue }
        let count = try refcount(cluster)
        guard count > 0 else { continue }
        report.leaks += 1
        report.note("cluster \(cluster) has refcount \(count) and no references: leaked")
      }
    }
  }
}

extension Qcow2Image {
  /// Looks at everything that the tables name. Nothing is changed.
  public func check() throws(BlockError) -> Qcow2CheckReport {
    if !options.forCheck, !file.isReadOnly { try writeBackNow(withRefcounts: true) }
    var checker = Qcow2Checker(self)
    try checker.run()
    return checker.report
  }

  /// Checks, puts right what may be and can be, and checks again.
  public func repair(_ repairs: Qcow2Repairs) throws(BlockError) -> Qcow2CheckReport {
    guard !file.isReadOnly else { throw .readOnly(path: file.path) }
    var checker = Qcow2Checker(self)
    try checker.run()
    let before = checker.report
    if before.corruptions > 0, repairs.contains(.errors) {
      try rebuildRefcounts(checker.references)
    } else if before.leaks > 0, repairs.contains(.leaks) {
      try dropLeaks(checker.references)
    }
    var again = Qcow2Checker(self)
    try again.run()
    var report = again.report
    report.corruptionsFixed = max(0, before.corruptions - report.corruptions)
    report.leaksFixed = max(0, before.leaks - report.leaks)
    if report.corruptions == 0, repairs.contains(.errors) || before.corruptions == 0 {
      let marks = Qcow2Header.Incompatible.dirty | Qcow2Header.Incompatible.corrupt
      if header.incompatible & marks != 0 {
        header.incompatible &= ~marks
        try writeHeader()
      }
    }
    return report
  }

  private func dropLeaks(_ references: ReferenceMap) throws(BlockError) {
    try setDirty()
    let perBlock = header.refcountBlockEntries
    for (block, entry) in refcounts.table.enumerated() where entry != 0 {
      for cluster in (UInt64(block) * perBlock)..<(UInt64(block + 1) * perBlock)
      where try refcounts.count(cluster) > references[cluster] {
        try refcounts.set(cluster, references[cluster])
      }
    }
    // A cluster with one reference left may be changed in place again.
    try refreshCopiedFlags()
    try writeBackNow(withRefcounts: true)
  }

  /// New refcount structures behind everything that is used, and flags that agree with them. The old ones count until
  /// the header names the new ones, and are free then.
  private func rebuildRefcounts(_ references: ReferenceMap) throws(BlockError) {
    var used = ReferenceMap()
    let perBlock = header.refcountBlockEntries
    let oldBlocks = Set(refcounts.table.filter { $0 != 0 }.map { $0 >> clusterBits })
    let tableStart = refcounts.tableOffset >> clusterBits
    let oldTable = tableStart..<(tableStart + UInt64(refcounts.table.count) * 8 / clusterSize)
    var overflow = false
    references.forEach { cluster, count in
      let own: UInt64 = (oldBlocks.contains(cluster) ? 1 : 0) + (oldTable.contains(cluster) ? 1 : 0)
      if count > own { used.add(cluster, count - own) }
      if count - min(own, count) > header.maximumRefcount { overflow = true }
    }
    guard !overflow else { throw .unsupported(path: file.path, .refcountOverflow(bits: header.refcountBits)) }
    let home = max(references.end, file.length.dividedUp(by: clusterSize))
    var blocks: Set<UInt64> = []
    used.forEach { cluster, _ in blocks.insert(cluster / perBlock) }
    var total: UInt64 = 0
    var tableClusters: UInt64 = 0
    while true {
      tableClusters = max(1, (((home + total) / perBlock + 1) * 8).dividedUp(by: clusterSize))
      var needed = blocks
      for cluster in home..<(home + max(1, total)) { needed.insert(cluster / perBlock) }
      if UInt64(needed.count) + tableClusters == total {
        blocks = needed
        break
      }
      total = UInt64(needed.count) + tableClusters
    }
    for cluster in home..<(home + total) { used.add(cluster, 1) }
    guard tableClusters * clusterSize <= Qcow2Header.maximumRefcountTableBytes else {
      throw .malformed(
        path: file.path,
        .beyondLimit(
          what: "refcount table's size", value: tableClusters * clusterSize,
          limit: Qcow2Header.maximumRefcountTableBytes))
    }
    var table = [UInt64](repeating: 0, count: Int(tableClusters * clusterSize / 8))
    for (index, block) in blocks.sorted().enumerated() {
      let offset = (home + tableClusters + UInt64(index)) << clusterBits
      table[Int(block)] = offset
      var bytes = [UInt8](repeating: 0, count: Int(clusterSize))
      for entry in 0..<perBlock where used[block * perBlock + entry] > 0 {
        Qcow2Refcounts.put(used[block * perBlock + entry], &bytes, Int(entry), bits: header.refcountBits)
      }
      try file.writeArray(at: offset, bytes)
    }
    var bytes: [UInt8] = []
    for entry in table { bytes.appendBigEndian(entry) }
    try file.writeArray(at: home << clusterBits, bytes)
    try file.flush()
    header.refcountTableOffset = home << clusterBits
    header.refcountTableClusters = UInt32(tableClusters)
    if header.version == 3 { header.incompatible |= Qcow2Header.Incompatible.dirty }
    try writeHeader()
    refcounts.adopt(table: table, offset: header.refcountTableOffset)
    try refreshCopiedFlags()
    try writeBackNow(withRefcounts: true)
  }
}

extension Qcow2Refcounts {
  /// Stores a refcount in a block's bytes.
  static func put(_ value: UInt64, _ bytes: inout [UInt8], _ index: Int, bits: Int) {
    if bits < 8 {
      let position = index * bits
      bytes[position / 8] |= UInt8(truncatingIfNeeded: value) << UInt8(position % 8)
      return
    }
    for byte in 0..<(bits / 8) {
      bytes[index * bits / 8 + byte] = UInt8(truncatingIfNeeded: value >> UInt64(bits - 8 - byte * 8))
    }
  }
}
