import Accelerator
import Glibc
import GuestMemory
import Host
import KVMAccelerator
import Testing

@Suite struct Resources {
  /// In a process of its own: other tests open descriptors at the same time.
  @Test func descriptorsAreClosed() async {
    await #expect(processExitsWith: .success) {
      for subject in AcceleratorUnderTest.catalogue {
        guard let accelerator = try? subject.open() else { continue }
        func cycle() throws {
          let memory = try GuestMemory([TestMachine.range(0, 1 << 20)])
          let machine = try accelerator.makeVirtualMachine(memory: memory, interrupts: subject.interrupts)
          let region = memory.regions[0]
          try machine.setMemorySlot(MemorySlot(number: 0, range: region.range, hostBase: region.hostBase))
          for index in 0..<2 { _ = try machine.makeVCPU(index: index, cpuid: accelerator.supportedCPUID()).readState() }
        }
        try? cycle()
        let before = Self.openDescriptors()
        for _ in 0..<50 { try cycle() }
        #expect(Self.openDescriptors() == before)
      }
    }
  }

  private static func openDescriptors() -> [Int32] {
    (0..<1024).filter { fcntl($0, F_GETFD) >= 0 }
  }

  @Test(arguments: AcceleratorUnderTest.catalogue)
  func memoryIsReleased(_ subject: AcceleratorUnderTest) throws {
    weak var memory: GuestMemory?
    var status = stat()
    do {
      let machine = try TestMachine(subject)
      memory = machine.memory
      #expect(fstat(machine.memory.file.rawValue, &status) == 0)
      try machine.runToEnd("long")
      #expect(try Self.mappedInodes().contains(UInt64(status.st_ino)))
    }
    #expect(memory == nil)
    #expect(try !Self.mappedInodes().contains(UInt64(status.st_ino)))
  }

  /// Inodes of the memory files that this process maps.
  private static func mappedInodes() throws -> Set<UInt64> {
    let file = try #require(fopen("/proc/self/maps", "r"))
    defer { fclose(file) }
    var line = [CChar](repeating: 0, count: 4096)
    var inodes: Set<UInt64> = []
    while fgets(&line, Int32(line.count), file) != nil {
      let text = String(decoding: line.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
      guard text.contains("/memfd:guest-ram") else { continue }
      if let inode = text.split(separator: " ").dropFirst(4).first.flatMap({ UInt64($0) }) { inodes.insert(inode) }
    }
    return inodes
  }

  @Test func missingAcceleratorsAreNamed() {
    let path = "/dev/no-such-accelerator"
    let error = AcceleratorError.missing(engine: "kvm", path: path, reason: "No such file or directory")
    #expect(throws: error) { _ = try KVMAccelerator(path: path) }
    #expect("\(error)".hasPrefix("engine kvm: cannot open \(path): No such file or directory; "))
    #expect(throws: AcceleratorError.self) { _ = try KVMAccelerator(path: "/dev/null") }
  }

  /// In a process of its own, which gives root's rights away.
  @Test func missingPermissionIsNamed() async {
    await #expect(processExitsWith: .success) {
      let name = "/tmp/swiftvmm-permission-\(getpid())"
      let file = open(name, O_CREAT | O_EXCL | O_RDWR, 0)
      #expect(file >= 0)
      defer { unlink(name) }
      let user = geteuid()
      if user == 0 { #expect(seteuid(65534) == 0) }
      defer { _ = seteuid(user) }
      let error = AcceleratorError.noPermission(path: name)
      #expect(throws: error) { _ = try KVMAccelerator(path: name) }
      #expect("\(error)".hasPrefix("engine kvm: no permission to open \(name): join the group that owns it"))
    }
  }
}
