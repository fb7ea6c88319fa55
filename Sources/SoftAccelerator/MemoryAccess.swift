import CSoftCPU
import MemoryViews
import X86

/// Loads and stores by linear address: the TLB's inline path, and everything else behind it.
extension Processor {
  /// Where one page of a linear address is.
  struct Location {
    /// The host's address of the very byte; nil where a device is.
    var host: UnsafeMutableRawPointer?
    /// The guest-physical address of the very byte.
    var physical: UInt64
  }

  // MARK: Data accesses of the program

  /// Loads an integer with the program's rights. `T` is unsigned, 1 to 8 bytes.
  @inline(__always)
  func load<T: FixedWidthInteger>(_ linear: UInt64, as type: T.Type = T.self) throws(Interruption) -> T {
    let entry = cpu.pointee.tlb + Self.tlbIndex(linear)
    let last = linear &+ UInt64(MemoryLayout<T>.size &- 1)
    if entry.pointee.read_tag == last & ~0xfff | cpu.pointee.data_context {
      return FastState.load(Self.host(linear, entry))
    }
    return T(truncatingIfNeeded: try loadSlowly(linear, size: UInt8(MemoryLayout<T>.size)))
  }

  /// Stores an integer with the program's rights. `T` is unsigned, 1 to 8 bytes.
  @inline(__always)
  func store<T: FixedWidthInteger>(_ value: T, _ linear: UInt64) throws(Interruption) {
    let entry = cpu.pointee.tlb + Self.tlbIndex(linear)
    let last = linear &+ UInt64(MemoryLayout<T>.size &- 1)
    if entry.pointee.write_tag == last & ~0xfff | cpu.pointee.data_context {
      FastState.store(value, Self.host(linear, entry))
      return
    }
    try storeSlowly(UInt64(truncatingIfNeeded: value), linear, size: UInt8(MemoryLayout<T>.size))
  }

  /// Loads `size` (1, 2, 4 or 8) bytes, zero-extended.
  func load(_ linear: UInt64, size: UInt8) throws(Interruption) -> UInt64 {
    switch size {
    case 1: UInt64(try load(linear, as: UInt8.self))
    case 2: UInt64(try load(linear, as: UInt16.self))
    case 4: UInt64(try load(linear, as: UInt32.self))
    default: try load(linear, as: UInt64.self)
    }
  }

  /// Stores the low `size` (1, 2, 4 or 8) bytes.
  func store(_ value: UInt64, _ linear: UInt64, size: UInt8) throws(Interruption) {
    switch size {
    case 1: try store(UInt8(truncatingIfNeeded: value), linear)
    case 2: try store(UInt16(truncatingIfNeeded: value), linear)
    case 4: try store(UInt32(truncatingIfNeeded: value), linear)
    default: try store(value, linear)
    }
  }

  /// Loads `count` bytes into host memory; all of them can be read, or none is.
  func load(_ linear: UInt64, into buffer: UnsafeMutableRawPointer, count: Int) throws(Interruption) {
    try checkAccess(linear, count: count, dataAccess)
    try transfer(linear, buffer, count: count, dataAccess)
  }

  /// Stores `count` bytes of host memory; all of them can be written, or none is.
  func store(from buffer: UnsafeRawPointer, _ linear: UInt64, count: Int) throws(Interruption) {
    let access = dataAccess.union(.write)
    try checkAccess(linear, count: count, access)
    try transfer(linear, UnsafeMutableRawPointer(mutating: buffer), count: count, access)
  }

  /// Faults as a write of `count` bytes would, without one: before an instruction changes anything else.
  func checkWrite(_ linear: UInt64, count: Int) throws(Interruption) {
    try checkAccess(linear, count: count, dataAccess.union(.write))
  }

  /// Replaces `size` bytes by what `change` makes of them, in one atomic step if `isLocked`; returns the old bytes.
  ///
  /// `change` may be called more than once and must have no effect of its own.
  @inline(__always)
  func modify(
    _ linear: UInt64, size: UInt8, isLocked: Bool, _ change: (UInt64) -> UInt64
  ) throws(Interruption) -> UInt64 {
    let entry = cpu.pointee.tlb + Self.tlbIndex(linear)
    let last = linear &+ UInt64(size &- 1)
    if !isLocked, entry.pointee.write_tag == last & ~0xfff | cpu.pointee.data_context {
      let host = Self.host(linear, entry)
      let old = Self.read(host, size: size)
      Self.write(change(old), host, size: size)
      return old
    }
    // Checked as a write first: a page that cannot be written faults as one.
    try checkAccess(linear, count: Int(size), dataAccess.union(.write))
    let place = try locate(linear, dataAccess.union(.write))
    guard isLocked, let host = place.host, linear & 0xfff &+ UInt64(size) <= 0x1000 else {
      let old = try loadSlowly(linear, size: size)
      try storeSlowly(change(old), linear, size: size)
      return old
    }
    try checkAlignment(linear, size: size)
    var old = Self.read(host, size: size)
    while !Self.compareAndSwap(host, &old, change(old), size: size) {}
    memoryWritten(host, count: Int(size))
    return old
  }

  // MARK: Accesses of the processor itself

  /// Loads `size` bytes of a system data structure (descriptor table, TSS): with the supervisor's rights.
  func loadSystem(_ linear: UInt64, size: UInt8) throws(Interruption) -> UInt64 {
    var value: UInt64 = 0
    try checkAccess(linear, count: Int(size), .implicit)
    try transfer(linear, &value, count: Int(size), .implicit)
    return value
  }

  /// Stores `size` bytes of a system data structure: with the supervisor's rights.
  func storeSystem(_ value: UInt64, _ linear: UInt64, size: UInt8) throws(Interruption) {
    var value = value
    try checkAccess(linear, count: Int(size), [.implicit, .write])
    try transfer(linear, &value, count: Int(size), [.implicit, .write])
  }

  // MARK: Behind the inline path

  /// The rights of the program's data accesses.
  @inline(__always)
  var dataAccess: PageAccess { cpu.pointee.cpl == 3 ? .user : [] }

  @inline(never)
  private func loadSlowly(_ linear: UInt64, size: UInt8) throws(Interruption) -> UInt64 {
    try checkAlignment(linear, size: size)
    var value: UInt64 = 0
    let access = dataAccess
    if linear & 0xfff &+ UInt64(size) <= 0x1000 {
      let place = try locate(linear, access)
      value =
        if let host = place.host { Self.read(host, size: size) } else { try deviceRead(place.physical, size: size) }
    } else {
      try checkAccess(linear, count: Int(size), access)
      try transfer(linear, &value, count: Int(size), access)
    }
    if watchesData { noteDataAccess(linear, count: Int(size), isWrite: false) }
    return value
  }

  @inline(never)
  private func storeSlowly(_ value: UInt64, _ linear: UInt64, size: UInt8) throws(Interruption) {
    try checkAlignment(linear, size: size)
    let access = dataAccess.union(.write)
    if linear & 0xfff &+ UInt64(size) <= 0x1000 {
      let place = try locate(linear, access)
      if let host = place.host {
        Self.write(value, host, size: size)
        memoryWritten(host, count: Int(size))
      } else {
        try deviceWrite(place.physical, size: size, value: value)
      }
    } else {
      var value = value
      try checkAccess(linear, count: Int(size), access)
      try transfer(linear, &value, count: Int(size), access)
    }
    if watchesData { noteDataAccess(linear, count: Int(size), isWrite: true) }
  }

  /// #AC where alignment is checked and the address is not aligned to `size`.
  @inline(__always)
  func checkAlignment(_ linear: UInt64, size: UInt8) throws(Interruption) {
    if linear & UInt64(size &- 1) != 0, checksAlignment { throw .fault(.alignmentCheck, 0) }
  }

  /// Faults as an access to `count` bytes would.
  func checkAccess(_ linear: UInt64, count: Int, _ access: PageAccess) throws(Interruption) {
    _ = try locate(linear, access)
    var next = (linear | 0xfff) &+ 1
    let last = linear &+ UInt64(count &- 1)
    while next &- linear <= last &- linear {
      _ = try locate(next, access)
      next &+= 0x1000
    }
  }

  /// Copies between guest and host, page by page, after `checkAccess`.
  private func transfer(
    _ linear: UInt64, _ buffer: UnsafeMutableRawPointer, count: Int, _ access: PageAccess
  ) throws(Interruption) {
    var done = 0
    while done < count {
      let address = linear &+ UInt64(done)
      let run = min(count - done, 0x1000 - Int(address & 0xfff))
      let place = try locate(address, access)
      if let host = place.host {
        if access.contains(.write) {
          host.copyMemory(from: buffer + done, byteCount: run)
          memoryWritten(host, count: run)
        } else {
          (buffer + done).copyMemory(from: host, byteCount: run)
        }
        done += run
        continue
      }
      // Devices see accesses of 8, 4, 2 and 1 bytes.
      var left = run
      while left > 0 {
        let size = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1
        let physical = place.physical &+ UInt64(run - left)
        if access.contains(.write) {
          try deviceWrite(physical, size: UInt8(size), value: Self.read(buffer + done, size: UInt8(size)))
        } else {
          Self.write(try deviceRead(physical, size: UInt8(size)), buffer + done, size: UInt8(size))
        }
        done += size
        left -= size
      }
    }
  }

  /// Where a linear address is, for an access that must be allowed; the TLB has it afterwards.
  @inline(never)
  func locate(_ linear: UInt64, _ access: PageAccess) throws(Interruption) -> Location {
    let entry = cpu.pointee.tlb + Self.tlbIndex(linear)
    let context = access.contains(.fetch) ? 0 : access.contains(.implicit) ? dataContext(0) : plainContext
    let tag = linear & ~0xfff | context
    // Number 0 is nobody's, so fetches, which the TLB does not hold, never match.
    if context != 0, access.contains(.write) ? entry.pointee.write_tag == tag : entry.pointee.read_tag == tag {
      return Location(
        host: Self.host(linear, entry), physical: entry.pointee.physical | linear & 0xfff)
    }
    let translation = try walk(linear, access)
    let offset = linear & 0xfff
    let needed: PageRights = access.contains(.fetch) ? .execute : access.contains(.write) ? .write : .read
    guard let page = try page(translation.page | offset, needed, linear: linear) else {
      return Location(host: nil, physical: translation.page | offset)
    }
    if access.contains(.write) {
      // ROM: the write goes where devices are.
      guard page.isWritable else { return Location(host: nil, physical: translation.page | offset) }
      page.dirty?.pointee = 1
    }
    let location = Location(host: page.host + Int(offset), physical: translation.page | offset)
    if context == 0 { return location }
    if translation.isLarge { holdsLargePages = true }
    let isDirtyLogged = page.dirty.map { $0.pointee != 0 } ?? true
    let takesWrites =
      translation.isWritable && page.isWritable && page.takesWrites && isDirtyLogged && !holdsCode(page.host)
    entry.pointee = soft_tlb_entry(
      read_tag: page.takesReads ? tag : 0, write_tag: takesWrites ? tag : 0,
      addend: UInt64(UInt(bitPattern: page.host)) &- (linear & ~0xfff), physical: translation.page)
    return location
  }

  @inline(__always)
  static func host(_ linear: UInt64, _ entry: UnsafeMutablePointer<soft_tlb_entry>) -> UnsafeMutableRawPointer {
    UnsafeMutableRawPointer(bitPattern: UInt(linear &+ entry.pointee.addend)).unsafelyUnwrapped
  }

  @inline(__always)
  static func read(_ pointer: UnsafeRawPointer, size: UInt8) -> UInt64 {
    switch size {
    case 1: UInt64(soft_get8(pointer))
    case 2: UInt64(soft_get16(pointer))
    case 4: UInt64(soft_get32(pointer))
    default: soft_get64(pointer)
    }
  }

  @inline(__always)
  static func write(_ value: UInt64, _ pointer: UnsafeMutableRawPointer, size: UInt8) {
    switch size {
    case 1: soft_put8(pointer, UInt8(truncatingIfNeeded: value))
    case 2: soft_put16(pointer, UInt16(truncatingIfNeeded: value))
    case 4: soft_put32(pointer, UInt32(truncatingIfNeeded: value))
    default: soft_put64(pointer, value)
    }
  }

  @inline(__always)
  private static func compareAndSwap(
    _ pointer: UnsafeMutableRawPointer, _ expected: inout UInt64, _ desired: UInt64, size: UInt8
  ) -> Bool {
    switch size {
    case 1:
      var old = UInt8(truncatingIfNeeded: expected)
      defer { expected = UInt64(old) }
      return soft_cas8(pointer, &old, UInt8(truncatingIfNeeded: desired))
    case 2:
      var old = UInt16(truncatingIfNeeded: expected)
      defer { expected = UInt64(old) }
      return soft_cas16(pointer, &old, UInt16(truncatingIfNeeded: desired))
    case 4:
      var old = UInt32(truncatingIfNeeded: expected)
      defer { expected = UInt64(old) }
      return soft_cas32(pointer, &old, UInt32(truncatingIfNeeded: desired))
    default:
      return soft_cas64(pointer, &expected, desired)
    }
  }
}
