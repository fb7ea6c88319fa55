import Accelerator
import Boot
import DeviceModel
import Glibc
import GuestMemory
import Host
import KVMAccelerator
import StateTree
import Synchronization
import Testing

@testable import Machine

@Suite(.enabled(if: access("/dev/kvm", R_OK | W_OK) == 0, "no usable /dev/kvm on this host"))
struct MachineTests {
  /// mov al, n; out 0x80, al
  private func record(_ value: UInt8) -> [UInt8] { [0xb0, value, 0xe6, 0x80] }
  /// mov al, n; out 0xf4, al; jmp $
  private func ask(_ value: UInt8) -> [UInt8] { [0xb0, value, 0xe6, 0xf4, 0xeb, 0xfe] }

  @Test func endsWithTheValueOfTheDebugExitPort() throws {
    let small = try SmallMachine(record(7) + ask(0x21))
    try small.machine.start(paused: false)
    guard case .debugExit(0x21) = small.machine.waitUntilOver() else {
      Issue.record("another outcome")
      return
    }
    #expect(small.recorder.written.withLock { $0 } == [7])
    #expect(small.machine.counters[0][.portOut] == 2)
    #expect(small.machine.state == .shutdown)
  }

  @Test(arguments: InterruptControllerModel.allCases)
  func pausesAndResumesABusyGuest(_ controllers: InterruptControllerModel) throws {
    // inc ebx; jmp back
    let small = try SmallMachine([0x43, 0xeb, 0xfd], controllers: controllers)
    let machine = small.machine
    let events = Mutex<[String]>([])
    machine.addListener { event in events.withLock { $0.append("\(event)") } }
    try machine.start(paused: false)
    for _ in 0..<50 {
      machine.pause()
      #expect(machine.state == .paused)
      let before = try machine.vcpus[0].readRegisters().rbx
      #expect(try machine.vcpus[0].readRegisters().rbx == before)
      machine.resume()
      #expect(machine.state == .running)
    }
    machine.finish(.quit)
    guard case .quit = machine.waitUntilOver() else {
      Issue.record("another outcome")
      return
    }
    #expect(events.withLock { $0 }.filter { $0 == "stopped" }.count == 50)
  }

  @Test(arguments: InterruptControllerModel.allCases)
  func resetStartsTheGuestAgain(_ controllers: InterruptControllerModel) throws {
    // First pass: the flag at 0x2000 is clear: set it and ask for a reset. Second pass: exit with 0x42.
    let code: [UInt8] =
      [0x80, 0x3d, 0x00, 0x20, 0x00, 0x00, 0x00, 0x75, 0x0d] + [0xc6, 0x05, 0x00, 0x20, 0x00, 0x00, 0x01] + [
        0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe,
      ]
      + ask(0x42)
    let small = try SmallMachine(code, controllers: controllers)
    let resets = Atomic(0)
    small.machine.addListener { if case .reset(byGuest: true) = $0 { resets.add(1, ordering: .relaxed) } }
    try small.machine.start(paused: false)
    guard case .debugExit(0x42) = small.machine.waitUntilOver() else {
      Issue.record("another outcome")
      return
    }
    #expect(resets.load(ordering: .relaxed) == 1)
  }

  @Test func tripleFaultEndsWithAReadableReport() throws {
    // lidt with limit 0 would need memory; ud2 with the reset IDT in protected mode faults thrice.
    let small = try SmallMachine([0x0f, 0x01, 0x1d, 0x00, 0x20, 0x00, 0x00, 0x0f, 0x0b])
    try small.machine.start(paused: false)
    guard case .crashed(let report) = small.machine.waitUntilOver() else {
      Issue.record("another outcome")
      return
    }
    #expect(report.reason.name == "triple-fault")
    let text = report.lines.joined(separator: "\n")
    #expect(text.contains("triple fault on vCPU 0"))
    #expect(text.contains("RAX"))
    #expect(text.contains("page walk of RIP: paging is off"))
  }

  @Test(arguments: InterruptControllerModel.allCases)
  func stateSavedInOneMachineGoesOnInAnother(_ controllers: InterruptControllerModel) throws {
    // Counts in ebx and writes bl to port 0x80; at 100 it polls that port until it reads something other than 0;
    // at 255 it exits. Only the second machine answers, so the first is surely saved in the middle.
    let code: [UInt8] =
      [0x43, 0x88, 0xd8, 0xe6, 0x80, 0x80, 0xfb, 0x64, 0x75, 0x06, 0xe4, 0x80, 0x84, 0xc0, 0x74, 0xfa]
      + [0x80, 0xfb, 0xff, 0x75, 0xeb] + ask(0x11)
    let first = try SmallMachine(code, controllers: controllers)
    try first.machine.start(paused: false)
    _ = first.recorder.written.wait { $0.count >= 3 ? true : nil }
    first.machine.pause()
    let saved = try first.machine.save()
    let ram = try first.machine.memory.bytes(.init(0), count: 1 << 20)
    let soFar = first.recorder.written.withLock { $0 }
    first.machine.finish(.quit)
    _ = first.machine.waitUntilOver()

    let second = try SmallMachine(code, controllers: controllers)
    second.recorder.answer.store(1, ordering: .relaxed)
    try second.machine.start(paused: true)
    try second.machine.memory.write(ram, to: .init(0))
    try second.machine.restore(StateNode(decoding: saved.encoded()))
    second.machine.resume()
    guard case .debugExit(0x11) = second.machine.waitUntilOver() else {
      Issue.record("another outcome")
      return
    }
    let all = second.recorder.written.withLock { $0 }
    #expect(all.starts(with: soFar))
    #expect(all == (1...255).map { UInt64($0) })
  }

  /// In a process of its own: other tests open and close descriptors all the time.
  @Test func twoHundredMachinesLeaveNoDescriptorOpen() async {
    await #expect(processExitsWith: .success) {
      func runOnce(_ controllers: InterruptControllerModel = .split) throws {
        let machine = try SmallMachine([0xb0, 0x21, 0xe6, 0xf4, 0xeb, 0xfe], controllers: controllers).machine
        try machine.start(paused: false)
        _ = machine.waitUntilOver()
      }
      func openDescriptors() throws -> Int {
        let folder = try #require(opendir("/proc/self/fd"))
        defer { closedir(folder) }
        var count = 0
        while readdir(folder) != nil { count += 1 }
        return count
      }
      try runOnce()
      let before = try openDescriptors()
      for _ in 0..<100 { try runOnce() }
      for _ in 0..<90 { try runOnce(.userSpace) }
      for _ in 0..<10 { try runOnce(.inKernel) }
      #expect(try openDescriptors() == before)
    }
  }

  @Test func onlyMultibootImagesMeetTheTestDevice() throws {
    func devices(_ image: [UInt8]) throws -> [String] {
      var configuration = MachineConfiguration(serial: Silence())
      configuration.memory = 4 << 20
      configuration.image = try BootImage(path: "image", bytes: image)
      configuration.firmware = try BootROM.builtIn()
      return try MachineBuilder(configuration, on: KVMAccelerator()).build().devices.map(\.name)
    }
    var sector = [UInt8](repeating: 0xf4, count: 512)
    sector.replaceSubrange(510..., with: [0x55, 0xaa])
    #expect(try !devices(sector).contains("test-device"))
    // The header with its address fields (Multiboot 1, 3.1.1 to 3.1.3): loaded and entered at 1 MiB.
    let header: [UInt32] = [
      0x1bad_b002, 0x1_0000, 0 &- 0x1bad_b002 &- 0x1_0000, 0x10_0000, 0x10_0000, 0, 0, 0x10_0020,
    ]
    #expect(
      try devices(header.flatMap { word in withUnsafeBytes(of: word) { Array($0) } } + sector).contains("test-device"))
  }
}
