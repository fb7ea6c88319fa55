import Glibc
import Testing

@testable import NetLayer

struct FramingTests {
  /// The frames that a reader finds in pieces of a stream.
  private func read(_ pieces: [[UInt8]]) -> (frames: [[UInt8]], runts: UInt64, isMalformed: Bool) {
    var reader = FrameReader()
    var frames: [[UInt8]] = []
    for piece in pieces {
      var rest = piece[...]
      repeat {
        let space = reader.space
        let count = min(rest.count, space.count)
        #expect(count > 0 || rest.isEmpty, "there is room to read")
        space.copyBytes(from: rest.prefix(count))
        rest = rest.dropFirst(count)
        reader.received(count)
        while let frame = reader.next() { frames.append(Array(frame.dropFirst(StreamFraming.prefix))) }
      } while !rest.isEmpty
    }
    return (frames, reader.runts, reader.isMalformed)
  }

  @Test func framesAreWholeWhereverTheStreamIsCut() {
    let frames = [14, 60, 15, 1514].map {
      makeFrame(from: 2, to: 4, [UInt8](repeating: UInt8($0 % 251), count: $0 - 14))
    }
    let stream = frames.flatMap { framed($0) }
    for cut in 0...stream.count {
      let result = read([Array(stream[..<cut]), Array(stream[cut...])])
      #expect(result.frames == frames && !result.isMalformed, "cut at \(cut)")
    }
    #expect(read(stream.map { [$0] }).frames == frames, "byte by byte")
  }

  @Test func frameLengthsUpToTheLimitAreTaken() {
    let longest = makeFrame(from: 2, to: 4, [UInt8](repeating: 7, count: NetworkFrame.longest - 14))
    // More than the reader holds at once.
    let result = read([[longest, longest, longest, longest, longest].flatMap { framed($0) }])
    #expect(result.frames == [longest, longest, longest, longest, longest])
  }

  @Test(arguments: [UInt32(NetworkFrame.longest + 1), 0x7fff_ffff, 0x8000_0000, 0xffff_ffff])
  func aLengthThatIsNoneEndsTheStream(length: UInt32) {
    let good = makeFrame(from: 2, to: 4)
    let bad = withUnsafeBytes(of: length.bigEndian) { Array($0) }
    let result = read([framed(good) + bad + framed(good)])
    #expect(result.isMalformed)
    #expect(result.frames == [good])
  }

  @Test func framesThatAreTooShortAreLeftOut() {
    let good = makeFrame(from: 2, to: 4)
    let stream = (0..<14).flatMap { framed([UInt8](repeating: 1, count: $0)) } + framed(good)
    let result = read([stream])
    #expect(result.frames == [good])
    #expect(result.runts == 14)
  }

  /// The socket takes so many bytes and is full; what it has not taken comes later, whole and in order.
  @Test func aSocketMayBeFullAtAnyByte() {
    let memory = [14, 60, 15, 200].map {
      framed(makeFrame(from: 2, to: 4, [UInt8](repeating: UInt8($0), count: $0 - 14)))
    }
    // Two that lie together, two that do not.
    let pieces = [memory[0] + memory[1], memory[2], memory[3]]
    let stream = pieces.flatMap { $0 }
    for room in 0...stream.count {
      var sender = FrameSender()
      let traffic = Traffic()
      var output: [UInt8] = []
      var left = room
      let write: FrameSender.Write = { vectors, count in
        let bytes = (0..<count).flatMap {
          UnsafeRawBufferPointer(start: vectors[$0].iov_base, count: vectors[$0].iov_len)
        }
        let taken = min(left, bytes.count)
        left -= taken
        output += bytes[..<taken]
        return taken
      }
      pieces[0].withUnsafeBytes { first in
        pieces[1].withUnsafeBytes { second in
          pieces[2].withUnsafeBytes { third in
            sender.send(UnsafeRawBufferPointer(rebasing: first[..<memory[0].count]))
            sender.send(UnsafeRawBufferPointer(rebasing: first[memory[0].count...]))
            sender.send(second)
            sender.send(third)
            sender.flush(traffic, isOver: false, write)
          }
        }
      }
      #expect(output.count == room && sender.isWaiting == (room < stream.count))
      left = .max
      sender.drain(write)
      #expect(output == stream && !sender.isWaiting, "\(room) bytes at first")
      #expect(traffic.counters.sent == 4 && traffic.counters.sentBytes == 289 && traffic.counters.dropped == 0)
    }
  }

  @Test func aQueueIsARingOfBoundedSize() {
    var queue = FrameQueue()
    var model: [UInt8] = []
    var random = SystemRandomNumberGenerator()
    var next: UInt8 = 0
    var refusals = 0
    for _ in 0..<400 {
      // It fills: more comes than goes.
      if Int.random(in: 0..<5, using: &random) < 3 {
        let bytes = (0..<Int.random(in: 1...65_000, using: &random)).map { _ in
          next &+= 1
          return next
        }
        let fits = model.count + bytes.count <= FrameQueue.capacity
        #expect(bytes.withUnsafeBytes { queue.append($0) } == fits)
        if fits { model += bytes } else { refusals += 1 }
      } else {
        let pieces = queue.pieces()
        let count = min(model.count, Int.random(in: 0...55_000, using: &random))
        let seen = [pieces.0, pieces.1].flatMap { Array(UnsafeRawBufferPointer(start: $0.iov_base, count: $0.iov_len)) }
        #expect(seen == model)
        queue.removeFirst(count)
        model.removeFirst(count)
      }
      #expect(queue.count == model.count && queue.isEmpty == model.isEmpty)
    }
    #expect(refusals > 0)
  }
}
