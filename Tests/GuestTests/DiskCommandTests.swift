import Foundation
import Testing

/// `swiftvmm disk`, from outside, beside qemu-img.
@Suite(
  .enabled(
    if: access(VMM.path, X_OK) == 0 && access("/usr/bin/qemu-img", X_OK) == 0,
    "needs the release build, and qemu-utils"))
struct DiskCommandTests {
  /// A document without what is not an image's property.
  private func comparable(_ text: String) throws -> NSObject {
    func strip(_ value: Any) -> Any {
      if let list = value as? [Any] { return list.map(strip) }
      guard let object = value as? [String: Any] else { return value }
      return object.filter { !["icount", "actual-size"].contains($0.key) }.mapValues(strip)
    }
    let value = strip(try JSONSerialization.jsonObject(with: Data(text.utf8)))
    return try #require(value as? NSObject)
  }

  /// Chains by us, written by qemu-io, and what each side says about them.
  @Test(arguments: zip([512, 65536, 65536, 2 << 20], [3, 1, 64, 6]))
  func weSayWhatQemuSays(clusterSize: Int, depth: Int) throws {
    let folder = try TemporaryFolder()
    for layer in 0..<depth {
      let backing = layer > 0 ? ["-b", "l\(layer - 1)", "-F", "qcow2"] : []
      let made = try VMM.run(
        ["disk", "create", "-q", "-f", "qcow2", "-o", "cluster_size=\(clusterSize)"] + backing
          + ["\(folder.path)/l\(layer)"] + (layer > 0 ? [] : ["8M"]))
      #expect(made.status == 0, "\(made.errors)")
      let written = try hostTool([
        "qemu-io", "-f", "qcow2", "-c", "write -P \(layer + 1) \(layer * 64)k 128k", "-c",
        "write -z \(layer * 64 + 960)k 64k", "\(folder.path)/l\(layer)",
      ])
      #expect(written.status == 0, "\(written.output)")
    }
    let top = "\(folder.path)/l\(depth - 1)"
    #expect(try VMM.run("disk", "snapshot", "-c", "one", top).status == 0)
    #expect(try hostTool(["qemu-img", "bitmap", "--add", top, "bits"]).status == 0)
    // Where clusters are written in part, QEMU tells of the file's holes within them.
    let questions = [["info", "--backing-chain"], ["check"]] + (clusterSize <= 65536 ? [["map"]] : [])
    for question in questions {
      let ours = try VMM.run(["disk"] + question + ["--json", top])
      let theirs = try hostTool(["qemu-img"] + question + ["--output", "json", top])
      #expect(ours.status == 0, "\(ours.errors)")
      #expect(try comparable(ours.output) == comparable(theirs.output), "\(question) \(ours.output) \(theirs.output)")
    }
    for options in [["-O", "raw"], ["-O", "qcow2"], ["-O", "qcow2", "-c", "-o", "compression_type=zstd"]] {
      let copy = "\(folder.path)/copy"
      let made = try VMM.run(["disk", "convert"] + options + [top, copy])
      #expect(made.status == 0, "\(made.errors)")
      let compare = try hostTool(["qemu-img", "compare", top, copy])
      #expect(compare.status == 0, "\(compare.output)")
      #expect(try VMM.run("disk", "compare", "-q", top, copy).status == 0)
    }
  }

  @Test func statusesAreThoseOfTheManual() throws {
    let folder = try TemporaryFolder()
    let path = folder.path + "/disk"
    #expect(try VMM.run("disk", "create", "-f", "qcow2", path).status == 64)
    #expect(try VMM.run("disk", "create", "-f", "qcow2", "-o", "cluster_size=5000", path, "1M").status == 64)
    #expect(try VMM.run("disk", "info", folder.path + "/none").status == 66)
    #expect(try VMM.run("disk", "create", "-f", "qcow2", path, "4M").status == 0)
    #expect(try hostTool(["qemu-io", "-c", "write -P 1 0 1M", path]).status == 0)
    #expect(try VMM.run("disk", "resize", path, "1M").status == 64)
    #expect(try VMM.run("disk", "resize", "--shrink", path, "-1M").status == 0)
    #expect(try VMM.run("disk", "resize", path, "+2M").status == 0)
    #expect(try hostTool(["qemu-img", "info", path]).output.contains("(5242880 bytes)"))
    #expect(try VMM.run("disk", "commit", path).status == 66)
    #expect(try VMM.run("disk", "convert", "-O", "raw", path, folder.path + "/raw").status == 0)
    #expect(try VMM.run("disk", "check", folder.path + "/raw").status == 63)
    #expect(try hostTool(["qemu-io", "-f", "raw", "-c", "write -P 2 100k 1k", folder.path + "/raw"]).status == 0)
    let compared = try VMM.run("disk", "compare", path, folder.path + "/raw")
    #expect(compared.status == 1 && compared.output == "Content mismatch at offset 102400!\n")
    #expect(try VMM.run("disk", "create", "-q", folder.path + "/missing/raw", "1M").status == 74)
    // A refcount that is too high is a leak, which -r leaks repairs.
    let file = try FileHandle(forUpdating: URL(fileURLWithPath: path))
    try file.seek(toOffset: 2 * 65536 + 100)
    try file.write(contentsOf: Data([0, 1]))
    try file.close()
    #expect(try VMM.run("disk", "check", "-q", path).status == 3)
    #expect(try VMM.run("disk", "check", "-q", "-r", "leaks", path).status == 0)
    #expect(try hostTool(["qemu-img", "check", path]).status == 0)
    try Data([0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 9]).write(to: URL(fileURLWithPath: path))
    let malformed = try VMM.run("disk", "info", path)
    #expect(malformed.status == 66 && malformed.errors.split(separator: "\n").count == 1, "\(malformed.errors)")
  }
}
