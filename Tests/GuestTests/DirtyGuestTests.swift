import Foundation
import Testing

private let engines: [String] = {
  if VMM.hasKVM { return ["soft", "kvm"] }
  print("the guest dirty runs on the software engine only: no /dev/kvm")
  return ["soft"]
}()

/// The guest `dirty`, whose checks other tests rely on: it holds where nothing is wrong, and finds what is.
@Suite(.enabled(if: VMM.isBuilt, "needs the release build and scripts/build-guests"), .serialized)
struct DirtyGuestTests {
  private func run(_ engine: String, _ append: String, cpus: Int = 1) throws -> VMM {
    try VMM.run(
      "run", "dirty", "--engine", engine, "--cpus", "\(cpus)", "--memory", "128M", "--time-limit", "60", "--append",
      append)
  }

  @Test(arguments: engines, [1, 2])
  func pagesAndClocksAreRight(engine: String, cpus: Int) throws {
    let result = try run(
      engine, "set=4 rate=1000 pattern=random fill=4 readonly=2 free=2 reuse=100 seconds=1", cpus: cpus)
    #expect(result.status == 0, "\(result.output) \(result.errors)")
    #expect(result.output.contains("dirty: 1024 pages, 1024 filled, 512 read-only, 512 free"), "\(result.output)")
    #expect(result.output.contains("PASS pages "), "\(result.output)")
    #expect(result.output.contains("dirty: all passed"), "\(result.output)")
  }

  @Test(arguments: engines) func everyPatternWritesAsFastAsItCan(engine: String) throws {
    for pattern in ["linear", "hot", "random clock=pm"] {
      let result = try run(engine, "set=4 pattern=\(pattern) seconds=1")
      #expect(result.status == 0, "\(result.output) \(result.errors)")
      #expect(result.output.contains("dirty: all passed"), "\(result.output)")
    }
  }

  @Test(arguments: engines, ["set=4", "set=4 rate=1", "set=0 fill=4"])
  func aCorruptedPageIsFound(engine: String, options: String) throws {
    let result = try run(engine, options + " seconds=1 break=1", cpus: 2)
    #expect(result.status == 3, "\(result.output) \(result.errors)")
    #expect(result.output.contains("FAIL set page 0 at") || result.output.contains("FAIL fill page 0 at"))
    #expect(!result.output.contains("PASS"), "\(result.output)")
  }

  @Test func areasWithoutRoomAreRefused() throws {
    let result = try run("soft", "set=512")
    #expect(result.status == 3 && result.output.contains("give the machine more memory"), "\(result.output)")
  }
}
