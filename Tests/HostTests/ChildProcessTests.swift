import Glibc
import Host
import Testing

@Suite struct ChildProcessTests {
  @Test func outputComesWithTheTimeItCameAt() throws {
    let child = try ChildProcess.run(["sh", "-c", "echo first; sleep 0.2; echo second"], keepingOutput: true)
    #expect(child.status == 0)
    let first = try #require(child.nanoseconds(until: "first"))
    let second = try #require(child.nanoseconds(until: "second\n"))
    #expect(first < second && second <= child.wallNanoseconds)
    #expect(child.nanoseconds(until: "third") == nil)
  }

  @Test func aProgramThatIsNotThereIsNamed() {
    #expect(throws: HostError.path("run", path: "no-such-program", errno: ENOENT)) {
      try ChildProcess.run(["no-such-program"])
    }
  }
}
