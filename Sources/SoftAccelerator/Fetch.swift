import CSoftCPU
import X86

/// Instruction bytes, by linear address, with the rights of fetches.
extension Processor {
  /// The linear address of the instruction at an instruction pointer.
  @inline(__always)
  func codeAddress(_ ip: UInt64) -> UInt64 {
    is64Bit ? ip : (segments[Int(Register.cs.index)].base &+ ip) & 0xffff_ffff
  }

  /// The host's address of an instruction's first byte.
  func fetchAddress(_ linear: UInt64) throws(Interruption) -> UnsafeMutableRawPointer {
    let entry = codePages + Int(linear >> 12 & UInt64(CodePage.count - 1))
    if entry.pointee.linear == linear & ~0xfff, entry.pointee.context == codeContext {
      return entry.pointee.host + Int(linear & 0xfff)
    }
    guard isCanonical(linear) else { throw .generalProtection }
    let place = try locate(linear, cpu.pointee.cpl == 3 ? [.fetch, .user] : .fetch)
    guard let host = place.host else {
      pendingExit = .memoryFault(physical: place.physical)
      throw .exit
    }
    entry.pointee = CodePage(linear: linear & ~0xfff, context: codeContext, host: host - Int(linear & 0xfff))
    return host
  }

  /// Decodes the instruction at RIP.
  ///
  /// - Throws: what fetching or decoding it raises.
  func fetch() throws(Interruption) -> Instruction {
    let ip = cpu.pointee.rip
    let linear = codeAddress(ip)
    let mode = CodeMode(rawValue: cpu.pointee.code_mode) ?? .code64
    // A copy: the guest may change the bytes while they are decoded.
    var bytes: (UInt64, UInt64) = (0, 0)
    let inPage = min(Instruction.maximumLength, 0x1000 - Int(linear & 0xfff))
    // Beyond CS's limit there is nothing to fetch.
    let limit = segments[Int(Register.cs.index)].limit
    let inSegment =
      is64Bit ? Instruction.maximumLength : ip > UInt64(limit) ? 0 : Int(min(UInt64(limit) &- ip &+ 1, 15))
    guard inSegment > 0 else { throw .generalProtection }
    let first = try fetchAddress(linear)
    var count = min(inPage, inSegment)
    withUnsafeMutableBytes(of: &bytes) { $0.baseAddress.unsafelyUnwrapped.copyMemory(from: first, byteCount: count) }
    while true {
      let result: Result<Instruction, DecodeError> = withUnsafeBytes(of: bytes) { buffer in
        let known = UnsafeRawBufferPointer(rebasing: buffer[..<count])
        do throws(DecodeError) { return .success(try Instruction(decoding: known, mode: mode)) } catch {
          return .failure(error)
        }
      }
      switch result {
      case .success(let instruction):
        if tracesInstructions { fetchedBytes = bytes }
        return instruction
      case .failure(.invalidOpcode): throw .invalidOpcode
      case .failure(.tooLong): throw .generalProtection
      case .failure(.needsMoreBytes):
        guard count < inSegment, count == inPage else { throw .generalProtection }
        let next = codeAddress(ip &+ UInt64(count))
        let second = try fetchAddress(next)
        let more = min(inSegment, Instruction.maximumLength) - count
        withUnsafeMutableBytes(of: &bytes) {
          ($0.baseAddress.unsafelyUnwrapped + count).copyMemory(from: second, byteCount: more)
        }
        count += more
      }
    }
  }
}

/// Where a page of code is: instruction fetches have a small cache of their own.
struct CodePage {
  static let count = 256

  /// The page's linear address.
  var linear: UInt64 = 1
  /// The code context that the entry belongs to; contexts are never used twice.
  var context: UInt64 = 0
  /// The host's address of the page.
  var host = UnsafeMutableRawPointer(bitPattern: 4096).unsafelyUnwrapped
}
