// Executes single instructions on the physical CPU in a child process, with all registers given and taken, whatever the
// instruction does to them: it branches, faults, or loses its stack.
//
// The child lives in the handler of its signals: each return from the handler loads the registers of a case, with TF set,
// and the trap or fault after it brings them back.
#ifndef NATIVE_PROCESS_H
#define NATIVE_PROCESS_H

#include <stdint.h>

enum {
  // Two pages of code, then none: full of HLT but for the instruction.
  NATIVE_CODE = 0x20000000,
  NATIVE_CODE_SIZE = 0x2000,
  // Two pages of data, one that can only be read, then none.
  NATIVE_DATA = 0x30000000,
  NATIVE_WRITABLE_SIZE = 0x2000,
  NATIVE_DATA_SIZE = 0x3000,
  NATIVE_CASES = 2048,
  NATIVE_FILLER = 0xf4,
};

// What user code can see of a CPU.
typedef struct {
  // As encodings number them.
  uint64_t general[16];
  uint64_t rip, flags;
  uint64_t fs_base, gs_base;
  // es, cs, ss, ds, fs, gs.
  uint16_t selector[6];
  uint16_t control, status;
  // FXSAVE's abridged tags.
  uint32_t valid;
  uint32_t mxcsr;
  uint32_t padding;
  // ST(0) to ST(7), 10 bytes each, and YMM0 to YMM15.
  uint8_t stack[8][16];
  uint8_t vectors[16][32];
} native_registers;

typedef struct {
  native_registers registers;
  uint8_t code[16];
  uint8_t length;
  // How often to go on where the instruction is its own successor: iterations of a repeated one.
  uint16_t repetitions;
} native_case;

typedef struct {
  native_registers registers;
  // The exception; 1 where the instruction completed.
  int32_t vector;
  uint32_t error;
  // CR2 of a page fault.
  uint64_t address;
  // The offsets of the first and after the last changed 8 bytes of data, and a digest of those between.
  uint32_t first, end;
  uint64_t digest;
} native_result;

typedef struct {
  // Numbers of batches: asked for, and done. Batch n is in half n & 1.
  uint32_t asked, done;
  uint32_t count[2];
  native_case cases[2][NATIVE_CASES];
  native_result results[2][NATIVE_CASES];
  // What the data is before each case.
  uint8_t data[NATIVE_DATA_SIZE];
} native_arena;

static inline native_case *_Nonnull native_cases(native_arena *_Nonnull a, long half) { return a->cases[half & 1]; }
static inline native_result *_Nonnull native_results(native_arena *_Nonnull a, long half) { return a->results[half & 1]; }
static inline uint8_t *_Nonnull native_data(native_arena *_Nonnull a) { return a->data; }
static inline uint8_t *_Nonnull native_code(native_case *_Nonnull c) { return c->code; }
static inline native_registers *_Nonnull native_before(native_case *_Nonnull c) { return &c->registers; }
static inline native_registers *_Nonnull native_after(native_result *_Nonnull r) { return &r->registers; }
static inline uint64_t *_Nonnull native_general(native_registers *_Nonnull r) { return r->general; }
static inline uint16_t *_Nonnull native_selectors(native_registers *_Nonnull r) { return r->selector; }
static inline uint8_t *_Nonnull native_stack(native_registers *_Nonnull r, long i) { return r->stack[i & 7]; }
static inline uint8_t *_Nonnull native_vector(native_registers *_Nonnull r, long i) { return r->vectors[i & 15]; }

// Starts a child; its process id goes to *pid. NULL, with the reason in *reason, where the host cannot tell.
native_arena *_Nullable native_start(int *_Nonnull pid, const char *_Nullable *_Nonnull reason);
// Hands over a batch of `count` cases, which are in half `batch` & 1; batches are numbered from 1.
void native_submit(native_arena *_Nonnull arena, uint32_t batch, uint32_t count);
// Waits for a batch; 0, or the child's wait status where it ended.
int native_await(native_arena *_Nonnull arena, int pid, uint32_t batch);
void native_stop(native_arena *_Nonnull arena, int pid);

// The changes of data against what it was; the same digest for both sides.
void native_changes(const uint8_t *_Nonnull before, const uint8_t *_Nonnull after, native_result *_Nonnull result);

#endif
