import Glibc
import Host
import Synchronization
import Testing

/// A pipe: its reader is at the end once the last descriptor of its writer is closed.
private struct Pipe: ~Copyable {
  let reader: FileDescriptor
  let writer: FileDescriptor

  init() throws {
    var ends: [Int32] = [-1, -1]
    _ = try check("pipe", pipe(&ends))
    _ = fcntl(ends[0], F_SETFL, O_NONBLOCK)
    reader = FileDescriptor(owning: ends[0])
    writer = FileDescriptor(owning: ends[1])
  }

}

@Suite struct FileDescriptors {
  private func isAtEnd(_ reader: borrowing FileDescriptor) throws -> Bool {
    var byte: UInt8 = 0
    return try withUnsafeMutableBytes(of: &byte) { try reader.read(into: $0) } == 0
  }

  @Test func closeWithTheirOwner() throws {
    let pipe = try Pipe()
    let reader = pipe.reader
    do {
      let owner = pipe.writer
      #expect(try !isAtEnd(reader))
      _ = owner.rawValue
    }
    #expect(try isAtEnd(reader))
  }

  @Test func stayOpenWhenReleasedOrDuplicated() throws {
    let pipe = try Pipe()
    let reader = pipe.reader
    let writer = pipe.writer
    let copy = try writer.duplicate()
    #expect(fcntl(copy.rawValue, F_GETFD) == FD_CLOEXEC)
    let number = writer.release()
    #expect(fcntl(number, F_GETFD) >= 0)
    close(number)
    #expect(try !isAtEnd(reader))
    _ = consume copy
    #expect(try isAtEnd(reader))
  }

  @Test func carryTheCauseOfAFailure() {
    #expect(throws: HostError.path("open", path: "/no/such/file", errno: ENOENT)) {
      _ = try FileDescriptor.open("/no/such/file", O_RDONLY)
    }
    #expect("\(HostError.path("open", path: "/no", errno: ENOENT))" == "cannot open /no: No such file or directory")
    #expect(throws: HostError.systemCall("fcntl(F_DUPFD_CLOEXEC)", errno: EBADF)) {
      let wrong = FileDescriptor(owning: -1)
      _ = try wrong.duplicate()
    }
  }

  @Test func writeEverything() throws {
    let pipe = try Pipe()
    let reader = pipe.reader
    let writer = pipe.writer
    let text = [UInt8](repeating: 7, count: 5000)
    try text.withUnsafeBytes { try writer.writeAll($0) }
    var buffer = [UInt8](repeating: 0, count: 8000)
    #expect(try buffer.withUnsafeMutableBytes { try reader.read(into: $0) } == 5000)
    #expect(Array(buffer.prefix(5000)) == text)
    #expect(try buffer.withUnsafeMutableBytes { try reader.read(into: $0) } == nil)
  }
}

@Suite struct EventNotifiers {
  @Test func countSignals() throws {
    let event = try EventNotifier()
    #expect(event.drain() == 0)
    for _ in 0..<3 { event.signal() }
    #expect(event.drain() == 3)
    #expect(event.drain() == 0)
  }

  @Test func takeASignalWhenFull() throws {
    let event = try EventNotifier()
    var count = UInt64.max - 1
    #expect(write(event.descriptor.rawValue, &count, 8) == 8)
    event.signal()
    #expect(event.drain() == UInt64.max - 1)
  }
}

@Suite struct MemoryMappings {
  @Test func shareAMemoryFile() throws {
    let file = try makeMemoryFile(name: "test", size: 8192)
    let first = try MemoryMapping(file, count: 8192)
    let second = try MemoryMapping(file, offset: 4096, count: 4096, writable: false)
    first.base.storeBytes(of: 0x1234, toByteOffset: 4096, as: UInt32.self)
    #expect(second.base.load(as: UInt32.self) == 0x1234)
    #expect(second.count == 4096)
    // Sealed: no mapping of it can fault.
    #expect(ftruncate(file.rawValue, 4096) == -1)
    #expect(ftruncate(file.rawValue, 16384) == 0)
  }

  @Test func areZeroedAndTheirOwn() throws {
    let mapping = try MemoryMapping(anonymous: 1 << 20)
    #expect(UnsafeRawBufferPointer(start: mapping.base, count: mapping.count).allSatisfy { $0 == 0 })
  }

  @Test func carryTheCauseOfAFailure() throws {
    for (count, code) in [(0, EINVAL), (Int.max, ENOMEM), (-1, ENOMEM)] {
      #expect(throws: HostError.systemCall("mmap of \(count) bytes", errno: code)) {
        _ = try MemoryMapping(anonymous: count)
      }
    }
    let file = try makeMemoryFile(name: "test", size: 4096)
    #expect(throws: HostError.systemCall("mmap of 4096 bytes", errno: EINVAL)) {
      _ = try MemoryMapping(file, offset: 1, count: 4096)
    }
    #expect(throws: HostError.self) { _ = try makeMemoryFile(name: "test", size: -1) }
  }

  @Test func areUnmappedOnce() throws {
    let name = "unmapped-once"
    let file = try makeMemoryFile(name: name, size: 4096)
    do {
      let mapping = try MemoryMapping(file, count: 4096)
      #expect(try Self.maps().contains(name))
      _ = mapping.base
    }
    #expect(try !Self.maps().contains(name))
  }

  private static func maps() throws -> String {
    let file = try FileDescriptor.open("/proc/self/maps", O_RDONLY)
    var text: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 1 << 16)
    while let count = try buffer.withUnsafeMutableBytes({ try file.read(into: $0) }), count > 0 {
      text += buffer[..<count]
    }
    return String(decoding: text, as: UTF8.self)
  }
}

@Suite struct HostThreads {
  @Test func runOnceAndAreJoined() throws {
    let runs = Atomic(0)
    let threads = try (0..<20).map { _ in
      try HostThread(name: "a name that is too long") { runs.add(1, ordering: .relaxed) }
    }
    for thread in threads {
      thread.join()
      thread.join()
    }
    #expect(runs.load(ordering: .relaxed) == 20)
  }

  @Test func goOnWithoutAnOwner() throws {
    let done = Condition(false)
    do { _ = try HostThread(name: "free") { done.withLock { $0 = true } } }
    #expect(done.wait { $0 ? true : nil })
  }

  @Test func haveNumbersOfTheirOwn() throws {
    let numbers = Mutex<Set<Int32>>([])
    let isStarted = Condition(0)
    let threads = try (0..<4).map { _ in
      try HostThread(name: "number") {
        #expect(ThreadIdentity.current.id == ThreadIdentity.current.id)
        numbers.withLock { _ = $0.insert(ThreadIdentity.current.id) }
        isStarted.withLock { $0 += 1 }
        // All alive at once, so that no number is given twice.
        isStarted.wait { $0 == 4 ? () : nil }
      }
    }
    for thread in threads { thread.join() }
    #expect(numbers.withLock { $0.count } == 4)
  }

  /// The worker that runs this test blocks every signal, and a thread inherits that.
  @Test func areInterrupted() throws {
    try ThreadIdentity.installKickHandler()
    var ends: [Int32] = [-1, -1]
    _ = try check("pipe", pipe(&ends))
    let reader = FileDescriptor(owning: ends[0])
    let writer = FileDescriptor(owning: ends[1])
    let identity = Condition<ThreadIdentity?>(nil)
    let result = Condition<Int32?>(nil)
    let end = reader.rawValue
    let thread = try HostThread(name: "reader") {
      identity.withLock { $0 = .becomeInterruptible() }
      var byte: UInt8 = 0
      let count = read(end, &byte, 1)
      let code = errno
      result.withLock { $0 = count < 0 ? code : 0 }
    }
    let target = identity.wait { $0 }
    // Again and again, as the first may come before it reads.
    while result.withLock({ $0 }) == nil {
      target.interrupt()
      usleep(1000)
    }
    thread.join()
    #expect(result.withLock { $0 } == EINTR)
    target.interrupt()
    _ = writer.rawValue
  }
}
