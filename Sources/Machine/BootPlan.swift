import Accelerator
import Boot
import GuestMemory
import Synchronization

/// How the guest gets into memory: carried out at the start and again at every reset.
struct BootPlan: Sendable {
  /// Writes the guest into memory and says where the boot processor begins.
  let load: @Sendable (GuestMemory) throws(MachineError) -> BootEntry
  /// Says where the boot processor begins after S3.
  let wake: @Sendable (GuestMemory) throws(MachineError) -> BootEntry

  /// To be called where memory holds something before the first load.
  let memoryIsUsed: @Sendable () -> Void

  /// A plan given by its functions.
  init(
    load: @escaping @Sendable (GuestMemory) throws(MachineError) -> BootEntry,
    wake: @escaping @Sendable (GuestMemory) throws(MachineError) -> BootEntry
  ) {
    memoryIsUsed = {}
    self.load = load
    self.wake = wake
  }

  /// Boots what the request names, in a machine that has these tables.
  init(_ request: BootRequest, _ tables: ACPITables?) {
    let isFirst = Once()
    memoryIsUsed = { _ = isFirst.take() }
    load = { memory throws(MachineError) in
      var request = request
      request.memoryIsZero = isFirst.take()
      do throws(BootError) {
        try request.firmware?.copyAlias(into: memory)
        try tables?.write(to: memory)
        return try BootCatalogue.boot(request, into: memory)
      } catch {
        throw .boot(error)
      }
    }
    wake = { memory throws(MachineError) in
      do throws(GuestMemoryError) {
        // The FACS's firmware waking vector (ACPI 6.5, table 5.15): real mode, CS:IP from the physical address.
        let vector: UInt32 = try memory.read(GuestPhysicalAddress(ACPITables.facsAddress + 12))
        var state = VCPUState()
        state.general.rip = UInt64(vector & 0xf)
        state.system.cs = .real(selector: UInt16(truncatingIfNeeded: vector >> 4), code: true)
        return BootEntry(general: state.general, system: state.system)
      } catch {
        throw .memory(error)
      }
    }
  }

  private final class Once: Sendable {
    private let done = Atomic(false)

    func take() -> Bool { !done.exchange(true, ordering: .relaxed) }
  }
}
