import Foundation
import Testing

private let linux = VMM.checkout + "/build/linux/"
private let isFetched: Bool = ["vmlinuz", "initramfs.gz"].allSatisfy { access(linux + $0, R_OK) == 0 }

/// Linux's own virtio-net driver, on the software engine.
@Suite(
  .enabled(if: isFetched, "needs scripts/fetch-linux"), .enabled(if: VMM.isBuilt, "needs the release build"),
  .serialized)
struct LinuxNetworkTests {
  private func arguments(_ commands: [String], cpus: Int = 1, net: String) -> [String] {
    [
      linux + "vmlinuz", "--initrd", linux + "initramfs.gz", "--engine", "soft", "--cpus", "\(cpus)", "--memory",
      "256M",
      "--time-limit", "300", "--net", net, "--append",
      "console=ttyS0 quiet virtio run=\"\(commands.joined(separator: "; "))\"",
    ]
  }

  private static func up(_ address: String) -> [String] {
    [
      "ip link set lo up", "ip addr add \(address)/24 dev eth0", "ip link set eth0 up",
      "echo mac:$(cat /sys/class/net/eth0/address) mtu:$(cat /sys/class/net/eth0/mtu)",
    ]
  }

  /// A TCP connection between two machines, one of which moves twice: every line that arrives is the next.
  @Test func aConnectionLivesOnWhileItsMachineMoves() throws {
    let folder = try TemporaryFolder()
    let network = try TestSwitch()
    let server = try RunningVMM(
      arguments(
        Self.up("10.0.0.1") + ["seq 1 1000000000 | nc -l -p 5000"],
        net: "switch=\(network.path),mac=52:54:00:00:00:01,mtu=1400"))
    let check = "awk '{ if ($1 != NR) { print -1; exit }; if (NR % 2000 == 0) { print NR; fflush() } }'"
    let guest = arguments(
      Self.up("10.0.0.2") + [
        "until ping -c 1 -w 1 10.0.0.1 > /tmp/ping; do :; done", "ping -c 5 -i 0.1 -s 1300 10.0.0.1",
        // Until there is a connection; one that ends is the end.
        "until [ -e /tmp/line ]; do nc 10.0.0.1 5000 | \(check) | while read n; do > /tmp/line; echo line:$n; done; done",
        "echo OVER",
      ], cpus: 2, net: "switch=\(network.path),mac=52:54:00:00:00:02,mtu=1400")
    var machine = try RunningVMM(guest)
    #expect(machine.waitFor("line:", count: 3), "\(machine.text) \(server.text)")
    #expect(server.text.contains("mac:52:54:00:00:00:01 mtu:1400"), "\(server.text)")
    #expect(machine.text.contains("mac:52:54:00:00:00:02 mtu:1400"), "\(machine.text)")
    #expect(machine.text.contains("5 packets transmitted, 5 packets received"), "\(machine.text)")
    for index in 0..<2 {
      let uri = "unix:\(folder.path)/move\(index)"
      let next = try RunningVMM(guest + ["--incoming", uri])
      let isPostCopy = index == 1 && PostCopyHost.hasFaults
      try machine.execute(
        "migrate-set-capabilities", ["capabilities": [["capability": "postcopy-ram", "state": isPostCopy]]])
      try machine.execute("migrate", ["uri": uri])
      if isPostCopy { try machine.execute("migrate-start-postcopy") }
      while let state = try machine.execute("query-migrate") as? [String: Any],
        let status = state["status"] as? String, status != "completed"
      {
        try #require(status != "failed", "\(state)")
        usleep(5000)
      }
      #expect(next.waitFor("line:", count: 3), "move \(index): \(next.text) \(server.text)")
      try machine.execute("quit")
      #expect(machine.waitUntilExit() == 0)
      machine = next
    }
    for machine in [server, machine] {
      for word in ["line:-1", "OVER", "BUG:", "Oops", "NETDEV WATCHDOG"] {
        #expect(!machine.text.contains(word), "\(machine.text.suffix(3000))")
      }
      try machine.execute("quit")
      #expect(machine.waitUntilExit() == 0)
    }
  }

  /// Why TAP interfaces in a network of their own are not to be had; nil where they are.
  private static let noTap: String? = {
    if geteuid() != 0 { return "needs root" }
    if access("/dev/net/tun", R_OK | W_OK) != 0 { return "needs /dev/net/tun" }
    let made = try? hostTool("unshare", "-n", "ip", "tuntap", "add", "dev", "swiftvmm0", "mode", "tap")
    return made?.status == 0 ? nil : "needs a network namespace with a TAP interface: \(made?.output ?? "")"
  }()

  /// The host and a guest on a TAP interface, whose kernel takes over checksums and segmentation.
  @Test func theHostTalksToTheGuest() throws {
    if let reason = Self.noTap {
      print("skipped: the host talks to the guest: \(reason)")
      return
    }
    let folder = try TemporaryFolder()
    let network = try TestSwitch()
    let guest = arguments(
      Self.up("10.9.0.2") + [
        "echo features:$(cat /sys/bus/virtio/devices/virtio0/features)", "nc -l -p 5000 | md5sum > /tmp/in",
        "echo in:$(cat /tmp/in)", "dd if=/dev/urandom of=/tmp/b bs=1k count=2048 2> /dev/null",
        "echo out:$(md5sum < /tmp/b)", "nc -l -p 5001 < /tmp/b", "echo over", "while :; do sleep 1; done",
      ], net: "tap=tap0,mac=52:54:00:00:00:09")
    func quoted(_ words: [String]) -> String {
      words.map { "'" + $0.replacingOccurrences(of: "'", with: "'\\''") + "'" }.joined(separator: " ")
    }
    let there = guest.map { $0.hasPrefix("tap=") ? "switch=\(network.path),mac=52:54:00:00:00:09" : $0 }
    let script = """
      set -e
      trap 'kill $vmm $next 2> /dev/null || true' EXIT
      cd \(folder.path)
      ip link set lo up
      ip tuntap add dev tap0 mode tap
      ip addr add 10.9.0.1/24 dev tap0
      ip link set tap0 up
      \(VMM.path) run \(quoted(guest)) --control unix:here > guest 2>&1 < /dev/null &
      vmm=$!
      alive() { kill -0 $vmm || { cat guest; exit 1; }; }
      until busybox ping -c 1 -w 1 10.9.0.2 > /dev/null; do alive; done
      busybox ping -c 5 -i 0.1 -s 1400 10.9.0.2
      dd if=/dev/urandom of=data bs=1M count=4 2> /dev/null
      until cat data 2> /dev/null > /dev/tcp/10.9.0.2/5000; do alive; sleep 0.1; done
      echo "in:$(md5sum < data)"
      until grep -q out: guest; do alive; sleep 0.1; done
      until sum=$(md5sum < /dev/tcp/10.9.0.2/5001); do alive; sleep 0.1; done 2> /dev/null
      echo "out:$sum"
      \(VMM.path) run \(quoted(there)) --incoming unix:move > there 2>&1 < /dev/null &
      next=$!
      until [ -S move ]; do kill -0 $next; sleep 0.1; done
      \(VMM.path) migrate here unix:move || echo "refused: $?"
      kill $next || true
      \(VMM.path) ctl here quit
      wait $vmm
      echo "guest: $?"
      cat guest
      """
    // Signals are blocked on the threads of a test, and ping lives by them.
    let unblock = "sigprocmask(SIG_SETMASK, POSIX::SigSet->new()); exec @ARGV"
    let result = try hostTool("perl", "-MPOSIX", "-e", unblock, "unshare", "-n", "bash", "-c", script)
    let text = result.output
    #expect(result.status == 0, "\(text)")
    #expect(text.contains("5 packets transmitted, 5 packets received"), "\(text)")
    // Checksums both ways, and segments of TCP over IPv4.
    let features = try #require(text.components(separatedBy: "features:").last)
    let bits = features.prefix(64).map { $0 == "1" }
    #expect(bits.count == 64 && bits[0] && bits[1] && bits[7] && bits[11], "\(features.prefix(64))")
    for way in ["in:", "out:"] {
      let sums = text.split(whereSeparator: \.isNewline).filter { $0.hasPrefix(way) }.map { $0.prefix(way.count + 32) }
      #expect(sums.count == 2 && Set(sums).count == 1, "\(sums) \(text)")
    }
    // The driver has accepted them, so that the machine can go on with the like only.
    #expect(text.contains("offloads of net0 checksum and TCP over IPv4"), "\(text)")
    #expect(text.contains("the destination none") && text.contains("refused: 74"), "\(text)")
    #expect(text.contains("guest: 0"), "\(text)")
  }
}
