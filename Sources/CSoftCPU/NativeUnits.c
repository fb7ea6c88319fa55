#include "CSoftCPU.h"

#include <cpuid.h>

uint32_t soft_host_units(void) {
  uint32_t a, b, c, d, units = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  units |= (c & 1) << SOFT_HOST_SSE3 | (c >> 9 & 1) << SOFT_HOST_SSSE3 | (c >> 19 & 1) << SOFT_HOST_SSE41 |
           (c >> 20 & 1) << SOFT_HOST_SSE42 | (c >> 25 & 1) << SOFT_HOST_AES | (c >> 1 & 1) << SOFT_HOST_PCLMULQDQ;
  // AVX needs the host's operating system to keep the upper halves.
  uint32_t low = 0, high;
  if (c >> 27 & 1) __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  uint32_t keeps = (low & 6) == 6;
  units |= (keeps & c >> 28) << SOFT_HOST_AVX | (keeps & c >> 12) << SOFT_HOST_FMA | (keeps & c >> 29) << SOFT_HOST_F16C;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return units;
  return units | (b >> 29 & 1) << SOFT_HOST_SHA | (keeps & b >> 5) << SOFT_HOST_AVX2;
}
