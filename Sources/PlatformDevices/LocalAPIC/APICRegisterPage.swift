import Synchronization

/// The 64 register words of a local APIC, each at its offset's sixteenth.
final class APICRegisterPage: @unchecked Sendable {
  private let words: UnsafeMutablePointer<Atomic<UInt32>>

  /// All zero.
  init() {
    words = .allocate(capacity: APICRegister.count)
    for index in 0..<APICRegister.count { (words + index).initialize(to: Atomic(0)) }
  }

  deinit {
    words.deinitialize(count: APICRegister.count)
    words.deallocate()
  }

  /// The register at an offset below 0x400.
  @inline(__always)
  subscript(offset: UInt16) -> UInt32 {
    get { words[Int(offset >> 4) & (APICRegister.count - 1)].load(ordering: .sequentiallyConsistent) }
    set { words[Int(offset >> 4) & (APICRegister.count - 1)].store(newValue, ordering: .relaxed) }
  }

  /// A store that later loads of this thread do not pass.
  @inline(__always)
  func storeSequentially(_ value: UInt32, at offset: UInt16) {
    words[Int(offset >> 4)].store(value, ordering: .sequentiallyConsistent)
  }

  // MARK: The three 256-bit registers: 8 words of 32 vectors

  @inline(__always)
  func set(_ vector: UInt8, in register: UInt16) {
    word(vector, register).pointee.bitwiseOr(1 << UInt32(vector & 31), ordering: .sequentiallyConsistent)
  }

  @inline(__always)
  func clear(_ vector: UInt8, in register: UInt16) {
    let bit: UInt32 = 1 << UInt32(vector & 31)
    let word = word(vector, register)
    // Most vectors are edge-triggered and their trigger bits never set: a locked operation saved.
    if word.pointee.load(ordering: .relaxed) & bit != 0 {
      word.pointee.bitwiseAnd(~bit, ordering: .sequentiallyConsistent)
    }
  }

  @inline(__always)
  func contains(_ vector: UInt8, in register: UInt16) -> Bool {
    word(vector, register).pointee.load(ordering: .relaxed) >> UInt32(vector & 31) & 1 == 1
  }

  /// The highest vector whose bit is set.
  func highest(in register: UInt16) -> UInt8? {
    for index in stride(from: 7, through: 0, by: -1) {
      let bits = words[Int(register >> 4) + index].load(ordering: .sequentiallyConsistent)
      if bits != 0 { return UInt8(index * 32 + 31 - bits.leadingZeroBitCount) }
    }
    return nil
  }

  @inline(__always)
  private func word(_ vector: UInt8, _ register: UInt16) -> UnsafeMutablePointer<Atomic<UInt32>> {
    words + Int(register >> 4) + Int(vector >> 5)
  }
}
