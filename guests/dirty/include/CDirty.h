// What the ring-3 code of the guest `dirty` is given and tells, a processor each.
#pragma once
#include <stdint.h>

#pragma clang assume_nonnull begin

// Pages that follow one another. A page is little-endian words of 64 bits: its number, its generation, a checksum of the two,
// and 509 words of a pool of random ones, from a place that the checksum says: so no page is like another or can be
// compressed, and one that is another, an older or a torn one shows.
struct dirty_area {
  uint64_t first;        // number of the first page
  uint64_t address;
  uint64_t pages;
  uint64_t generations;  // where the generation is that each page must have: 32 bits each
};

enum {
  DIRTY_SET,
  DIRTY_FILL,
  DIRTY_READ_ONLY,
  DIRTY_FREE,
  DIRTY_AREAS,
};

enum {
  DIRTY_LINEAR,
  DIRTY_RANDOM,
  DIRTY_HOT,
};

#define DIRTY_POOL_PLACES 2048
#define DIRTY_POOL_WORDS (DIRTY_POOL_PLACES + 509)

// One page for each processor.
struct dirty_worker {
  struct dirty_area area[DIRTY_AREAS];
  uint64_t pool;
  uint64_t pattern;
  uint64_t number, stride;    // its pages have the remainder `number`
  uint64_t random, cursor, check_cursor;
  uint64_t sum;               // of the checksums of its pages of the working set
  uint64_t writes, checks, reuse;  // what a round has to do: pages of the set, of any area, and of the free one
  uint64_t reused;
  uint64_t written, verified;
  uint64_t failed;            // 1: a page is wrong; 2: the sum is
  uint64_t failed_area, failed_page;
};

// In ring 3; each ends with user_call(0, 0).
void dirty_fill(struct dirty_worker *worker);
void dirty_begin(struct dirty_worker *worker);
void dirty_round(struct dirty_worker *worker);
void dirty_finish(struct dirty_worker *worker);

// Loads a GDT and a TSS of the processor's own, made in `block`, of 256 bytes.
void dirty_load_tables(uint64_t block);

// Runs ring-3 code on `stack` until it calls user_call(0, ...): dirty_end_user, as the handler of exception 3, comes back here.
void dirty_enter_user(void (*code)(struct dirty_worker *), uint64_t stack, struct dirty_worker *worker, uint64_t block);
struct interrupt_frame;
void dirty_end_user(struct interrupt_frame *frame);

#pragma clang assume_nonnull end
