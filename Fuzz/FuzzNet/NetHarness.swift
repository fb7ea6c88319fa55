import Foundation
import Host

@testable import NetLayer

/// Three peers' bytes against the switch. Its sockets are ours: they take as little at a time as the input says.
enum NetHarness {
  /// What the switch sends to, with the peer's side of it.
  private final class Link: SwitchLink {
    let port: SwitchPort
    /// What the peer has sent.
    var reader = FrameReader(capacity: 0)
    private var sender = FrameSender()
    private var room = 0
    private var output = FrameReader(capacity: 0)
    /// Frames that have come to the peer.
    private(set) var received: UInt64 = 0

    init?(_ network: VirtualSwitch) {
      guard let port = network.makePort(nil) else { return nil }
      self.port = port
      port.link = self
    }

    func send(_ frame: UnsafeRawBufferPointer) {
      sender.send(frame)
      if sender.isFull { flush() }
    }

    func flush() { sender.flush(port.traffic, isOver: false, write) }

    func close() { port.link = nil }

    /// The socket has room for so many bytes more.
    func drain(_ count: Int) {
      room = count
      sender.drain(write)
    }

    /// Has all that was sent come to the peer: nothing is lost that the switch counts as sent.
    func check() {
      drain(.max)
      precondition(received == port.traffic.counters.sent, "\(received) of \(port.traffic.counters)")
    }

    private func write(_ vectors: UnsafeMutablePointer<iovec>, _ count: Int) -> Int {
      var written = 0
      for vector in UnsafeBufferPointer(start: vectors, count: count) {
        var rest = UnsafeRawBufferPointer(start: vector.iov_base, count: min(vector.iov_len, room))[...]
        room -= rest.count
        written += rest.count
        while !rest.isEmpty {
          let space = output.space
          let part = min(rest.count, space.count)
          space.copyBytes(from: rest.prefix(part))
          rest = rest.dropFirst(part)
          output.received(part)
          while output.next() != nil { received += 1 }
          precondition(!output.isMalformed && output.runts == 0, "the switch sends frames and nothing else")
        }
      }
      return written
    }
  }

  private static let loop: EventLoop? = try? EventLoop()

  /// The input is commands of two bytes: a peer and what it does, and how much; then the bytes that it sends.
  static func run(_ input: UnsafeBufferPointer<UInt8>) {
    guard let loop else { return }
    var configuration = VirtualSwitch.Configuration()
    configuration.stations = 4
    configuration.ports = 3
    let network = VirtualSwitch(on: loop, configuration)
    var links = (0..<3).compactMap { _ in Link(network) }
    precondition(links.count == 3 && Link(network) == nil, "ports are bounded")
    var rest = input[...]
    while rest.count >= 2 {
      let command = rest.removeFirst()
      let number = Int(command & 3) % 3
      let count = Int(rest.removeFirst()) * (Int(command >> 4) + 1)
      let link = links[number]
      switch command >> 2 & 3 {
      case 0, 1:
        let bytes = UnsafeBufferPointer(rebasing: rest.prefix(count))
        rest = rest.dropFirst(count)
        receive(UnsafeRawBufferPointer(bytes), at: link, network)
        // What StreamLink does, soon.
        if link.reader.isMalformed { links[number] = reconnect(link, network) }
      case 2: link.drain(count)
      default: links[number] = reconnect(link, network)
      }
    }
    for link in links { link.check() }
    let total = network.total
    precondition(total.stations <= 4)
    precondition(total.traffic.sent + total.traffic.dropped <= 2 * total.traffic.received)
    network.close()
  }

  private static func receive(_ bytes: UnsafeRawBufferPointer, at link: Link, _ network: VirtualSwitch) {
    var rest = bytes[...]
    while !rest.isEmpty, !link.reader.isMalformed {
      let space = link.reader.space
      precondition(!space.isEmpty, "there is room to read")
      let part = min(rest.count, space.count)
      space.copyBytes(from: rest.prefix(part))
      rest = rest.dropFirst(part)
      link.reader.received(part)
      while let frame = link.reader.next() { network.receive(UnsafeRawBufferPointer(frame), at: link.port) }
      network.flush()
    }
  }

  private static func reconnect(_ link: Link, _ network: VirtualSwitch) -> Link {
    link.check()
    network.remove(link.port)
    return Link(network)!
  }

  static func writeSeeds(to directory: String) throws {
    try FileManager.default.createDirectory(atPath: directory, withIntermediateDirectories: true)
    var number = 0
    func seed(_ commands: [[UInt8]]) throws {
      try Data(commands.flatMap { $0 }).write(to: URL(fileURLWithPath: "\(directory)/seed\(number)"))
      number += 1
    }
    func frame(_ source: UInt8, _ destination: UInt8, _ length: Int = 60) -> [UInt8] {
      let addresses: [UInt8] = [destination, 0, 0, 0, 0, destination, source, 0, 0, 0, 0, source]
      return [0, 0, UInt8(length >> 8), UInt8(length & 255)] + addresses
        + [UInt8](repeating: 8, count: length - addresses.count)
    }
    func send(_ peer: UInt8, _ bytes: [UInt8]) -> [UInt8] { [peer, UInt8(bytes.count)] + bytes }
    let room: [[UInt8]] = [[8, 100], [0xf9, 255], [10, 7]]
    try seed(room + [send(0, frame(2, 0xff)), send(1, frame(4, 2)), send(2, frame(6, 4))] + room)
    try seed([send(0, frame(2, 0xff) + frame(2, 4).prefix(9)), send(0, Array(frame(2, 4).dropFirst(9)))] + room)
    try seed(
      room + [send(0, frame(2, 4)), send(1, frame(2, 4)), [12, 0], send(0, frame(2, 4)), send(2, [0xff, 0, 0, 0])])
    let large = frame(2, 0xff, 3000)
    let pieces = stride(from: 0, to: large.count, by: 250).map {
      send(1, Array(large[$0..<min($0 + 250, large.count)]))
    }
    try seed(pieces + room + pieces)
    try seed([send(0, [0, 0, 0, 0, 0, 0, 0, 13] + [UInt8](repeating: 0, count: 13)), send(0, frame(2, 4))] + room)
  }
}
