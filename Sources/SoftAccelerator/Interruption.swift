import X86

/// Why an instruction did not complete. Nothing of it is visible yet, but for the completed iterations of a repeated
/// string instruction and the accessed and dirty bits of page tables.
enum Interruption: Error {
  /// An exception without an error code.
  case exception(ExceptionVector)
  /// An exception with its error code; for #PF the address is in `Processor.faultAddress`.
  case fault(ExceptionVector, UInt32)
  /// The VMM is needed first (`Processor.pendingExit`); the instruction starts again afterwards.
  case exit

  /// #GP(0).
  static var generalProtection: Interruption { .fault(.generalProtection, 0) }
  /// #GP with a selector's index and table in the error code.
  static func generalProtection(_ selector: UInt16) -> Interruption {
    .fault(.generalProtection, UInt32(selector & ~3))
  }
  /// #UD.
  static var invalidOpcode: Interruption { .exception(.invalidOpcode) }
}
