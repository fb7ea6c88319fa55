import CSoftCPU
import Glibc
import Synchronization

/// The CPUs of one machine, as far as they must know of each other: whose decoded code a write makes stale, and who
/// must drop a translation before another goes on.
final class ProcessorGroup: Sendable {
  /// Which pages hold decoded code.
  let code = CodeMap()
  private let members = Mutex<[Processor]>([])

  func add(_ processor: Processor) {
    members.withLock { $0.append(processor) }
  }

  /// The CPU with a number.
  func processor(_ number: Int) -> Processor? {
    members.withLock { members in members.first { $0.number == number } }
  }

  func remove(_ number: Int) {
    members.withLock { $0.removeAll { $0.number == number } }
  }

  /// Makes every CPU forget its translations before it executes anything more; waits until those that execute have,
  /// except for the caller's own.
  func flush(from caller: Processor? = nil) {
    for member in others(of: caller) { member.request(UInt64(SOFT_REQUEST_FLUSH)) }
    for member in others(of: caller) { wait(for: member, as: caller) }
  }

  /// Called after writes that no CPU made.
  func memoryWritten(_ host: UInt, count: UInt) {
    guard count > 0 else { return }
    var page = host & ~0xfff
    while page <= host &+ (count - 1) {
      if let owners = code.owners(page) {
        let bits = soft_load(owners)
        if bits != 0 { codeChanged(page, owners: bits, by: nil) }
      }
      page &+= 0x1000
    }
  }

  /// Tells the CPUs in `owners` that bytes of a page have changed; they notice before their next block.
  func codeChanged(_ page: UInt, owners: UInt64, by caller: Processor?) {
    for member in others(of: caller) where owners & member.codeBit != 0 {
      member.staleCode.withLock { $0.append(page) }
      member.request(UInt64(SOFT_REQUEST_CODE))
    }
  }

  private func others(of caller: Processor?) -> [Processor] {
    members.withLock { members in members.filter { $0 !== caller } }
  }

  /// Waits until a CPU has answered a flush or does not execute. The caller answers requests meanwhile: the other may
  /// be waiting for it.
  private func wait(for member: Processor, as caller: Processor?) {
    while soft_load(soft_requests(member.cpu)) & UInt64(SOFT_REQUEST_FLUSH) != 0,
      soft_load(soft_inside(member.cpu)) != 0
    {
      caller?.answerRequests()
      sched_yield()
    }
  }
}

extension Processor {
  /// This CPU's bit in `CodeMap`. CPUs beyond the 64th share bits: they may hear of pages that are not theirs.
  var codeBit: UInt64 { 1 << UInt64(number & 63) }

  /// Asks something of this CPU, from any thread.
  func request(_ bits: UInt64) {
    _ = soft_or(soft_requests(cpu), bits)
    soft_set_attention(cpu, .min)
  }

  /// Does what others asked.
  func answerRequests() {
    guard soft_load(soft_requests(cpu)) != 0 else { return }
    let stale = staleCode.withLock { pages in
      defer { pages.removeAll() }
      return pages
    }
    for page in stale { forgetCode(page: page) }
    // The bits are cleared last: whoever waits for them relies on the flush.
    let bits = soft_load(soft_requests(cpu))
    if bits & UInt64(SOFT_REQUEST_FLUSH) != 0 {
      clearTLB()
      flushTLB()
    }
    _ = soft_and(soft_requests(cpu), ~bits)
    if staleCode.withLock({ !$0.isEmpty }) { request(UInt64(SOFT_REQUEST_CODE)) }
  }
}
