import Accelerator
import ArgumentParser
import Boot
import Glibc
import GuestMemory
import Host
import Machine

/// QEMU's words for where the interrupt controllers live.
enum KernelIRQChip: String, ExpressibleByArgument, CaseIterable {
  case on, split, off

  var model: InterruptControllerModel {
    switch self {
    case .on: .inKernel
    case .split: .split
    case .off: .userSpace
    }
  }
}

extension CPUModel: ExpressibleByArgument {}

/// An option that is on or off.
enum Switch: String, ExpressibleByArgument, CaseIterable {
  case on, off
}

struct RunCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "run",
    abstract: "Run a guest.",
    discussion: """
      GUEST is a bundled sample (see 'swiftvmm guests') or a file: a Linux bzImage, an ELF kernel (PVH, Multiboot or \
      plain ELF64), a Multiboot image, a boot sector, or with --load-address a flat binary.

      Example: swiftvmm run hello --cpus 2 --memory 256M
      """)

  @Argument(help: "A bundled guest's name, or a file.")
  var guest: String?

  @OptionGroup var engine: EngineOption

  @Option(help: "Guest memory, with a suffix K, M or G.")
  var memory = "256M"

  @Option(help: "Number of vCPUs.")
  var cpus = 1

  @Option(
    help: "Processor that the guest is shown: what the engine has (host), or one that every engine has (common).")
  var cpu = CPUModel.host

  @Option(
    name: .customLong("kernel-irqchip"),
    help: "Interrupt controllers: on (the engine's), split (its local APICs), off (ours); split where it can.")
  var kernelIRQChip: KernelIRQChip?

  @Option(
    name: .customLong("smp-threads"),
    help: "vCPUs of the software engine: a thread each (on, the faster), or in turns on one (off).")
  var smpThreads: Switch?

  @Flag(
    help: "Virtual time from the instruction count: a run that repeats itself exactly; engine soft, vCPUs in turns.")
  var deterministic = false

  @Option(help: "Kernel command line.")
  var append = ""

  @Option(help: "Initial RAM disk.")
  var initrd: String?

  @Option(help: "Multiboot or PVH module, with an optional command line after a comma; repeatable.")
  var module: [String] = []

  @Option(
    help: ArgumentHelp(
      "Disk: FILE[,id=][,format=raw|qcow2][,readonly=on][,cache=writeback|none|unsafe][,rerror=][,werror=report|stop|enospc]; repeatable.",
      valueName: "disk"))
  var disk: [DiskOption] = []

  @Option(
    help: ArgumentHelp(
      "Network card: tap=NAME or switch=SOCKET, with [,mac=][,mtu=][,id=][,offloads=on|off]; or none; repeatable.",
      valueName: "network"))
  var net: [NetworkOption] = []

  @Option(help: "ROM image that ends at 4 GiB, instead of the built-in one.")
  var firmware: String?

  @Option(name: .customLong("load-address"), help: "Where a flat binary is loaded and entered.")
  var loadAddress: String?

  @Option(help: "Harden the guest's code loading by a policy: a JSON file, or default.")
  var harden: String?

  @Option(help: "With --harden: where the audit goes, as JSON lines.")
  var audit: String?

  @Option(help: "COM1: stdio, none, file:PATH or unix:PATH.")
  var serial = "stdio"

  @Option(help: "Control socket (QMP): unix:PATH.")
  var control: String?

  @Flag(help: "Give the guest a port for its agent, which the control socket's commands ask; needs --control.")
  var agent = false

  @Option(help: "What the guest may do with its disks' snapshots by way of its agent: off, read-only, copy-on-write.")
  var recovery = RecoveryPolicy.readOnly

  @Option(
    name: .customLong("recovery-quota"),
    help: "With --recovery copy-on-write: how much the guest may write to attached snapshots together.")
  var recoveryQuota = "1G"

  @Option(name: .customLong("recovery-audit"), help: "Where the guest's requests for snapshots go, as JSON lines.")
  var recoveryAudit: String?

  @Option(
    name: .customLong("snapshot-every"),
    help: "Make a live snapshot of all disks at this interval: a number with s, m, h or d, such as 10m.")
  var snapshotEvery: String?

  @Option(help: "With --snapshot-every: how many of its snapshots stay, 1 to 256; 24 unless told.")
  var keep: Int?

  @Option(help: "Debugger: HOST:PORT or unix:PATH.")
  var gdb: String?

  @Option(help: "Go on with a machine that 'swiftvmm save' wrote, with the same GUEST, options and disks.")
  var restore: String?

  @Option(
    help: "Wait for a machine that 'swiftvmm migrate' sends: unix:PATH or tcp:HOST:PORT; same GUEST and options.")
  var incoming: String?

  @Option(
    name: .customLong("incoming-disks"),
    help:
      "With --incoming: where 'swiftvmm migrate --copy-disks' brings the disks' contents: unix:PATH or tcp:HOST:PORT.")
  var incomingDisks: String?

  @Option(
    name: .customLong("tls-creds"),
    help: ArgumentHelp(
      "With --incoming: take machine and disks by TLS alone: DIR[,verify-peer=on|off], a folder with ca-cert.pem, server-cert.pem and server-key.pem.",
      valueName: "dir"))
  var tlsCreds: TLSOption?

  @Flag(help: "With --restore: compare all of the saved memory with its checksums first.")
  var verify = false

  @Flag(help: "Start with the vCPUs stopped.")
  var paused = false

  @Option(name: .customLong("time-limit"), help: "Stop with status 124 after this many seconds.")
  var timeLimit: Double?

  @Option(help: "Write a JSON report at the end, to a file or - for standard output.")
  var report: String?

  @Option(
    help:
      "Trace as JSON lines: WHAT:FILE with exits, instructions, exceptions or interrupts; all but exits need engine soft; repeatable."
  )
  var trace: [String] = []

  func validate() throws {
    if guest == nil && firmware == nil {
      throw ValidationError("name a GUEST, or give --firmware")
    }
    if incoming != nil, restore != nil { throw ValidationError("--incoming and --restore exclude each other") }
    if incomingDisks != nil, incoming == nil { throw ValidationError("--incoming-disks needs --incoming URI") }
    if tlsCreds != nil, incoming == nil { throw ValidationError("--tls-creds needs --incoming URI") }
    if agent, control == nil { throw ValidationError("--agent needs --control SOCKET") }
    if recoveryAudit != nil, !agent { throw ValidationError("--recovery-audit needs --agent") }
    if keep != nil, snapshotEvery == nil { throw ValidationError("--keep needs --snapshot-every INTERVAL") }
    if snapshotEvery != nil, disk.isEmpty { throw ValidationError("--snapshot-every needs a --disk") }
    if audit != nil, harden == nil { throw ValidationError("--audit needs --harden POLICY") }
    if verify, restore == nil { throw ValidationError("--verify needs --restore FILE") }
    if let timeLimit, !(timeLimit > 0 && timeLimit < 1e9) {
      throw ValidationError("--time-limit \(timeLimit): expected seconds greater than 0")
    }
  }

  func run() throws {
    let session = try RunSession(self)
    Glibc.exit(try session.run())
  }
}
