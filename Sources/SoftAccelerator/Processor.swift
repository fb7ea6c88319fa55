import Accelerator
import CSoftCPU
import GuestMemory
import MemoryViews
import Synchronization
import X86

/// One x86-64 CPU in software: its state, and what executes instructions on it.
///
/// Everything here belongs to the thread that runs it, but for what is atomic or behind a lock. The state that instructions touch is a C struct (`soft_cpu`),
/// so that emitted code can touch it too; what Swift alone needs is in this class's own fields.
final class Processor: @unchecked Sendable {
  /// The architectural state.
  let cpu: UnsafeMutablePointer<soft_cpu>
  /// `cpu.general`: sixteen registers and one that is always 0.
  let general: UnsafeMutablePointer<UInt64>
  /// `cpu.segment`, indexed as encodings number them; then flat, LDTR and TR.
  let segments: UnsafeMutablePointer<soft_segment>
  /// Its number, and its APIC id after reset.
  let number: Int
  /// The CPUs of its machine.
  let group: ProcessorGroup
  /// What physical addresses mean.
  let memory: PhysicalMemory
  /// What the CPU shows and can do.
  let features: ProcessorFeatures

  /// Where the next instruction is: set before an instruction is executed, changed by branches.
  var nextIP: UInt64 = 0
  /// CR2 of the #PF that was thrown last.
  var faultAddress: UInt64 = 0
  /// What the VMM is asked for when `Interruption.exit` is thrown.
  var pendingExit = PendingExit.none
  /// The device accesses that the instruction under way has already made; it starts again after each.
  var replay = DeviceReplay()
  /// The contexts of address spaces that the TLB holds translations for.
  var contexts = TranslationContexts()
  /// The context of the program's data accesses, even where `cpu.data_context` sends them the slow way.
  var plainContext: UInt64 = 0
  /// The context of the code that runs, and the base and limit of CS that it was made for (0 in 64-bit mode).
  var codeContext: UInt64 = 0
  var codePlace: (UInt64, UInt64) = (0, 0)
  /// The view that the CPU's accesses, fetches and page walks obey; nil: all of memory with all rights.
  var view: MemoryView?
  /// Registers that the guest may not change.
  var pins: Set<PinnedRegister> = []
  /// The page table that the last walk ended in.
  var lastTable = PageTableCache()
  /// Whether some translation in the TLB is a fragment of a large page: INVLPG must then find all of them.
  var holdsLargePages = false
  /// The local APIC, where it is in the VMM.
  var localAPIC: (any LocalInterruptController)?
  /// A #DB to be delivered after the instruction: bits of DR6.
  var pendingDebug: UInt64 = 0
  /// An exception that a state had on its way: nothing comes before its handler.
  var pendingException: Interruption?
  /// Breakpoint registers watch accesses to data, to ports, and the execution of instructions: `updateDebug` derives
  /// them from DR7.
  var watchesData = false
  var watchesPorts = false
  var watchesCode = false
  /// What the time-stamp counter counts, and what it counted when the CPU was made.
  var timeSource = TimeSource.monotonic
  var ownTimeSource = TimeSource.monotonic

  /// Where pages of code are.
  let codePages = UnsafeMutablePointer<CodePage>.allocate(capacity: CodePage.count)
  /// Decoded code.
  let blocks = BlockCache()
  /// A stored instruction has changed decoded code: the block under way may be stale.
  var leavesBlock = false
  /// Room for the bytes and the operations of a block that is being made.
  let scratch = UnsafeMutableRawPointer.allocate(byteCount: Block.limit * 8 + 16, alignment: 16)
  let draftOperations = UnsafeMutablePointer<FastOperation>.allocate(capacity: Block.limit + 1)
  /// Pages whose decoded code others have changed.
  let staleCode = Mutex<[UInt]>([])

  /// Another thread wants `run` to return.
  var isKicked: Bool {
    get { kicked.load(ordering: .sequentiallyConsistent) }
    set { kicked.store(newValue, ordering: .sequentiallyConsistent) }
  }
  private let kicked = Atomic(false)
  /// The state says that the CPU waits for an interrupt: it says so when it runs next.
  var isHalted = false
  /// Non-maskable interrupts that wait: up to two, since the first may be taken at once.
  var pendingNMIs = 0
  /// An external interrupt that the VMM put at the INTR pin itself.
  var pendingInterrupt: UInt8?
  /// The VMM wants to know when an interrupt could be taken.
  var wantsInterruptWindow = false
  /// What a debugger on the host wants.
  var hostDebug = HostDebug()
  /// A repeated string instruction stops after the iteration under way.
  var finishesOnly = false
  /// The number of retired instructions at which `run` returns.
  var instructionLimit = UInt64.max
  /// Whether nothing but the guest's own instructions and what they bring about may show in what the CPU does.
  var isDeterministic = false
  /// Where random numbers come from, where they are always the same ones.
  var randomState: UInt64 = 0
  /// Who is told what the CPU does.
  var tracers = Tracers()
  /// Whether somebody is told of every instruction, and the bytes of the one that was fetched last.
  var tracesInstructions = false
  var fetchedBytes: (UInt64, UInt64) = (0, 0)

  /// A CPU in the state after reset.
  init(number: Int = 0, memory: PhysicalMemory, features: ProcessorFeatures, group: ProcessorGroup = ProcessorGroup()) {
    cpu = .allocate(capacity: 1)
    UnsafeMutableRawPointer(cpu).initializeMemory(as: UInt8.self, repeating: 0, count: MemoryLayout<soft_cpu>.size)
    general = soft_general(cpu)
    segments = soft_segments(cpu)
    self.number = number
    self.group = group
    self.memory = memory
    self.features = features
    cpu.pointee.tlb = .allocate(capacity: Int(SOFT_TLB_ENTRIES))
    cpu.pointee.budget = .max
    codePages.initialize(repeating: CodePage(), count: CodePage.count)
    clearTLB()
    reset()
  }

  deinit {
    codePages.deallocate()
    scratch.deallocate()
    draftOperations.deallocate()
    cpu.pointee.tlb.deallocate()
    cpu.deallocate()
  }
}

/// What a CPU needs of the VMM before an instruction can go on.
enum PendingExit {
  case none
  /// A device's memory: `size` bytes (1 to 8) at a guest-physical address.
  case memory(physical: UInt64, size: UInt8, isWrite: Bool, value: UInt64)
  /// A port: one item of 1, 2 or 4 bytes.
  case port(UInt16, size: UInt8, isWrite: Bool, value: UInt64)
  /// Instructions or page tables where nothing is.
  case memoryFault(physical: UInt64)
  /// An instruction that would change a pinned register.
  case pinnedRegister(PinnedRegister, value: UInt64)
  /// An access that the active view forbids.
  case viewViolation(ViewViolation)
  /// The debugger has something to look at.
  case debug(DebugEvent)
  /// `hlt`.
  case halt
  /// `instructionLimit` is reached.
  case instructionLimit
  /// An interrupt can be taken, and the VMM asked to be told.
  case interruptWindow
  /// A triple fault.
  case tripleFault
}

/// The device accesses of the instruction under way: served from here when it starts again.
struct DeviceReplay {
  /// Values of the accesses already made, in order; a write's is unused.
  var values: [UInt64] = []
  /// The next one to serve.
  var position = 0
}
