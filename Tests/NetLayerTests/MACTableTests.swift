import Testing

@testable import NetLayer

struct MACTableTests {
  private func station(_ number: UInt64) -> MACAddress { MACAddress(rawValue: 0x5254_0000_0000 + number) }

  @Test func aStationIsWhereItWasLastSeen() {
    var table = MACTable(capacity: 8, ageing: 100)
    #expect(table.learn(station(1), at: 3, now: 0) == .new)
    #expect(table.learn(station(1), at: 3, now: 50) == .known)
    #expect(table.port(of: station(1), now: 149) == 3)
    #expect(table.port(of: station(1), now: 150) == nil, "forgotten after its time")
    #expect(table.port(of: station(2), now: 0) == nil)
    #expect(table.learn(station(1), at: 4, now: 60) == .moved)
    #expect(table.port(of: station(1), now: 60) == 4)
    table.forget(port: 4)
    #expect(table.port(of: station(1), now: 60) == nil)
    #expect(table.count == 0)
  }

  @Test func aFullTableKeepsWhoIsThereUntilTheyAge() {
    let second: UInt64 = 1_000_000_000
    var table = MACTable(capacity: 100, ageing: 10 * second)
    for number in 0..<100 { #expect(table.learn(station(UInt64(number)), at: number, now: second) == .new) }
    #expect(table.learn(station(1000), at: 0, now: second) == .full)
    #expect(table.count == 100)
    #expect(table.learn(station(7), at: 200, now: second) == .moved, "who is known may move all the same")
    #expect(table.learn(station(8), at: 8, now: 9 * second) == .known)
    #expect(table.learn(station(1000), at: 0, now: 11 * second) == .new, "the others have aged")
    #expect(table.count == 2)
    #expect(table.port(of: station(8), now: 11 * second) == 8)
    #expect(table.port(of: station(7), now: 11 * second) == nil)
  }

  /// Random changes, against a dictionary.
  @Test func itIsADictionaryWithATime() {
    var table = MACTable(capacity: 64, ageing: 5000)
    var model: [UInt64: (port: Int, seen: UInt64)] = [:]
    var now: UInt64 = 0
    for step in 0..<200_000 {
      now += UInt64.random(in: 0...20)
      let number = UInt64.random(in: 0..<200)
      let port = Int.random(in: 0..<8)
      model = model.filter { now - $0.value.seen < 5000 }
      switch Int.random(in: 0..<100) {
      case 0:
        table.forget(port: port)
        model = model.filter { $0.value.port != port }
      case 1: table.forget(before: now)
      case 2..<40:
        let before = model[number]
        let learned = table.learn(station(number), at: port, now: now)
        if learned == .full {
          #expect(before == nil && table.count == 64, "step \(step)")
        } else {
          #expect(learned == (before == nil ? .new : before?.port == port ? .known : .moved), "step \(step)")
          model[number] = (port, now)
        }
      default: #expect(table.port(of: station(number), now: now) == model[number]?.port, "step \(step)")
      }
      #expect(table.count <= 64)
    }
  }

  @Test func addressesAreReadAndWritten() {
    #expect(MACAddress("52:54:00:ab:CD:01")?.rawValue == 0x5254_00ab_cd01)
    #expect(MACAddress("52-54-00-ab-cd-01").map { "\($0)" } == "52:54:00:ab:cd:01")
    for text in [
      "", "52:54:00:ab:cd", "52:54:00:ab:cd:1", "52:54:00:ab:cd:001", "52:54:00:ab:cd:+1", "52:54:00:ab:cd:xx",
      "52:54:00:ab:cd:01:02",
    ] {
      #expect(MACAddress(text) == nil, "\(text)")
    }
    #expect(MACAddress.broadcast.isMulticast)
    #expect(MACAddress("01:00:5e:00:00:01")?.isMulticast == true)
    #expect(MACAddress("fe:ff:ff:ff:ff:ff")?.isMulticast == false)
    let bytes: [UInt8] = [9, 0x52, 0x54, 0, 0xff, 0x80, 1, 9]
    #expect(bytes.withUnsafeBytes { MACAddress(at: $0.baseAddress! + 1) }.rawValue == 0x5254_00ff_8001)
  }

  @Test func anAnnouncementIsARARPRequestOfItsOwn() {
    let frame = Announcement.frame(for: MACAddress(rawValue: 0x5254_0012_3456))
    #expect(frame.count == 60)
    let station: [UInt8] = [0x52, 0x54, 0, 0x12, 0x34, 0x56]
    #expect(
      Array(frame[..<42])
        == [0xff, 0xff, 0xff, 0xff, 0xff, 0xff] + station + [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3] + station
        + [0, 0, 0, 0] + station + [0, 0, 0, 0])
  }
}
