import Foundation
import Testing

private let folder = VMM.checkout + "/build/linux"
private let isFetched: Bool = ["vmlinuz", "vmlinux", "initramfs.gz", "modules/virtio_blk.ko"].allSatisfy {
  access(folder + "/" + $0, R_OK) == 0
}

/// Debian's kernel, whose text and read-only data are protected from outside once it has booted: what it does anyway goes on,
/// and a module that patches the text is caught. Without protection the same module succeeds. docs/hardening.md.
@Suite(
  .enabled(if: isFetched, "needs scripts/fetch-linux"),
  .enabled(if: VMM.isBuilt, "needs the release build and scripts/build-guests"), .serialized)
struct LinuxHardeningTests {
  /// The sections of an ELF64 file.
  private struct Sections {
    var bytes: [UInt8]

    init(path: String) throws { bytes = [UInt8](try Data(contentsOf: URL(fileURLWithPath: path))) }

    func word<T: FixedWidthInteger>(_ offset: Int, as type: T.Type = T.self) -> T {
      bytes.withUnsafeBytes { T(littleEndian: $0.loadUnaligned(fromByteOffset: offset, as: T.self)) }
    }

    /// A section's address, place in the file and size.
    func section(_ wanted: String) throws -> (address: UInt64, offset: Int, size: Int) {
      let table = Int(word(40, as: UInt64.self))
      let names = table + Int(word(62, as: UInt16.self)) * 64
      let strings = Int(word(names + 24, as: UInt64.self))
      for index in 0..<Int(word(60, as: UInt16.self)) {
        let header = table + index * 64
        let start = strings + Int(word(header, as: UInt32.self))
        guard String(decoding: bytes[start...].prefix { $0 != 0 }, as: UTF8.self) == wanted else { continue }
        return (
          word(header + 16), Int(word(header + 24, as: UInt64.self)), Int(word(header + 32, as: UInt64.self))
        )
      }
      throw CocoaError(.fileReadCorruptFile)
    }
  }

  /// virtio_blk with an initialisation that writes a byte behind the kernel's last function, and fails: with EIO where it has
  /// written, else with EINVAL.
  private static func patchingModule(target: UInt64) throws -> [UInt8] {
    var module = try Sections(path: folder + "/modules/virtio_blk.ko")
    let code = try module.section(".init.text").offset
    // After the call that ftrace knows, and `push rbx`; it ends where the function returns EBX.
    let (first, end) = (6, 0x73)
    var patch: [UInt8] = [
      0x0f, 0x20, 0xc0,  // mov rax, cr0
      0x48, 0x89, 0xc2,  // mov rdx, rax
      0x48, 0x25, 0xff, 0xff, 0xfe, 0xff,  // and rax, ~CR0.WP
      0x0f, 0x22, 0xc0,  // mov cr0, rax
      0x48, 0xb9,  // mov rcx, target
    ]
    patch += (0..<8).map { UInt8(truncatingIfNeeded: target >> UInt64($0 * 8)) }
    patch += [
      0xc6, 0x01, 0x5a,  // mov byte [rcx], 0x5a
      0x0f, 0x22, 0xc2,  // mov cr0, rdx
      0xbb, 0xea, 0xff, 0xff, 0xff,  // mov ebx, -EINVAL
      0x80, 0x39, 0x5a,  // cmp byte [rcx], 0x5a
      0x75, 0x05,  // jne +5
      0xbb, 0xfb, 0xff, 0xff, 0xff,  // mov ebx, -EIO
      0xe9,  // jmp end
    ]
    let jump = end - (first + patch.count + 4)
    patch += (0..<4).map { UInt8(truncatingIfNeeded: jump >> ($0 * 8)) }
    module.bytes.replaceSubrange(code + first..<code + first + patch.count, with: patch)
    let relocations = try module.section(".rela.init.text")
    for entry in stride(from: relocations.offset, to: relocations.offset + relocations.size, by: 24)
    where (first..<end).contains(Int(module.word(entry, as: UInt64.self))) {
      // R_X86_64_NONE
      for byte in 8..<24 { module.bytes[entry + byte] = 0 }
    }
    // The distribution's signature, which is no longer the module's: none is better than a wrong one.
    let marker = Array("~Module signature appended~\n".utf8)
    if module.bytes.suffix(marker.count).elementsEqual(marker) {
      let end = module.bytes.count - marker.count
      let size = module.bytes[end - 4..<end].reduce(0) { $0 << 8 | Int($1) }
      module.bytes.removeLast(marker.count + 12 + size)
    }
    return module.bytes
  }

  /// A shell in the guest.
  private final class Shell {
    private let process = Process()
    private let input = Pipe()
    private let output = Pipe()
    private(set) var text = ""

    init(_ arguments: [String]) throws {
      process.executableURL = URL(fileURLWithPath: VMM.path)
      process.arguments = arguments
      process.standardInput = input
      process.standardOutput = output
      process.standardError = FileHandle.nullDevice
      try process.run()
    }

    /// Reads until `wanted` comes; false where the machine ends first.
    func wait(for wanted: String) -> Bool {
      let seen = text.count
      while !text.dropFirst(seen).contains(wanted) {
        let data = output.fileHandleForReading.availableData
        if data.isEmpty { return false }
        text += String(decoding: data, as: UTF8.self)
      }
      return true
    }

    func type(_ line: String) { input.fileHandleForWriting.write(Data((line + "\n").utf8)) }

    func end() -> Int32 {
      while wait(for: "\u{0}") {}
      process.waitUntilExit()
      return process.terminationStatus
    }
  }

  @Test(arguments: [false, true])
  func aModuleThatPatchesTheKernelIsCaught(_ isProtected: Bool) throws {
    let work = try TemporaryFolder()
    let kernel = try Sections(path: folder + "/vmlinux")
    let text = try kernel.section(".text")
    let data = try kernel.section(".rodata")
    func pages(_ size: Int) -> UInt64 { (UInt64(size) + 0xfff) & ~0xfff }
    // Linked there, and with nokaslr loaded at 16 MiB.
    func physical(_ address: UInt64) -> UInt64 { address &- 0xffff_ffff_8000_0000 }
    let target = text.address + pages(text.size) - 16
    _ = try work.file("patch.ko", Self.patchingModule(target: target))
    let packed = try hostTool(
      "sh", "-c",
      "cd \(work.path) && echo patch.ko | cpio -o -H newc 2>/dev/null | gzip > extra.gz && cat \(folder)/initramfs.gz extra.gz > initrd.gz"
    )
    try #require(packed.status == 0, "needs cpio: \(packed.output)")
    let policy = try work.file("policy.json", Array(#"{"version": 1}"#.utf8))
    let (socket, audit) = (work.path + "/ctl", work.path + "/audit")
    let shell = try Shell([
      "run", folder + "/vmlinuz", "--initrd", work.path + "/initrd.gz", "--engine", "soft", "--time-limit", "300",
      "--append", "console=ttyS0 quiet nokaslr shell", "--control", "unix:" + socket, "--harden", policy, "--audit",
      audit,
    ])
    try #require(shell.wait(for: "# "), "\(shell.text.suffix(2000))")
    if isProtected {
      // The kernel's read-only data holds the vDSO, which programs execute.
      for (name, section) in [("text", text), ("rodata", data)] {
        let range = "\"start\": \(physical(section.address)), \"size\": \(pages(section.size))"
        let result = try VMM.run(
          "ctl", socket, "x-swiftvmm-protect", "{\"name\": \"\(name)\", \(range), \"rights\": \"r-x\"}")
        #expect(result.status == 0, "\(result.errors)")
      }
      let views = try VMM.run("ctl", socket, "x-swiftvmm-query-views")
      #expect(views.output.contains("\"r-x\""), "\(views.output) \(views.errors)")
    }
    func denied() throws -> [String] {
      try String(contentsOfFile: audit, encoding: .utf8).split(separator: "\n").map(String.init)
        .filter { $0.contains("denied") }
    }
    shell.type("i=0; while [ $i -lt 100 ]; do i=$((i+1)); echo $i | md5sum > /dev/null; done; echo LOOP$((40+2))")
    #expect(shell.wait(for: "LOOP42"))
    shell.type(
      "insmod /modules/virtio_ring.ko; insmod /modules/virtio.ko; insmod /modules/failover.ko; lsmod | wc -l; echo LOADED$((40+2))"
    )
    #expect(shell.wait(for: "LOADED42"))
    #expect(try denied().isEmpty, "what the kernel does anyway")
    shell.type("insmod /patch.ko; echo STATUS$((100+$?))")
    // 5 for the error of a module that its own code refuses; killed by the kernel's fault: 128 and more.
    #expect(shell.wait(for: isProtected ? "STATUS2" : "STATUS105"), "\(shell.text.suffix(3000))")
    shell.type("cat /proc/modules | md5sum; echo ALIVE$((40+2)); exit")
    #expect(shell.wait(for: "ALIVE42"))
    #expect(shell.end() == 0)
    if isProtected {
      #expect(!shell.text.contains("Input/output error"), "\(shell.text.suffix(3000))")
      #expect(shell.text.contains("general protection fault"), "\(shell.text.suffix(3000))")
      let lines = try denied()
      #expect(lines.count == 1)
      #expect(lines.first?.contains("access to protected range text") == true, "\(lines)")
      #expect(lines.first?.contains("\"0x\(String(physical(target), radix: 16))\"") == true, "\(lines)")
    } else {
      #expect(shell.text.contains("can't insert '/patch.ko': Input/output error"), "\(shell.text.suffix(3000))")
      #expect(try denied().isEmpty)
    }
  }
}
