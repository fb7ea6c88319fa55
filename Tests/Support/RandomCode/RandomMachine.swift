import Accelerator
import Glibc
import GuestMemory
import SoftAccelerator

/// A machine of the software engine with little memory, each piece of which lies between pages that trap whoever in the
/// VMM leaves it.
///
/// | address | |
/// |---|---|
/// | 0, 0x800 | interrupt vectors of real mode, GDT |
/// | 0x1000 | the code |
/// | 0x2000, 0x3000, 0x5000 | IDT, task-state segment with its permission bitmap, LDT |
/// | 0x4000 | handlers, 16 bytes each |
/// | below 0x8000 | stacks |
/// | 0x10000-0x19fff | page tables of every kind |
/// | 0x30000-0x3ffff | memory that the guest cannot write |
/// | 4 GiB | two more pages |
final class RandomMachine {
  static let lowSize: UInt64 = 0x4_0000
  static let high: UInt64 = 1 << 32
  static let code: UInt64 = 0x1000
  static let handlers: UInt64 = 0x4000

  /// The root of a kind of page tables.
  static func pageTables(_ paging: RandomState.Paging) -> UInt64 {
    switch paging {
    case .none, .two: 0x1_0000
    case .pae: 0x1_2000
    case .four: 0x1_5000
    case .five: 0x1_9000
    }
  }

  private static let guardSize: UInt64 = 0x1000
  /// Where pieces of memory are.
  private static let pieces: [(start: UInt64, size: UInt64, access: MemorySlot.Access)] = [
    (0, 0x8000, .readWriteExecute), (0x8000, 0x1000, .readWriteExecute), (0x9000, 0x2_7000, .readWriteExecute),
    (0x3_0000, 0x1_0000, .readExecute), (high, 0x2000, .readWriteExecute),
  ]

  private(set) var machine: any VirtualMachine
  private(set) var vcpus: [SoftVirtualCPU] = []
  private var accelerator = SoftAccelerator()
  private let memory: GuestMemory
  /// Where each piece begins in `memory`.
  private let places: [UInt64]
  /// What a piece holds before a case changes it.
  private var images: [[UInt8]]

  init() throws {
    var place = Self.guardSize
    places = Self.pieces.map { piece in
      defer { place += piece.size + Self.guardSize }
      return place
    }
    let whole = GuestRange(start: GuestPhysicalAddress(0), size: place)
    guard let whole else { throw RandomCodeError.setup("the size of memory") }
    memory = try GuestMemory([whole])
    images = Self.pieces.map { [UInt8](repeating: 0, count: Int($0.size)) }
    machine = try accelerator.makeVirtualMachine(memory: memory, interrupts: .userSpace)
    let base = memory.regions[0].hostBase
    for (piece, place) in zip(Self.pieces, places) {
      for page in [place - Self.guardSize, place + piece.size] {
        guard mprotect(base + Int(page), Int(Self.guardSize), PROT_NONE) == 0 else {
          throw RandomCodeError.setup("mprotect: errno \(errno)")
        }
      }
    }
  }

  /// A new machine over the memory, whose first contents are new too, unless they are to stay.
  func renew(_ random: inout RandomSource, keepsContents: Bool = false) throws {
    vcpus = []
    accelerator = SoftAccelerator(isDeterministic: random.oneIn(2))
    machine = try accelerator.makeVirtualMachine(memory: memory, interrupts: .userSpace)
    for number in Self.pieces.indices { try setSlot(number, isLogged: random.oneIn(4)) }
    for index in 0..<(random.oneIn(3) ? 2 : 1) {
      var leaves = accelerator.supportedCPUID()
      if random.oneIn(4) { Self.change(&leaves, &random) }
      guard let vcpu = try machine.makeVCPU(index: index, cpuid: leaves) as? SoftVirtualCPU else {
        throw RandomCodeError.setup("the kind of vCPU")
      }
      if !random.oneIn(4) { try vcpu.attach(RandomAPIC(RandomSource(seed: random.next()))) }
      vcpus.append(vcpu)
    }
    if !keepsContents { makeImages(&random) }
  }

  /// Takes features away, or adds those that are built and not shown.
  private static func change(_ leaves: inout [CPUIDLeaf], _ random: inout RandomSource) {
    for index in leaves.indices where [1, 7, 0xd, 0x8000_0001].contains(leaves[index].function) {
      if random.oneIn(2) { leaves[index].ecx ^= UInt32(truncatingIfNeeded: random.flips()) & ~(1 << 26) }
      if random.oneIn(4) { leaves[index].edx ^= UInt32(truncatingIfNeeded: random.flips()) }
      if leaves[index].function == 7, random.oneIn(2) {
        leaves[index].ebx &= UInt32(truncatingIfNeeded: random.next())
        leaves[index].ecx |= 1 << 3
      }
    }
  }

  /// Puts a piece of memory in its slot.
  func setSlot(_ number: Int, isLogged: Bool) throws {
    let piece = Self.pieces[number]
    guard let range = GuestRange(start: GuestPhysicalAddress(piece.start), size: piece.size) else { return }
    try machine.setMemorySlot(
      MemorySlot(
        number: UInt32(number), range: range, hostBase: memory.regions[0].hostBase + Int(places[number]),
        access: piece.access, logsDirtyPages: isLogged))
  }

  var slotCount: Int { Self.pieces.count }

  // MARK: Contents

  /// Writes what a device, or the VMM, writes; beyond a piece's end nothing is written.
  func write(_ bytes: [UInt8], to address: UInt64) throws {
    for (piece, place) in zip(Self.pieces, places) where address &- piece.start < piece.size {
      let offset = address - piece.start
      try memory.write(
        Array(bytes.prefix(Int(piece.size - offset))), to: GuestPhysicalAddress(place + offset))
    }
  }

  /// Writes 8 bytes.
  func put(_ value: UInt64, at address: UInt64) throws {
    try write((0..<8).map { UInt8(truncatingIfNeeded: value >> ($0 * 8)) }, to: address)
  }

  /// Puts memory back into its first state.
  func restoreMemory() throws {
    for (image, place) in zip(images, places) { try memory.write(image, to: GuestPhysicalAddress(place)) }
  }

  private func setImage(_ value: UInt64, at address: UInt64) {
    for (number, piece) in Self.pieces.enumerated() where address &- piece.start < piece.size {
      let offset = Int(address - piece.start)
      for byte in 0..<min(8, Int(piece.size) - offset) {
        images[number][offset + byte] = UInt8(truncatingIfNeeded: value >> UInt64(byte * 8))
      }
    }
  }

  private func makeImages(_ random: inout RandomSource) {
    for (number, piece) in Self.pieces.enumerated() {
      for offset in stride(from: 0, to: piece.size, by: 8) {
        let value = random.oneIn(4) ? random.next() : random.integer()
        for byte in 0..<8 as Range<UInt64> {
          images[number][Int(offset + byte)] = UInt8(truncatingIfNeeded: value >> (byte * 8))
        }
      }
    }
    makePageTables(&random)
  }

  /// Tables of 4 and of 8 bytes an entry: the first pages to themselves, above them anything.
  private func makePageTables(_ random: inout RandomSource) {
    for entry in 0..<1024 as Range<UInt64> where entry & 1 == 0 {
      let pages = [entry, entry + 1].map { page32($0, &random) }
      setImage(pages[0] | pages[1] << 32, at: 0x1_1000 + entry * 4)
      let first = entry == 0 ? 0x1_1007 : directoryEntry(0x1_1000, &random) & 0xffff_ffff
      setImage(first | directoryEntry(0x1_1000, &random) << 32, at: 0x1_0000 + entry * 4)
    }
    for entry in 0..<512 as Range<UInt64> {
      let page = entry < 64 ? entry << 12 : random.address() & 0xff_ffff_f000
      let value = page | (random.oneIn(8) ? random.next() & 0x8000_0000_0000_01ff : 7)
      setImage(value, at: 0x1_4000 + entry * 8)
      setImage(value, at: 0x1_8000 + entry * 8)
      for (table, next) in Self.upperTables {
        setImage(entry == 0 ? next | 7 : directoryEntry(next, &random), at: table + entry * 8)
      }
      if entry < 4 { setImage(0x1_3001, at: 0x1_2000 + entry * 8) }
    }
  }

  /// Tables, and the one that their first entry names.
  private static let upperTables: [(UInt64, UInt64)] = [
    (0x1_3000, 0x1_4000), (0x1_5000, 0x1_6000), (0x1_6000, 0x1_7000), (0x1_7000, 0x1_8000), (0x1_9000, 0x1_5000),
  ]

  private func page32(_ entry: UInt64, _ random: inout RandomSource) -> UInt64 {
    let page = entry < 64 ? entry << 12 : random.address() & 0xffff_f000
    return page | (random.oneIn(8) ? random.next() & 0x1ff : 7)
  }

  /// An entry of an upper table: nothing, a table, a large page, or nonsense.
  private func directoryEntry(_ next: UInt64, _ random: inout RandomSource) -> UInt64 {
    switch random.below(8) {
    case 0...3: next | 7
    case 4: random.pick([0x87, 0xe7, 0x1_0000_0087, 0xd000_0087, 0x4000_0087, 0xc000_0000_0000_0087, 0x1087])
    case 5: random.next()
    case 6: random.pick([0x1_5007, 0x1_6007, 0x1_7007, 0x1_0007, 0x3_0007, 0x20_0007, 0x1_0000_0007])
    default: 0
    }
  }
}
