/// Numbers of the NBD protocol (NetworkBlockDevice's doc/proto.md), shared by the client and the server.
package enum NBDProtocol {
  /// "NBDMAGIC", the first word of a server's greeting.
  package static let greeting: UInt64 = 0x4e42_444d_4147_4943
  /// "IHAVEOPT", the second word, and the first of every option.
  package static let optionMagic: UInt64 = 0x4948_4156_454f_5054
  package static let optionReplyMagic: UInt64 = 0x0003_e889_0455_65a9
  package static let requestMagic: UInt32 = 0x2560_9513
  package static let simpleReplyMagic: UInt32 = 0x6744_6698
  package static let structuredReplyMagic: UInt32 = 0x668e_33ef

  /// The longest string: an export's name, a description, a query.
  package static let longestString = 4096
  /// The most data of an option.
  package static let longestOption = 64 << 10
  /// The most bytes that one request reads or writes.
  package static let longestPayload = 32 << 20
  /// Bytes of a request, and of the headers of the two kinds of reply.
  package static let requestSize = 28
  package static let simpleReplySize = 16
  package static let chunkHeaderSize = 20

  /// Flags of the handshake.
  package struct HandshakeFlags: OptionSet, Sendable {
    package let rawValue: UInt32
    package init(rawValue: UInt32) { self.rawValue = rawValue }
    package static let fixedNewstyle = HandshakeFlags(rawValue: 1)
    package static let noZeroes = HandshakeFlags(rawValue: 2)
  }

  /// Flags of an export.
  package struct TransmissionFlags: OptionSet, Sendable {
    package let rawValue: UInt16
    package init(rawValue: UInt16) { self.rawValue = rawValue }
    package static let hasFlags = TransmissionFlags(rawValue: 1 << 0)
    package static let readOnly = TransmissionFlags(rawValue: 1 << 1)
    package static let sendFlush = TransmissionFlags(rawValue: 1 << 2)
    package static let sendFUA = TransmissionFlags(rawValue: 1 << 3)
    package static let sendTrim = TransmissionFlags(rawValue: 1 << 5)
    package static let sendWriteZeroes = TransmissionFlags(rawValue: 1 << 6)
    package static let sendDF = TransmissionFlags(rawValue: 1 << 7)
    package static let multiConn = TransmissionFlags(rawValue: 1 << 8)
    package static let sendFastZero = TransmissionFlags(rawValue: 1 << 11)
  }

  /// Options of the handshake.
  package enum Option: UInt32, Sendable {
    case exportName = 1
    case abort = 2
    case list = 3
    case startTLS = 5
    case info = 6
    case go = 7
    case structuredReply = 8
    case listMetaContext = 9
    case setMetaContext = 10
  }

  /// Replies to options; errors have the highest bit set.
  package enum OptionReply {
    package static let ack: UInt32 = 1
    package static let server: UInt32 = 2
    package static let info: UInt32 = 3
    package static let metaContext: UInt32 = 4
    package static let errorBit: UInt32 = 1 << 31
    package static let unsupported: UInt32 = errorBit | 1
    package static let policy: UInt32 = errorBit | 2
    package static let invalid: UInt32 = errorBit | 3
    package static let unknown: UInt32 = errorBit | 6
    package static let needsTLS: UInt32 = errorBit | 5
    package static let tooBig: UInt32 = errorBit | 9
  }

  /// What `NBD_REP_INFO` tells.
  package enum Info: UInt16, Sendable {
    case export = 0
    case name = 1
    case description = 2
    case blockSize = 3
  }

  /// Requests.
  package enum Command: UInt16, Sendable {
    case read = 0
    case write = 1
    case disconnect = 2
    case flush = 3
    case trim = 4
    case writeZeroes = 6
    case blockStatus = 7
  }

  /// Flags of a request.
  package struct CommandFlags: OptionSet, Sendable {
    package let rawValue: UInt16
    package init(rawValue: UInt16) { self.rawValue = rawValue }
    package static let fua = CommandFlags(rawValue: 1 << 0)
    package static let noHole = CommandFlags(rawValue: 1 << 1)
    package static let df = CommandFlags(rawValue: 1 << 2)
    package static let reqOne = CommandFlags(rawValue: 1 << 3)
    package static let fastZero = CommandFlags(rawValue: 1 << 4)
  }

  /// Chunks of a structured reply.
  package enum Chunk {
    package static let done: UInt16 = 1
    package static let none: UInt16 = 0
    package static let offsetData: UInt16 = 1
    package static let offsetHole: UInt16 = 2
    package static let blockStatus: UInt16 = 5
    package static let error: UInt16 = 1 << 15 | 1
    package static let errorOffset: UInt16 = 1 << 15 | 2
  }

  /// Errors of a reply, which have the values of Linux's `errno`.
  package enum Code: UInt32, Sendable {
    case notPermitted = 1
    case inputOutput = 5
    case noMemory = 12
    case invalid = 22
    case noSpace = 28
    case overflow = 75
    case notSupported = 95
    case shutdown = 108
  }

  /// Metadata contexts.
  package static let baseAllocation = "base:allocation"
  package static let dirtyBitmapPrefix = "qemu:dirty-bitmap:"
  /// Extents of `base:allocation`.
  package static let stateHole: UInt32 = 1
  package static let stateZero: UInt32 = 2
  /// Extents of a dirty bitmap.
  package static let stateDirty: UInt32 = 1
}
