import DeviceModel
import StateTree

/// An MSI-X table and its pending bits (PCI Local Bus 3.0, section 6.8.2), without the capability that enables them.
struct MSIXTable {
  private static let entrySize: UInt64 = 16
  private static let masked: UInt32 = 1

  private struct Entry {
    var address: UInt64 = 0
    var data: UInt32 = 0
    var control = MSIXTable.masked
    var isPending = false
  }

  private var entries: [Entry]

  /// Every vector masked, none pending.
  init(vectors: Int) {
    entries = Array(repeating: Entry(), count: vectors)
  }

  /// Bytes of the table.
  var size: UInt64 { UInt64(entries.count) * Self.entrySize }
  /// Bytes of the pending bits.
  var pendingSize: UInt64 { UInt64((entries.count + 63) / 64 * 8) }

  /// Sends the vector's message, or keeps it pending where it or the whole function is masked.
  mutating func signal(_ vector: Int, functionMasked: Bool, _ sink: any InterruptSink) {
    guard entries.indices.contains(vector) else { return }
    if functionMasked || entries[vector].control & Self.masked != 0 {
      entries[vector].isPending = true
    } else {
      entries[vector].isPending = false
      sink.signalMSI(address: entries[vector].address, data: entries[vector].data)
    }
  }

  /// Sends what is pending and not masked.
  mutating func deliverPending(_ sink: any InterruptSink) {
    for vector in entries.indices where entries[vector].isPending {
      signal(vector, functionMasked: false, sink)
    }
  }

  /// The 32 bits of the table at an offset that is a multiple of 4 and inside it.
  func dword(at offset: UInt64) -> UInt32 {
    let entry = entries[Int(offset / Self.entrySize)]
    return switch offset % Self.entrySize {
    case 0: UInt32(truncatingIfNeeded: entry.address)
    case 4: UInt32(entry.address >> 32)
    case 8: entry.data
    default: entry.control
    }
  }

  /// Replaces those 32 bits.
  mutating func setDword(_ value: UInt32, at offset: UInt64) {
    let vector = Int(offset / Self.entrySize)
    switch offset % Self.entrySize {
    case 0: entries[vector].address = entries[vector].address & ~0xffff_ffff | UInt64(value & ~3)
    case 4: entries[vector].address = entries[vector].address & 0xffff_ffff | UInt64(value) << 32
    case 8: entries[vector].data = value
    default: entries[vector].control = value & Self.masked
    }
  }

  /// 32 pending bits, at an offset in the pending bits that is a multiple of 4.
  func pendingDword(at offset: UInt64) -> UInt32 {
    let first = Int(offset) * 8
    var bits: UInt32 = 0
    for index in 0..<32 where first + index < entries.count && entries[first + index].isPending {
      bits |= 1 << UInt32(index)
    }
    return bits
  }

  func write(to writer: inout StateWriter) {
    for entry in entries {
      writer.write(entry.address)
      writer.write(entry.data)
      writer.write(entry.control)
      writer.write(entry.isPending)
    }
  }

  /// As many entries as this table has.
  mutating func read(from reader: inout StateReader) throws(StateError) {
    for index in entries.indices {
      let entry = Entry(
        address: try reader.read(UInt64.self) & ~3, data: try reader.read(),
        control: try reader.read(UInt32.self) & Self.masked, isPending: try reader.read())
      entries[index] = entry
    }
  }
}
