import Accelerator
import GuestMemory
import LoaderHardening
import MemoryViews
import Testing

@Suite struct PolicyTests {
  private func parse(_ text: String) throws -> HardeningPolicy { try HardeningPolicy(parsing: Array(text.utf8)) }

  @Test func aPolicyNeedsNoMoreThanAVersion() throws {
    #expect(try parse(#"{"version": 1}"#) == HardeningPolicy())
    let policy = HardeningPolicy()
    #expect(policy.reaction == .generalProtection && policy.exclusive && policy.interrupts == .hold)
  }

  @Test func everyMemberIsRead() throws {
    let key = String(repeating: "0a", count: 32)
    let policy = try parse(
      """
      {"version": 1, "reaction": "log", "wx": false, "signatures": {"keys": ["\(key)"]},
       "interrupts": {"rule": "resume", "bound-ms": 7}, "pin": ["cr0.wp", "idtr"], "audit": "a.jsonl",
       "protect": [{"name": "text", "start": "0x1000", "size": 8192, "rights": "r-x"}]}
      """)
    #expect(policy.reaction == .log)
    #expect(!policy.exclusive)
    #expect(policy.requiresSignature)
    #expect(policy.keys == [[UInt8](repeating: 10, count: 32)])
    #expect(policy.interrupts == .resume)
    #expect(policy.interruptBound == 7)
    #expect(policy.pins == [.writeProtect, .idtr])
    #expect(policy.audit == "a.jsonl")
    #expect(policy.protections.map(\.name) == ["text"])
    #expect(policy.protections.map(\.range.description) == ["0x1000-0x2fff"])
    #expect(policy.protections.map(\.rights) == [[.read, .execute]])
  }

  @Test(arguments: [
    ("{", "not JSON"), ("[]", "the policy is not a JSON object"), ("{}", "version"),
    (#"{"version": 2}"#, "version is 2"),
    (#"{"version": 1, "wxx": true}"#, "no member wxx"), (#"{"version": 1, "reaction": "shout"}"#, "gp or stop or log"),
    (#"{"version": 1, "signatures": {}}"#, "has no keys"),
    (#"{"version": 1, "signatures": {"keys": ["12"]}}"#, "key 0"),
    (#"{"version": 1, "interrupts": {"bound-ms": 0}}"#, "1 to 10000"),
    (#"{"version": 1, "protect": [{"start": 1, "size": 4096, "rights": "r--"}]}"#, "range 0"),
    (#"{"version": 1, "protect": [{"start": 0, "size": 4096, "rights": "rx"}]}"#, "such as r-x"),
    (#"{"version": 1, "protect": [{"start": "0xfffffffffffff000", "size": 8192, "rights": "r--"}]}"#, "range 0"),
    (#"{"version": 1, "pin": ["cr3"]}"#, "cr4.smep"), (#"{"version": 1, "wx": 1}"#, "true or false"),
  ])
  func whatIsWrongIsSaid(_ text: String, _ message: String) {
    let error = #expect(throws: HardeningError.self) { try parse(text) }
    #expect(error?.description.contains(message) == true, "\(error?.description ?? "")")
  }
}
