import Glibc
import Host

/// How fast this host's KVM runs ring 0: natively, or emulated an instruction at a time.
///
/// Measured once and remembered until the host boots again, in the user's runtime directory.
struct RingZeroProbe {
  /// Million instructions a second.
  let speed: Double

  /// Far above what emulation reaches (1 or 2) and far below any processor.
  var isNative: Bool { speed >= 100 }

  /// What was remembered, else what is measured now.
  static func run() throws(Failure) -> RingZeroProbe {
    let boot = readText("/proc/sys/kernel/random/boot_id")?.split(separator: "\n").first.map(String.init)
    if let boot, let path, let known = remembered(path, boot) { return RingZeroProbe(speed: known) }
    let probe: RingZeroProbe
    do {
      // Two instructions a round.
      probe = RingZeroProbe(speed: 2000 / (try ExitLoop.measure(.nothing, rounds: 3000)))
    } catch {
      throw .accelerator(error)
    }
    if let boot, let path { remember("\(boot) \(Int(probe.speed.rounded()))\n", path) }
    return probe
  }

  /// nil where there is no directory that only this user writes to.
  private static var path: String? {
    if let folder = getenv("XDG_RUNTIME_DIR") { return String(cString: folder) + "/swiftvmm-ring0" }
    return geteuid() == 0 ? "/run/swiftvmm-ring0" : nil
  }

  private static func remembered(_ path: String, _ boot: String) -> Double? {
    let fields = readText(path)?.split(whereSeparator: \.isWhitespace)
    guard let fields, fields.count == 2, fields[0] == boot else { return nil }
    return Double(fields[1])
  }

  /// As a whole or not at all, since others may read it meanwhile. A probe that cannot be remembered is made again.
  private static func remember(_ text: String, _ path: String) {
    let draft = "\(path).\(getpid())"
    guard let file = fopen(draft, "wex") else { return }
    let isWritten = fputs(text, file) >= 0
    if fclose(file) != 0 || !isWritten || rename(draft, path) != 0 { unlink(draft) }
  }
}
