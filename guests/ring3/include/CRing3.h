// Addresses of the ring-3 code in user.S and vectors.user.c.
#pragma once
#include <stdint.h>

#define RING3(name) \
  extern const uint8_t name[]; \
  static inline __attribute__((always_inline)) uint64_t name##_address(void) { return (uint64_t)name; }

RING3(user_divide)
RING3(user_undefined)
RING3(user_read)
RING3(user_write)
RING3(user_jump)
RING3(user_halt)
RING3(user_disable_interrupts)
RING3(user_port)
RING3(user_control_register)
RING3(user_read_msr)
RING3(user_non_canonical)
RING3(user_kernel_selector)
RING3(user_registers)
RING3(user_sse)
RING3(user_avx)
RING3(user_compute)
