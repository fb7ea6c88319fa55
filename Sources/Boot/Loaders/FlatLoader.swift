import Accelerator
import GuestMemory

/// Bytes without a header, entered at their first byte at the address that `--load-address` gives.
///
/// Below 1 MiB the guest starts in real mode, as a boot sector or kvmtool's flat binaries do: CS:IP is 0000:7C00 for
/// 0x7c00 and 1000:0000 for 0x10000 (CS holds the 64 KiB block, IP the rest), DS and ES are as CS, and the stack grows
/// down from the load address. From 1 MiB on it starts in flat 32-bit protected mode with 16 KiB of stack.
struct FlatLoader: BootLoader {
  let kind = BootKind.flat
  let inputs: Set<BootInput> = [.loadAddress]

  private static let stackSize: UInt64 = 16 << 10

  func recognises(_ image: BootImage, loadAddress: UInt64?) -> Bool { loadAddress != nil }

  func load(_ image: BootImage, _ request: BootRequest, _ placer: inout Placer) throws(BootError) -> EntryState {
    let address = request.loadAddress ?? 0
    let range = try placer.claim(.flatBinary, at: address, size: image.size)
    guard address < Platform.fourGiB else {
      throw .outsideMemory(path: image.path, part: .flatBinary, address: address, size: image.size)
    }
    try placer.copy(image, .flatBinary, at: 0, to: range)
    guard address < Platform.oneMiB else {
      let stack = try placer.place(.stack, size: Self.stackSize)
      var state = try EntryState.flat32(entry: address, &placer)
      state.general.rsp = stack.end.rawValue
      return state
    }
    let segment = UInt16(address >> 16) << 12
    // A binary on the interrupt vectors has no room for a stack below it.
    let stackTop = address >= 0x600 ? address : Platform.extendedBIOSData.start.rawValue
    return .realMode(
      codeSegment: segment, ip: UInt16(truncatingIfNeeded: address), dataSegment: segment,
      stackSegment: UInt16((stackTop - 1) >> 16) << 12, sp: UInt16(truncatingIfNeeded: stackTop))
  }
}
