import BlockLayer
import Testing

@testable import NBD

/// The server's side of a connection, byte by byte, after NBD's doc/proto.md.
struct SessionTests {
  @Test func greetsAndTellsOfItsExports() throws {
    let client = try Conversation()
    #expect(client.say([]) == Array("NBDMAGICIHAVEOPT".utf8) + [0, 3])
    client.say(Wire.flags(3))
    let list = client.say(Wire.option(.list), step: 1)
    let expected =
      Wire.optionReply(.list, NBDProtocol.OptionReply.server, Wire.string("disk") + "a disk".utf8)
      + Wire.optionReply(.list, NBDProtocol.OptionReply.server, Wire.string("other"))
      + Wire.optionReply(.list, NBDProtocol.OptionReply.ack)
    #expect(list == expected)
  }

  @Test(arguments: [0, 2] as [UInt32])
  func exportNameGoesStraightOn(flags: UInt32) throws {
    let client = try Conversation()
    client.say(Wire.flags(1 | flags))
    let answer = client.say(Wire.option(.exportName, Array("disk".utf8)))
    #expect(answer.count == (flags == 2 ? 10 : 134))
    #expect(answer.bigEndian64(0) == 65536)
    let reply = client.say(Wire.request(.read, at: 512, length: 512))
    #expect(reply == Wire.simpleReply(0) + client.node.bytes[512..<1024])
  }

  /// Where TLS is required nothing else is answered before it; what was said in the clear does not count after it.
  @Test func nothingIsSaidBeforeTLS() throws {
    let client = try Conversation(requiresTLS: true)
    client.say(Wire.flags(3))
    for option in [NBDProtocol.Option.list, .info, .go, .structuredReply, .listMetaContext, .setMetaContext] {
      #expect(client.say(Wire.option(option)).bigEndian32(12) == NBDProtocol.OptionReply.needsTLS, "\(option)")
    }
    #expect(client.say(Wire.option(77, length: 0)).bigEndian32(12) == NBDProtocol.OptionReply.needsTLS)
    #expect(client.say(Wire.option(.startTLS, [1])).bigEndian32(12) == NBDProtocol.OptionReply.invalid)
    #expect(client.say(Wire.option(.startTLS)) == Wire.optionReply(.startTLS, NBDProtocol.OptionReply.ack))
    #expect(client.session.wantsTLS && !client.session.wantsInput && !client.session.usesStructuredReplies)
    client.session.startEncrypted()
    #expect(client.session.wantsInput)
    #expect(client.say(Wire.option(.startTLS)).bigEndian32(12) == NBDProtocol.OptionReply.invalid)
    client.say(Wire.option(.go, Wire.string("disk") + [0, 0]))
    let reply = client.say(Wire.request(.read, at: 512, length: 512))
    #expect(reply == Wire.simpleReply(0) + client.node.bytes[512..<1024])
  }

  @Test func whatFollowsStartTLSInTheClearEndsTheConnection() throws {
    let client = try Conversation(requiresTLS: true)
    client.say(Wire.flags(3) + Wire.option(.startTLS) + Wire.option(.go, Wire.string("disk") + [0, 0]))
    #expect(client.session.isOver && !client.session.wantsTLS)
    let other = try Conversation(requiresTLS: true)
    other.say(Wire.flags(3) + Wire.option(.exportName, Array("disk".utf8)))
    #expect(other.session.isOver)
  }

  @Test func optionsThatAreWrongAreRefusedAndTheNextOneCounts() throws {
    let client = try Conversation()
    client.say(Wire.flags(3))
    func refusal(_ option: NBDProtocol.Option, _ data: [UInt8]) -> UInt32 {
      client.say(Wire.option(option, data)).bigEndian32(12)
    }
    #expect(refusal(.list, [1]) == NBDProtocol.OptionReply.invalid)
    #expect(refusal(.startTLS, []) == NBDProtocol.OptionReply.policy)
    #expect(refusal(.go, Wire.string("none") + [0, 0]) == NBDProtocol.OptionReply.unknown)
    #expect(refusal(.go, Wire.string("disk") + [0, 1]) == NBDProtocol.OptionReply.invalid)
    #expect(refusal(.go, Wire.words(UInt32.max, UInt16(0))) == NBDProtocol.OptionReply.invalid)
    #expect(refusal(.info, Wire.string("disk") + [0, 0, 0]) == NBDProtocol.OptionReply.invalid)
    #expect(refusal(.setMetaContext, Wire.queries("disk", [])) == NBDProtocol.OptionReply.invalid)
    #expect(refusal(.structuredReply, [0]) == NBDProtocol.OptionReply.invalid)
    #expect(client.say(Wire.option(77, length: 3) + [1, 2, 3]).bigEndian32(12) == NBDProtocol.OptionReply.unsupported)
    let long = client.say(
      Wire.option(NBDProtocol.Option.list.rawValue, length: 70000) + [UInt8](repeating: 0, count: 70000))
    #expect(long.bigEndian32(12) == NBDProtocol.OptionReply.tooBig)
    #expect(client.say(Wire.option(.info, Wire.string("disk") + [0, 0])).suffix(8).first == 0)
    #expect(client.say(Wire.option(.abort)) == Wire.optionReply(.abort, NBDProtocol.OptionReply.ack))
    #expect(client.session.isOver)
  }

  @Test(arguments: [
    Wire.flags(0x8000_0000), Wire.flags(3) + Wire.words(UInt64(1), UInt32(3), UInt32(0)),
    Wire.flags(3) + Wire.option(3, length: .max), Wire.flags(3) + Wire.option(.exportName, Array("none".utf8)),
    Wire.flags(3) + Wire.option(.exportName, Array("disk".utf8)) + [UInt8](repeating: 9, count: 28),
    Wire.flags(3) + Wire.option(.exportName, Array("disk".utf8)) + Wire.request(.write, length: 33 << 20),
  ])
  func whoBreaksTheProtocolIsDropped(bytes: [UInt8]) throws {
    let client = try Conversation()
    client.say(bytes)
    #expect(client.session.isOver)
    #expect(client.session.inFlight == 0)
    #expect(!client.session.wantsInput)
  }

  @Test func contextsAreListedAndSelected() throws {
    let client = try Conversation(bitmaps: 1)
    client.say(Wire.flags(3) + Wire.option(.structuredReply))
    func contexts(_ option: NBDProtocol.Option, _ queries: [String]) -> [String] {
      var names: [String] = []
      var rest = client.say(Wire.option(option, Wire.queries("disk", queries)))[...]
      while rest.count >= 20 {
        let reply = Array(rest)
        let length = Int(reply.bigEndian32(16))
        if reply.bigEndian32(12) == NBDProtocol.OptionReply.metaContext {
          names.append(String(decoding: reply[24..<(20 + length)], as: UTF8.self))
        }
        rest = rest.dropFirst(20 + length)
      }
      return names
    }
    #expect(contexts(.listMetaContext, []) == ["base:allocation", "qemu:dirty-bitmap:bits0"])
    #expect(contexts(.listMetaContext, ["qemu:"]) == ["qemu:dirty-bitmap:bits0"])
    #expect(contexts(.setMetaContext, ["qemu:", "x:y"]) == [])
    #expect(contexts(.setMetaContext, ["qemu:dirty-bitmap:bits0"]) == ["qemu:dirty-bitmap:bits0"])
    client.say(Wire.option(.go, Wire.string("disk") + [0, 0]))
    let status = client.say(Wire.request(.blockStatus, length: 8192))
    #expect(
      status
        == Wire.chunk(
          NBDProtocol.Chunk.blockStatus, Wire.words(UInt32(1), UInt32(1024), UInt32(1), UInt32(7168), UInt32(0))))
  }

  @Test func contextsOfAnotherExportDoNotCount() throws {
    let client = try Conversation()
    client.say(Wire.flags(3) + Wire.option(.structuredReply))
    client.say(Wire.option(.setMetaContext, Wire.queries("other", ["base:allocation"])))
    client.say(Wire.option(.go, Wire.string("disk") + [0, 0]))
    #expect(Wire.errorCode(client.say(Wire.request(.blockStatus, length: 512))) == 22)
  }

  @Test func moreContextsThanAClientMaySelectAreRefused() throws {
    let client = try Conversation(bitmaps: 20)
    client.say(Wire.flags(3) + Wire.option(.structuredReply))
    let names = (0..<20).map { "qemu:dirty-bitmap:bits\($0)" }
    let reply = client.say(Wire.option(.setMetaContext, Wire.queries("disk", names)))
    #expect(reply.bigEndian32(12) == NBDProtocol.OptionReply.tooBig)
  }

  @Test func structuredReadsTellHoles() throws {
    let client = try Conversation()
    client.negotiate()
    let read = client.say(Wire.request(.read, at: 2048, length: 8192))
    let expected =
      Wire.chunk(NBDProtocol.Chunk.offsetData, done: false, Wire.words(UInt64(2048)) + client.node.bytes[2048..<4096])
      + Wire.chunk(NBDProtocol.Chunk.offsetHole, done: false, Wire.words(UInt64(4096), UInt32(4096)))
      + Wire.chunk(NBDProtocol.Chunk.offsetData, Wire.words(UInt64(8192)) + client.node.bytes[8192..<10240])
    #expect(read == expected)
    let whole = client.say(Wire.request(.read, flags: .df, at: 2048, length: 8192))
    #expect(
      whole == Wire.chunk(NBDProtocol.Chunk.offsetData, Wire.words(UInt64(2048)) + client.node.bytes[2048..<10240]))
    client.node.log = []
    let hole = client.say(Wire.request(.read, at: 4096, length: 4096))
    #expect(hole == Wire.chunk(NBDProtocol.Chunk.offsetHole, Wire.words(UInt64(4096), UInt32(4096))))
    #expect(client.node.log.isEmpty)
    #expect(client.say(Wire.request(.read, at: 65536)) == Wire.chunk(NBDProtocol.Chunk.none, []))
  }

  @Test func blockStatusMayBeOneExtent() throws {
    let client = try Conversation()
    client.negotiate(contexts: ["base:allocation"])
    let all = client.say(Wire.request(.blockStatus, length: 65536))
    let extents = Wire.words(
      UInt32(0), UInt32(4096), UInt32(0), UInt32(4096), UInt32(3), UInt32(57344), UInt32(0))
    #expect(all == Wire.chunk(NBDProtocol.Chunk.blockStatus, extents))
    let one = client.say(Wire.request(.blockStatus, flags: .reqOne, at: 100, length: 60000))
    #expect(one == Wire.chunk(NBDProtocol.Chunk.blockStatus, Wire.words(UInt32(0), UInt32(3996), UInt32(0))))
  }

  @Test func writesArriveHoweverTheyAreCut() throws {
    let client = try Conversation()
    client.negotiate()
    let data = (0..<1000).map { UInt8(truncatingIfNeeded: $0 * 7) }
    for step in [1, 29, 500, Int.max] {
      let reply = client.say(Wire.request(.write, flags: .fua, at: 3000, length: 1000) + data, step: step)
      #expect(reply == Wire.simpleReply(0))
      #expect(Array(client.node.bytes[3000..<4000]) == data)
      #expect(client.node.log == ["write 3000 1000", "flush 0 0"])
      client.node.log = []
      client.node.bytes[3500] ^= 1
    }
  }

  @Test func requestsReachTheDisk() throws {
    let client = try Conversation()
    client.negotiate()
    #expect(client.say(Wire.request(.trim, at: 0, length: 4096)) == Wire.simpleReply(0))
    #expect(client.say(Wire.request(.writeZeroes, at: 512, length: 512)) == Wire.simpleReply(0))
    #expect(client.say(Wire.request(.writeZeroes, flags: [.noHole, .fua], length: 512)) == Wire.simpleReply(0))
    #expect(client.say(Wire.request(.flush)) == Wire.simpleReply(0))
    #expect(
      client.node.log == [
        "discard 0 4096", "writeZeroes 512 512 unmap", "writeZeroes 0 512", "flush 0 0", "flush 0 0",
      ])
  }

  /// Error values are the specification's, and the connection goes on.
  @Test func requestsThatAreWrongAreRefused() throws {
    let client = try Conversation()
    client.negotiate(contexts: ["base:allocation"])
    func code(_ request: [UInt8]) -> UInt32? {
      let reply = client.say(request)
      return Wire.errorCode(reply) ?? (reply.count == 16 ? reply.bigEndian32(4) : nil)
    }
    let word = [UInt8](repeating: 1, count: 512)
    #expect(code(Wire.request(.read, at: 65536, length: 1)) == 22)
    #expect(code(Wire.request(.read, at: .max, length: 1)) == 22)
    #expect(code(Wire.request(.read, length: .max)) == 22)
    #expect(code(Wire.request(.write, at: 65536, length: 512) + word) == 28)
    #expect(code(Wire.request(.writeZeroes, at: 65000, length: 1024)) == 28)
    #expect(code(Wire.request(.trim, at: 65000, length: 1024)) == 22)
    #expect(code(Wire.request(.blockStatus)) == 22)
    #expect(code(Wire.request(.read, flags: .noHole, length: 512)) == 22)
    #expect(code(Wire.request(.write, flags: .df, length: 512) + word) == 22)
    #expect(code(Wire.request(.writeZeroes, flags: .fastZero, length: 512)) == 22)
    #expect(code(Wire.request(.flush, length: 1)) == 22)
    #expect(code(Wire.request(99)) == 22)
    #expect(client.node.log.isEmpty)
    #expect(code(Wire.request(.flush)) == 0)
  }

  @Test func aReadOnlyExportTakesNoChanges() throws {
    let client = try Conversation(isReadOnly: true)
    client.negotiate()
    for request in [
      Wire.request(.write, length: 4) + [1, 2, 3, 4], Wire.request(.trim, length: 4),
      Wire.request(.writeZeroes, length: 4),
    ] {
      #expect(client.say(request) == Wire.simpleReply(1))
    }
    #expect(client.node.log.isEmpty)
  }

  @Test func theDisksErrorsAreTold() throws {
    let client = try Conversation()
    client.negotiate()
    client.node.failure = .io(call: "write", path: "disk", errno: 28)
    #expect(client.say(Wire.request(.write, length: 1) + [1]) == Wire.simpleReply(28))
    client.node.failure = .io(call: "read", path: "disk", errno: 5)
    #expect(Wire.errorCode(client.say(Wire.request(.read, length: 512))) == 5)
    #expect(client.say(Wire.request(.flush)) == Wire.simpleReply(5))
  }

  @Test func repliesComeAsRequestsEnd() throws {
    let client = try Conversation()
    client.negotiate(structured: false)
    client.node.holds = true
    #expect(client.say(Wire.request(.read, cookie: 1, length: 1) + Wire.request(.flush, cookie: 2)) == [])
    #expect(client.session.inFlight == 2)
    client.node.complete(client.node.held[1])
    #expect(client.drain() == Wire.simpleReply(0, cookie: 2))
    // What is under way when the client says good-bye is still answered.
    client.say(Wire.request(.disconnect))
    #expect(!client.session.isOver)
    client.node.complete(client.node.held[0])
    #expect(client.drain() == Wire.simpleReply(0, cookie: 1) + [0])
    #expect(client.session.isOver)
  }

  @Test func aClientThatAsksForTooMuchWaits() throws {
    let client = try Conversation()
    client.negotiate(structured: false)
    client.node.holds = true
    client.say((0..<500).flatMap { Wire.request(.read, cookie: UInt64($0), length: 4096) })
    #expect(client.session.inFlight == 128)
    #expect(!client.session.wantsInput)
    client.node.complete(client.node.held.removeFirst())
    _ = client.drain()
    #expect(client.session.inFlight == 128)
    client.session.drop()
    client.node.holds = false
    for request in client.node.held { client.node.complete(request) }
    #expect(client.session.inFlight == 0)
  }

  @Test func aClientThatReadsNoRepliesIsNotHeard() throws {
    let client = try Conversation()
    client.say(Wire.flags(3))
    let options = (0..<800).flatMap { _ in Wire.option(.list) }
    let space = client.session.space
    space.copyBytes(from: options)
    client.session.received(options.count)
    #expect(client.session.output.count < 1030)
    #expect(!client.session.wantsInput)
    #expect(client.drain().count == 800 * (20 + 4 + 4 + 6 + 20 + 4 + 5 + 20))
    #expect(client.session.wantsInput)
  }

  @Test func whoGoesInTheMiddleOfAWriteLeavesNothingBehind() throws {
    let client = try Conversation()
    client.negotiate()
    client.say(Wire.request(.write, length: 4096) + [1, 2, 3])
    #expect(client.session.inFlight == 1)
    client.session.drop()
    #expect(client.session.inFlight == 0)
    #expect(client.node.log.isEmpty)
  }
}
