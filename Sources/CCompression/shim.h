#include <zlib.h>
#include <zstd.h>

// A macro of zlib that does not import.
static inline int ccompression_deflate_init(z_stream *stream, int level, int window_bits) {
  return deflateInit2(stream, level, Z_DEFLATED, window_bits, 9, Z_DEFAULT_STRATEGY);
}
static inline int ccompression_inflate_init(z_stream *stream, int window_bits) {
  return inflateInit2(stream, window_bits);
}
