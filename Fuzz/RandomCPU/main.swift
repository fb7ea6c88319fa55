import Glibc
import RandomCode

// RandomCPU [SEED [SECONDS]]: random code on the software CPU without libFuzzer, with or without a sanitizer. The seed of
// what runs is printed by whatever ends the process.
// RandomCPU --one SEED: the cases of one seed, to look into a finding.

CrashNote.install()
let run = try RandomRun()
let words = CommandLine.arguments.dropFirst()
if words.first == "--one", let seed = words.last.flatMap({ UInt64($0) }) {
  CrashNote.set(seed)
  try run.run(seed: seed)
  print(run.cases, "cases", run.instructions, "instructions", run.exits.sorted { $0.key < $1.key })
  exit(0)
}
let first = words.first.flatMap { UInt64($0) } ?? 1
let seconds = words.dropFirst().first.flatMap { Int($0) } ?? 60
print("seed \(first), \(seconds) s")
fflush(nil)
let start = time(nil)
var shown = start
var seed = first
while true {
  CrashNote.set(seed)
  do { try run.run(seed: seed) } catch {
    print("seed \(seed): \(error)")
    exit(1)
  }
  seed &+= 1
  let now = time(nil)
  guard now - shown >= 60 || now - start >= seconds else { continue }
  shown = now
  let elapsed = max(1, now - start)
  print(
    "\(elapsed) s, seeds \(first)-\(seed &- 1), \(run.cases) cases, \(run.cases / elapsed) cases/s,",
    "\(run.instructions) instructions;", run.exits.sorted { $0.key < $1.key }.map { "\($0.key) \($0.value)" })
  fflush(nil)
  if elapsed >= seconds { break }
}
