import DeviceTesting
import Foundation
import PlatformDevices
import Synchronization
import Testing

@Suite struct SerialTests {
  private let fixture: Fixture
  private let serial: Serial16550

  init() throws {
    fixture = try Fixture()
    serial = Serial16550(name: "serial0", line: fixture.line(4), output: fixture.output)
    try fixture.attach(serial)
    // The guest looks at the line status, and so is ready for input.
    _ = serial.read(offset: 5, size: 1)
  }

  private func read(_ register: UInt64) -> UInt64 { fixture.input(0x3f8 + register) }
  private func write(_ register: UInt64, _ value: UInt64) { fixture.output(0x3f8 + register, value) }
  private func receive(_ text: String) -> Int { serial.receive(Array(text.utf8)) {} }

  @Test func bytesComeOutAndTheTransmitterIsAlwaysEmpty() {
    for byte in "hi\n".utf8 {
      #expect(read(5) & 0x60 == 0x60)
      write(0, UInt64(byte))
    }
    #expect(fixture.output.text == "hi\n")
  }

  @Test func inputWaitsOutsideUntilTheGuestLooks() {
    serial.reset()
    let roomCalls = Atomic(0)
    #expect(serial.receive([0x61]) { roomCalls.add(1, ordering: .relaxed) } == 0)
    // A driver clears the FIFO before it listens: nothing typed before is lost by that.
    write(2, 0x07)
    #expect(roomCalls.load(ordering: .relaxed) == 0)
    _ = read(5)
    #expect(roomCalls.load(ordering: .relaxed) == 1)
    #expect(receive("a") == 1)
    #expect(read(0) == 0x61)
  }

  @Test func divisorLatchHidesDataAndInterruptEnable() {
    write(3, 0x83)
    write(0, 0x01)
    write(1, 0x02)
    #expect(read(0) == 1 && read(1) == 2)
    write(3, 0x03)
    #expect(read(1) == 0)
    #expect(fixture.output.text == "")
  }

  @Test func identifiesAsA16550A() {
    write(2, 0x01)
    #expect(read(2) == 0xc1)
    write(2, 0x00)
    #expect(read(2) == 0x01)
    write(7, 0x5a)
    #expect(read(7) == 0x5a)
    write(1, 0xff)
    #expect(read(1) == 0x0f)
  }

  @Test func interruptsInOrderOfUrgency() {
    write(2, 0x01)
    write(1, 0x03)
    #expect(fixture.sink.isHigh(4))
    #expect(receive("x") == 1)
    #expect(read(2) & 0x0f == 0x04)
    #expect(read(0) == 0x78)
    #expect(read(2) & 0x0f == 0x02)
    // Reading the cause took the transmitter interrupt away; a byte brings it again.
    #expect(!fixture.sink.isHigh(4))
    #expect(read(2) & 0x0f == 0x01)
    write(0, 0x41)
    #expect(fixture.sink.isHigh(4))
  }

  @Test func belowTheTriggerTheTimeOutInterrupts() {
    write(2, 0x81)
    write(1, 0x01)
    #expect(receive("1234567") == 7)
    #expect(read(2) & 0x0f == 0x0c)
    #expect(receive("8") == 1)
    #expect(read(2) & 0x0f == 0x04)
    for _ in 0..<8 { _ = read(0) }
    #expect(!fixture.sink.isHigh(4))
    #expect(read(5) & 1 == 0)
  }

  @Test func aLongPasteArrivesWhole() {
    write(2, 0x01)
    let paste = (0..<10_000).map { UInt8(truncatingIfNeeded: $0 * 7) }
    let position = Mutex(0)
    @Sendable func feed() {
      let start = position.withLock { $0 }
      let taken = serial.receive(Array(paste[start...])) { feed() }
      position.withLock { $0 += taken }
    }
    feed()
    var received: [UInt8] = []
    while read(5) & 1 != 0 { received.append(UInt8(read(0))) }
    #expect(received == paste)
  }

  @Test func nothingIsLostBetweenThreads() throws {
    write(2, 0x01)
    let paste = (0..<20_000).map { UInt8(truncatingIfNeeded: $0 &* 31) }
    let serial = serial
    let thread = Thread {
      var position = 0
      while position < paste.count {
        let room = DispatchSemaphore(value: 0)
        let taken = serial.receive(Array(paste[position...].prefix(64))) { room.signal() }
        position += taken
        if taken < min(64, paste.count - position + taken) { room.wait() }
      }
    }
    thread.start()
    var received: [UInt8] = []
    while received.count < paste.count {
      if read(5) & 1 != 0 { received.append(UInt8(read(0))) } else { sched_yield() }
    }
    #expect(received == paste)
  }

  @Test func withoutFIFOOneByteWaits() {
    #expect(receive("ab") == 1)
    #expect(read(0) == 0x61)
  }

  @Test func loopback() {
    write(1, 0x08)
    write(4, 0x1a)
    // What Linux expects before it believes in a port.
    #expect(read(6) & 0xf0 == 0x90)
    #expect(receive("x") == 0)
    write(0, 0x55)
    #expect(read(5) & 1 == 1 && read(0) == 0x55)
    write(0, 1)
    write(0, 2)
    #expect(read(5) & 2 == 2)
    #expect(read(5) & 2 == 0)
    #expect(fixture.output.text == "")
    // DSR rises: a change that interrupts until it is read.
    write(4, 0x1b)
    #expect(read(2) & 0x0f == 0)
    #expect(read(6) == 0xb2)
    #expect(read(2) & 0x0f == 1)
  }

  @Test func aWideAccessIsSplitIntoBytes() {
    write(7, 0x99)
    #expect(fixture.input(0x3fe, size: 2) >> 8 == 0x99)
  }
}
