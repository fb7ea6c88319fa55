import CCompression
import Glibc

/// How an image compresses clusters.
public enum CompressionType: UInt8, Sendable, CaseIterable {
  /// Deflate without a header, with a window of 4 KiB.
  case zlib = 0
  /// Zstandard frames.
  case zstd = 1

  /// The name that users know.
  public var name: String {
    switch self {
    case .zlib: "zlib"
    case .zstd: "zstd"
    }
  }

  /// The bytes smaller, or nil where they would not be.
  func compress(_ source: UnsafeRawBufferPointer) -> [UInt8]? {
    let limit = source.count - 1
    var length = 0
    let bytes = [UInt8](unsafeUninitializedCapacity: source.count) { buffer, count in
      switch self {
      case .zlib:
        var stream = z_stream()
        guard ccompression_deflate_init(&stream, Z_DEFAULT_COMPRESSION, -12) == Z_OK else { return }
        defer { deflateEnd(&stream) }
        stream.next_in = UnsafeMutablePointer(mutating: source.bindMemory(to: UInt8.self).baseAddress)
        stream.avail_in = UInt32(source.count)
        stream.next_out = buffer.baseAddress
        stream.avail_out = UInt32(limit)
        if deflate(&stream, Z_FINISH) == Z_STREAM_END { length = limit - Int(stream.avail_out) }
      case .zstd:
        let result = ZSTD_compress(buffer.baseAddress, limit, source.baseAddress, source.count, 3)
        if ZSTD_isError(result) == 0 { length = result }
      }
      count = length
    }
    return length > 0 ? bytes : nil
  }

  /// Fills `target` from the beginning of `source`, which may go on with other bytes; false where it cannot be done.
  func decompress(_ source: UnsafeRawBufferPointer, into target: UnsafeMutableRawBufferPointer) -> Bool {
    switch self {
    case .zlib:
      var stream = z_stream()
      guard ccompression_inflate_init(&stream, -15) == Z_OK else { return false }
      defer { inflateEnd(&stream) }
      stream.next_in = UnsafeMutablePointer(mutating: source.bindMemory(to: UInt8.self).baseAddress)
      stream.avail_in = UInt32(source.count)
      stream.next_out = target.bindMemory(to: UInt8.self).baseAddress
      stream.avail_out = UInt32(target.count)
      let result = inflate(&stream, Z_FINISH)
      return stream.avail_out == 0 && (result == Z_STREAM_END || result == Z_BUF_ERROR)
    case .zstd:
      guard let stream = ZSTD_createDStream() else { return false }
      defer { ZSTD_freeDStream(stream) }
      var output = ZSTD_outBuffer(dst: target.baseAddress, size: target.count, pos: 0)
      var input = ZSTD_inBuffer(src: source.baseAddress, size: source.count, pos: 0)
      while output.pos < output.size {
        let before = (output.pos, input.pos)
        let result = ZSTD_decompressStream(stream, &output, &input)
        if ZSTD_isError(result) != 0 || (output.pos, input.pos) == before { return false }
      }
      return true
    }
  }
}

/// The cluster that was decompressed last: guests read compressed clusters a few sectors at a time.
struct DecompressedCluster {
  var entry: UInt64 = 0
  var buffer: DiskBuffer?
}
