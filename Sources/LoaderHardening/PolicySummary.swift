import Accelerator

extension HardeningPolicy {
  /// What the policy means, a line a matter.
  public var summary: [String] {
    let violations =
      switch reaction {
      case .generalProtection: "violations: #GP at the instruction"
      case .stop: "violations: the machine stops"
      case .log: "violations: let through, and written down"
      }
    var lines = [
      violations,
      exclusive
        ? "memory: no page is writable and executable after the lock" : "memory: pages may be writable and executable",
      requiresSignature
        ? "modules: signed with one of \(keys.count) \(keys.count == 1 ? "key" : "keys")"
        : "modules: unsigned ones are accepted",
      interrupts == .hold
        ? "interrupts: wait while the loader runs, \(interruptBound) ms at most"
        : "interrupts: taken in the kernel's view, and the loader goes on where it was",
    ]
    for protection in protections {
      lines.append("protected: \(protection.range) \(protection.rights), \(protection.name)")
    }
    let names = PinnedRegister.allCases.filter { pins.contains($0) }.map(\.rawValue)
    if !names.isEmpty { lines.append("pinned after the lock: \(names.joined(separator: ", "))") }
    if let audit { lines.append("audit: \(audit)") }
    return lines
  }
}
