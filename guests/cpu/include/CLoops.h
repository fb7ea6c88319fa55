// The loops of loops.S, the memory they need, and how many instructions each executes, from its first to its `ret`; a
// repeated string instruction counts once.
#pragma once
#include <stdint.h>

#define LOOP_INLINE static inline __attribute__((always_inline))

// iterations > 0. Returns a checksum.
uint64_t loop_alu(uint64_t iterations);
LOOP_INLINE uint64_t loop_alu_instructions(uint64_t iterations) { return 10 * iterations + 9; }

// Returns Fibonacci's number n, modulo 2^32.
uint32_t loop_calls(uint32_t n);
LOOP_INLINE uint64_t loop_calls_instructions(uint32_t n) {
  uint64_t previous = 4, current = 4;
  for (uint32_t i = 2; i <= n; i++) {
    const uint64_t next = 13 + current + previous;
    previous = current;
    current = next;
  }
  return current;
}

// iterations > 0. Returns a checksum.
uint64_t loop_branchy(uint64_t iterations);
LOOP_INLINE uint64_t loop_branchy_instructions(uint64_t iterations) { return 15 * iterations + 5; }

// loads: a multiple of 8, > 0. Returns the address after as many steps: `address` again after one round of the whole table.
uint64_t loop_chase(uint64_t address, uint64_t loads_by_8);
LOOP_INLINE uint64_t loop_chase_instructions(uint64_t loads_by_8) { return 10 * loads_by_8 + 3; }
// A table of 2^order lines of 64 bytes whose first words lead from line to line, through all of them, in no order that a
// prefetcher knows: a linear congruential generator of full period.
LOOP_INLINE void loop_chase_prepare(uint64_t table, uint32_t order) {
  const uint64_t lines = 1ull << order;
  for (uint64_t line = 0; line < lines; line++) {
    const uint64_t next = (line * 1664525 + 1013904223) & (lines - 1);
    *(volatile uint64_t *)(table + line * 64) = table + next * 64;
  }
}

// blocks > 0.
void loop_copy(uint64_t to, uint64_t from, uint64_t blocks_of_32_bytes);
LOOP_INLINE uint64_t loop_copy_instructions(uint64_t blocks) { return 12 * blocks + 2; }

void loop_rep_movsq(uint64_t to, uint64_t from, uint64_t words);
LOOP_INLINE uint64_t loop_rep_movsq_instructions(void) { return 3; }

// iterations > 0; both roots map the code, the stack and 64 pages from `address`.
uint64_t loop_cr3(uint64_t root, uint64_t other_root, uint64_t iterations, uint64_t address);
LOOP_INLINE uint64_t loop_cr3_instructions(uint64_t iterations) { return 262 * iterations + 3; }
