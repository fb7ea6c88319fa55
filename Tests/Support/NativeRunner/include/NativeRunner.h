// Executes one instruction on the physical CPU, with all its registers given and taken: the oracle of the software CPU.
#ifndef NATIVE_RUNNER_H
#define NATIVE_RUNNER_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
  // rax, rcx, rdx, rbx, (rsp: not used), rbp, rsi, rdi, r8 to r15.
  uint64_t general[16];
  uint64_t flags;
  uint64_t padding[7];
  // Of XSAVE's standard format: x87, SSE and, where the host has it, AVX.
  uint8_t area[1024];
} native_state;

static inline uint64_t *_Nonnull native_general(native_state *_Nonnull state) { return state->general; }
static inline uint8_t *_Nonnull native_area(native_state *_Nonnull state) { return state->area; }

// The state components that the host can exchange: 7 with AVX, 3 without, 0 where there is no XSAVE.
uint32_t native_components(void);

// Executes the instruction on a state that is aligned to 64 bytes; returns the vector of the exception that it raised, or -1. The state is what it was before
// a fault then. The instruction must not branch or change rsp.
int native_run(native_state *_Nonnull state, const uint8_t *_Nonnull bytes, size_t length);

#endif
