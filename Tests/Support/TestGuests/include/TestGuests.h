// Guest code for the tests of accelerators, assembled for the guest and carried as data.
#pragma once
#include <stdint.h>

/// First byte of the guest called `name`, and its size; null where there is none.
const uint8_t *test_guest(const char *name, long *size);

/// Whether the processor that this program runs on has AVX2.
int test_processor_has_avx2(void);
