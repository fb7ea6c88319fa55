import CSoftCPU
import X86

/// Why one task is left for another.
enum TaskSwitchReason {
  case jump
  case call
  case gate
  case `return`
}

/// Switches of tasks by hardware (SDM vol. 3, 7.3).
extension Processor {
  /// Saves the current task in its TSS and goes on with another.
  ///
  /// The type and presence of the TSS descriptor are checked already. `returnIP` and `flags` are what the current task
  /// finds when it goes on; `external` is EXT, bit 0 of error codes.
  ///
  /// - Throws: what reading or writing either TSS raises, before anything is changed; or what the new task's own
  ///   registers raise, in the new task's context.
  func switchTask(
    to found: FoundDescriptor, _ selector: UInt16, reason: TaskSwitchReason, returnIP: UInt64, flags: UInt64,
    external: UInt32 = 0
  ) throws(Interruption) {
    let target = soft_segment(found.descriptor, selector: selector)
    let is32 = target.attributes & 8 != 0
    guard target.limit >= (is32 ? 103 : 43) else {
      throw .fault(.invalidTSS, UInt32(selector & ~3) | external)
    }
    let current = segments[SegmentIndex.tr]
    let currentIs32 = current.attributes & 8 != 0
    let saved = savedTask(
      is32: currentIs32, ip: returnIP, flags: reason == .return ? flags & ~RFLAGS.nt.rawValue : flags)
    // Everything that can fault on the way out.
    try checkAccess(
      systemAddress(current.base &+ (currentIs32 ? 32 : 14)), count: currentIs32 ? 64 : 28, [.implicit, .write])
    try checkAccess(systemAddress(target.base), count: is32 ? 104 : 44, .implicit)
    let nests = reason == .call || reason == .gate
    if nests { try checkAccess(systemAddress(target.base), count: 2, [.implicit, .write]) }
    let task = try loadTask(target.base, is32: is32)
    let currentDescriptor = current.isUsable ? try findDescriptor(current.selector) : nil

    if !nests, let currentDescriptor { try setBusy(currentDescriptor, false) }
    try storeTask(saved, current.base, is32: currentIs32)
    if nests { try storeSystem(UInt64(current.selector), systemAddress(target.base), size: 2) }
    if reason != .return { try setBusy(found, true) }

    // From here on the new task runs, and faults are its own.
    var newFlags = task.flags
    if nests { newFlags |= RFLAGS.nt.rawValue }
    var register = target
    register.attributes |= 2
    segments[SegmentIndex.tr] = register
    cpu.pointee.cr0 |= CR0.ts.rawValue
    if is32, cpu.pointee.cr0 & CR0.pg.rawValue != 0, task.cr3 != cpu.pointee.cr3 { try loadTaskCR3(task.cr3) }
    for index in 0..<8 {
      // A 16-bit task leaves the upper halves undefined: they stay.
      general[index] = is32 ? task.general[index] & 0xffff_ffff : general[index] & 0xffff_0000 | task.general[index]
    }
    rflags = is32 ? newFlags : rflags & 0xffff_0000 & ~RFLAGS.vm.rawValue | newFlags & 0xffff
    cpu.pointee.rip = task.ip
    nextIP = task.ip
    cpu.pointee.dr.7 &= ~0x155
    try loadTaskSegments(task, external: external)
    if task.trap & 1 != 0, is32 { pendingDebug |= DR6.bt.rawValue }
    updateDebug()
  }

  /// The registers of a task, as far as both kinds of TSS have them.
  struct Task {
    var cr3: UInt64 = 0
    var ip: UInt64 = 0
    var flags: UInt64 = 0
    var general = InlineArray<8, UInt64>(repeating: 0)
    var segments = InlineArray<6, UInt16>(repeating: 0)
    var ldt: UInt16 = 0
    var trap: UInt16 = 0
  }

  private func savedTask(is32: Bool, ip: UInt64, flags: UInt64) -> Task {
    var task = Task()
    task.ip = ip
    task.flags = flags
    for index in 0..<8 { task.general[index] = general[index] }
    for index in 0..<6 { task.segments[index] = segments[index].selector }
    return task
  }

  private func loadTask(_ base: UInt64, is32: Bool) throws(Interruption) -> Task {
    var task = Task()
    let size: UInt64 = is32 ? 4 : 2
    let first: UInt64 = is32 ? 32 : 14
    func field(_ offset: UInt64, size: UInt8) throws(Interruption) -> UInt64 {
      try loadSystem(systemAddress(base &+ offset), size: size)
    }
    if is32 { task.cr3 = try field(28, size: 4) }
    task.ip = try field(first, size: UInt8(size))
    task.flags = try field(first &+ size, size: UInt8(size))
    for index in 0..<8 { task.general[index] = try field(first &+ size &* UInt64(2 &+ index), size: UInt8(size)) }
    // A 16-bit TSS has ES, CS, SS and DS alone.
    for index in 0..<(is32 ? 6 : 4) {
      task.segments[index] = UInt16(truncatingIfNeeded: try field(first &+ size &* UInt64(10 &+ index), size: 2))
    }
    task.ldt = UInt16(truncatingIfNeeded: try field(is32 ? 96 : 42, size: 2))
    if is32 { task.trap = UInt16(truncatingIfNeeded: try field(100, size: 2)) }
    return task
  }

  private func storeTask(_ task: Task, _ base: UInt64, is32: Bool) throws(Interruption) {
    let size: UInt64 = is32 ? 4 : 2
    let first: UInt64 = is32 ? 32 : 14
    try storeSystem(task.ip, systemAddress(base &+ first), size: UInt8(size))
    try storeSystem(task.flags, systemAddress(base &+ first &+ size), size: UInt8(size))
    for index in 0..<8 {
      try storeSystem(
        task.general[index], systemAddress(base &+ first &+ size &* UInt64(2 &+ index)), size: UInt8(size))
    }
    for index in 0..<(is32 ? 6 : 4) {
      let place = systemAddress(base &+ first &+ size &* UInt64(10 &+ index))
      try storeSystem(UInt64(task.segments[index]), place, size: 2)
    }
  }

  /// CR3 of the new task. Bad PAE entries are #TS here.
  private func loadTaskCR3(_ value: UInt64) throws(Interruption) {
    if cpu.pointee.cr4 & CR4.pae.rawValue != 0 {
      guard loadDirectoryPointers(value) else {
        throw .fault(.invalidTSS, UInt32(segments[SegmentIndex.tr].selector & ~3))
      }
    }
    cpu.pointee.cr3 = value
    selectSpace(keep: false)
  }

  /// LDTR and the segment registers of the new task: the selectors first, so that a fault finds them all, then their
  /// descriptors.
  private func loadTaskSegments(_ task: Task, external: UInt32) throws(Interruption) {
    let privilege = UInt8(task.segments[SegmentIndex.cs] & 3)
    segments[SegmentIndex.ldtr] = soft_segment(null: task.ldt)
    for index in 0..<6 { segments[index] = soft_segment(null: task.segments[index]) }
    if !SegmentSelector(rawValue: task.ldt).isNull {
      let code = UInt32(task.ldt & ~3) | external
      guard task.ldt & 4 == 0 else { throw .fault(.invalidTSS, code) }
      let found = try descriptor(task.ldt, else: .invalidTSS, external: external)
      guard found.descriptor.systemType == .ldt, found.descriptor.isPresent else { throw .fault(.invalidTSS, code) }
      segments[SegmentIndex.ldtr] = soft_segment(found.descriptor, selector: task.ldt)
    }
    if isVirtual8086 {
      for index in 0..<6 { segments[index] = soft_segment(virtual8086: task.segments[index]) }
      updateMode(privilege: 3)
      return
    }
    segments[SegmentIndex.ss].attributes = soft_segment.unusable | UInt16(privilege) << 5
    updateMode(privilege: privilege)

    let code = task.segments[SegmentIndex.cs]
    guard !SegmentSelector(rawValue: code).isNull else { throw .fault(.invalidTSS, external) }
    let codeFault = UInt32(code & ~3) | external
    let found = try descriptor(code, else: .invalidTSS, external: external)
    let allowed =
      found.descriptor.isConforming ? found.descriptor.dpl <= privilege : found.descriptor.dpl == privilege
    guard found.descriptor.isCode, allowed else { throw .fault(.invalidTSS, codeFault) }
    guard found.descriptor.isPresent else { throw .fault(.segmentNotPresent, codeFault) }

    let stack = task.segments[SegmentIndex.ss]
    guard !SegmentSelector(rawValue: stack).isNull else { throw .fault(.invalidTSS, external) }
    segments[SegmentIndex.ss] = try stackSegment(stack, privilege: privilege, else: .invalidTSS, external: external)
    try markAccessed(found)
    segments[SegmentIndex.cs] = segment(found, code)
    updateMode(privilege: privilege)

    for index in [SegmentIndex.ds, SegmentIndex.es, SegmentIndex.fs, SegmentIndex.gs] {
      let selector = task.segments[index]
      if SegmentSelector(rawValue: selector).isNull { continue }
      do throws(Interruption) {
        segments[index] = try dataSegment(selector)
      } catch .fault(.generalProtection, let code) {
        throw .fault(.invalidTSS, code | external)
      } catch {
        throw error
      }
    }
    guard cpu.pointee.rip <= UInt64(segments[SegmentIndex.cs].limit) else { throw .fault(.generalProtection, external) }
  }
}
