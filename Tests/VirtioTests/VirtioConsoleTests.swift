import BlockLayer
import DeviceTesting
import Glibc
import GuestMemory
import Host
import PlatformDevices
import StateTree
import Synchronization
import Testing

@testable import Virtio

/// A console with two ports, and its driver.
private final class ConsoleBench {
  let fixture: Fixture
  let thread: IOThread
  let console: VirtioConsole
  let pci: VirtioPCI
  let driver: Driver
  let faults = Bench.Faults()
  /// What the device has told the host, on the device's thread.
  var input: [[UInt8]] = [[], []]
  var openings: [String] = []
  var children: [StateNode] = []

  init(_ way: Driver.Way) throws {
    fixture = try Fixture()
    thread = try IOThread()
    console = VirtioConsole(name: "ports", ports: ["org.one", "org.two"], memory: fixture.memory)
    pci = try VirtioPCI(
      console, host: fixture.pciHost(), line: fixture.line(17), interrupts: fixture.sink, memory: fixture.memory,
      loop: thread.loop, onFault: { [faults] in faults.add($0) })
    driver = Driver(pci, memory: fixture.memory, way: way)
    console.onInput = { [unowned self] port, bytes in input[port] += bytes }
    console.onOpen = { [unowned self] port, isOpen in openings.append("\(port) \(isOpen)") }
    try thread.start()
    try driver.start(size: 16, features: 1 << 1, block: false)
  }

  deinit {
    pci.drain()
    thread.stop()
  }

  /// What is wrong with a saved state; nil where it was put back.
  func restore(_ node: StateNode) -> StateError? {
    thread.perform { [self] in
      console.onRestore = { [unowned self] in children.append($0) }
      do throws(StateError) { try console.restore(node) } catch { return error }
      return nil
    }
  }

  func send(_ bytes: [UInt8], queue: Int) throws {
    let address = try driver.allocate(bytes.count)
    try driver.store(bytes, at: address)
    _ = try driver.queues[queue].add([.init(address: address, length: UInt32(bytes.count), isWritten: false)])
    driver.notify(queue)
    #expect(try driver.queues[queue].wait(1)?.count == 1)
  }

  func control(_ port: UInt8, _ event: UInt8, _ value: UInt8) throws {
    try send([port, 0, 0, 0, event, 0, value, 0], queue: 3)
  }

  /// Buffers for the device, and what it has written into them.
  func offer(_ count: Int, _ length: Int, queue: Int) throws -> [UInt64] {
    var places: [UInt64] = []
    for _ in 0..<count {
      let place = try driver.allocate(length)
      _ = try driver.queues[queue].add([.init(address: place, length: UInt32(length), isWritten: true)])
      places.append(place)
    }
    driver.notify(queue)
    return places
  }

  func open() throws {
    let places = try offer(8, 64, queue: 2)
    try control(0, 0, 1)
    let added = try #require(try driver.queues[2].wait(2))
    #expect(added.map(\.written) == [8, 8])
    #expect(try driver.bytes(places[0], 8) == [1, 0, 0, 0, 1, 0, 1, 0])
    #expect(try driver.bytes(places[1], 8) == [2, 0, 0, 0, 1, 0, 1, 0])
    try control(2, 3, 1)
    let named = try #require(try driver.queues[2].wait(2))
    #expect(named.map(\.written) == [15, 8])
    #expect(try driver.bytes(places[2], 15) == [2, 0, 0, 0, 7, 0, 1, 0] + Array("org.two".utf8))
    #expect(try driver.bytes(places[3], 8) == [2, 0, 0, 0, 6, 0, 1, 0])
    try control(2, 6, 1)
    #expect(thread.perform { self.openings } == ["1 true"])
  }
}

@Suite struct VirtioConsoleTests {
  @Test func theIdentityIsTheSpecifications() throws {
    let bench = try ConsoleBench(Driver.Way())
    #expect(bench.pci.function.readConfiguration(offset: 0, size: 4) == 0x1043_1af4)
    #expect(bench.driver.read(Driver.configuration, 4) == 0)
    // Port 0, which is not there, and two.
    #expect(bench.driver.read(Driver.configuration + 4, 4) == 3)
    #expect(bench.driver.queues.count == 8)
  }

  @Test(arguments: Driver.Way.all) func portsCarryBytesBothWays(_ way: Driver.Way) throws {
    let bench = try ConsoleBench(way)
    #expect(!bench.thread.perform { bench.console.send([1], to: 1) })
    try bench.open()
    try bench.send(Array("hello".utf8), queue: 7)
    #expect(bench.thread.perform { bench.input[1] } == Array("hello".utf8))
    // More than one buffer takes; the rest comes when there is another.
    let text = (0..<100).map { UInt8($0) }
    #expect(bench.thread.perform { bench.console.send(text, to: 1) })
    let places = try bench.offer(2, 60, queue: 6)
    #expect(try bench.driver.queues[6].wait(2)?.map(\.written) == [60, 40])
    #expect(try bench.driver.bytes(places[0], 60) + bench.driver.bytes(places[1], 40) == text)
    try bench.control(2, 6, 0)
    #expect(bench.thread.perform { bench.openings } == ["1 true", "1 false"])
    #expect(!bench.thread.perform { bench.console.send([1], to: 1) })
    #expect(bench.faults.all == [])
  }

  @Test func aGuestThatReadsNothingIsToldNoMore() throws {
    let bench = try ConsoleBench(Driver.Way())
    try bench.open()
    let block = [UInt8](repeating: 7, count: 64 << 10)
    let sent = bench.thread.perform { (0..<8).map { _ in bench.console.send(block, to: 1) } }
    #expect(sent == [true, true, true, true, false, false, false, false])
    // A driver that asks and never listens, with nonsense between.
    for event in 0..<UInt8(40) { try bench.control(event % 5, event % 9, event % 3) }
    for _ in 0..<300 { try bench.control(0, 0, 1) }
    try bench.send([1, 2, 3], queue: 3)
    try bench.send([9], queue: 1)
    #expect(bench.faults.all == [])
    // After a reset nothing is left of it.
    try bench.driver.start(size: 16, features: 1 << 1, block: false)
    bench.thread.perform { bench.openings = [] }
    try bench.open()
    #expect(bench.faults.all == [])
  }

  /// Open ports, and what is on its way to the guest, go with a saved device; a state of another shape is an error.
  @Test func openPortsAreSaved() throws {
    let bench = try ConsoleBench(Driver.Way())
    try bench.open()
    let saved = bench.thread.perform {
      bench.console.onSave = { StateNode("host", version: 7) }
      _ = bench.console.send([1, 2, 3], to: 1)
      return bench.console.save()
    }
    let node = try #require(saved)
    let other = try ConsoleBench(Driver.Way())
    #expect(other.restore(node) == nil)
    other.thread.perform {
      #expect(other.openings == ["1 true"])
      #expect(other.console.isOpen(1) && !other.console.isOpen(0))
      #expect(other.children == [StateNode("host", version: 7)])
      #expect(other.console.save()?.payload == node.payload)
    }
    // The bytes that waited come first.
    let places = try other.offer(1, 64, queue: 6)
    let used = try #require(try other.driver.queues[6].wait(1))
    #expect(used.map(\.written) == [3])
    #expect(try other.driver.bytes(places[0], 3) == [1, 2, 3])
    for cut in 0..<node.payload.count {
      let broken = StateNode(node.name, version: 1) { writer in for byte in node.payload[..<cut] { writer.write(byte) }
      }
      #expect(other.restore(broken) != nil, "\(cut) bytes")
    }
    let more = StateNode(node.name, version: 1) { $0.write(UInt32(3)) }
    #expect(other.restore(more) != nil)
  }
}
