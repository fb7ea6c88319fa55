import StateTree

/// The records of the protocol; docs/migration.md has the tables. Numbers are little-endian.
enum MigrationRecord {
  static let version: UInt32 = 1

  enum Kind: UInt32 {
    // From the source.
    case machine = 1
    case pages, compressedPages, endOfPages, state, go
    case postCopy, missing
    // From the destination.
    case accept = 16
    case refuse, ready, taken, notTaken
    case wanted, request, arrived

    /// The longest payload.
    var limit: Int {
      switch self {
      case .pages, .compressedPages: PageBatch.limit
      case .machine: 1 << 20
      case .state: 256 << 20
      case .refuse: 4096
      case .endOfPages: 8
      // A bit for each of 16 TiB's pages.
      case .missing, .wanted: 512 << 20
      case .request: 8 * mostRequests
      case .arrived: 24
      case .go, .postCopy, .accept, .ready, .taken, .notTaken: 0
      }
    }
  }

  /// Pages that are asked for at once.
  static let mostRequests = 512

  static func header(_ kind: Kind, count: Int) -> [UInt8] {
    var writer = StateWriter()
    writer.write(kind.rawValue)
    writer.write(UInt32(count))
    return writer.bytes
  }
}

extension UInt64 {
  /// Eight bytes of a record.
  init(littleEndian bytes: some BidirectionalCollection<UInt8>) {
    self = bytes.reversed().reduce(0) { $0 << 8 | UInt64($1) }
  }
}

/// What a source says first on every link.
struct MigrationGreeting: Equatable {
  static let magic: [UInt8] = Array("SWVMMIGR".utf8)
  static let size = 40
  static let mostLinks = 17

  enum Purpose: UInt32 {
    /// A machine comes.
    case move
    /// Who has the machine of this session?
    case question
    /// Pages that the destination goes on without: all links but the last bring them in their order, the last when asked.
    case postCopy
  }

  var purpose: Purpose
  var link: UInt16
  var links: UInt16
  /// The same for all links of a migration, and of no other.
  var session: SIMD2<UInt64>

  var bytes: [UInt8] {
    var writer = StateWriter()
    writer.write(MigrationRecord.version)
    writer.write(purpose.rawValue)
    writer.write(link)
    writer.write(links)
    writer.write(UInt32(0))
    writer.write(session.x)
    writer.write(session.y)
    return Self.magic + writer.bytes
  }

  init(_ purpose: Purpose, link: Int = 0, of links: Int = 1, session: SIMD2<UInt64>) {
    self.purpose = purpose
    self.link = UInt16(link)
    self.links = UInt16(links)
    self.session = session
  }

  init(_ bytes: [UInt8]) throws(MigrationError) {
    func number<Value: FixedWidthInteger>(_: Value.Type, _ place: Int) -> Value {
      (0..<MemoryLayout<Value>.size).reversed().reduce(0) { $0 << 8 | Value(truncatingIfNeeded: bytes[place + $1]) }
    }
    // The records of a TLS handshake.
    if bytes.starts(with: [22, 3]) { throw .wantsTLS }
    guard bytes.count == Self.size, bytes.starts(with: Self.magic) else { throw .notAMigration }
    let version = number(UInt32.self, 8)
    guard version == MigrationRecord.version else { throw .version(found: version, known: MigrationRecord.version) }
    guard let purpose = Purpose(rawValue: number(UInt32.self, 12)) else { throw .malformed(.greeting) }
    self.purpose = purpose
    link = number(UInt16.self, 16)
    links = number(UInt16.self, 18)
    session = SIMD2(number(UInt64.self, 24), number(UInt64.self, 32))
    guard (1...UInt16(Self.mostLinks)).contains(links), link < links else { throw .malformed(.greeting) }
  }
}

/// How pages stand in a record: iteration (32 bits), class (8 bits), three zeros, then entries. An entry begins with 64 bits,
/// the page's number in the upper 56 and the kind in the lower 8.
enum PageBatch {
  static let headerSize = 8
  /// A batch is sent when it is so long.
  static let size = 256 << 10
  /// More than any batch has.
  static let limit = 1 << 20

  enum Entry: UInt8 {
    /// 32 bits: how many pages from this one on are zeros.
    case zeros
    /// The page.
    case whole
    /// 16 bits: how many 64-bit words have changed; each is its number in the page (16 bits) and the word.
    case words
  }

  static let pageSize = 4096
  static let wordsInPage = 512
  /// More changed words than these are sent as a page.
  static let mostWords = 256
}
