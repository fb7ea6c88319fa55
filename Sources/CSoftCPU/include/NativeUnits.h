// The host's own execution units: a routine an instruction that loads operands from memory, executes the very
// instruction and stores the result (NativeUnits.generated.S; scripts/native_units.py says what each one does).
#ifndef NATIVE_UNITS_H
#define NATIVE_UNITS_H

#include <stdint.h>

// Two forms: for 128 bits and x87, and for 256 bits.
typedef struct {
  // The code, relative to soft_units; 0: there is no such form.
  int32_t code[2];
  // From one value of the immediate to the next.
  uint16_t stride[2];
  // The bits of the immediate that matter.
  uint8_t mask[2];
  uint16_t flags;
} soft_unit;

enum {
  // Obeys MXCSR and sets its flags.
  SOFT_UNIT_MXCSR = 1,
  // The result is a general register's.
  SOFT_UNIT_RAX = 2,
  // The result is RFLAGS' status flags; the first operand is a source.
  SOFT_UNIT_STATUS = 4,
  // Legacy memory operands need no alignment.
  SOFT_UNIT_UNALIGNED = 8,
  // There is a form for 32-bit and one for 64-bit general registers.
  SOFT_UNIT_WIDE = 16,
  // The 256-bit form is AVX2's.
  SOFT_UNIT_AVX2 = 32,
  // PCMPxSTRx: RAX and RDX are sources; the results are flags (low half) and ECX (high half), or XMM0.
  SOFT_UNIT_STRING = 64,
  // The last source is a general register or an integer in memory.
  SOFT_UNIT_GENERAL = 128,
};

extern const soft_unit soft_units[];

typedef uint64_t (*soft_unit_code)(
    void *_Nonnull, const void *_Nonnull, const void *_Nonnull, const void *_Nonnull, uint64_t, uint64_t);

// The unit of an operation of the opcode table.
static inline const soft_unit *_Nonnull soft_unit_of(long operation) { return &soft_units[operation]; }

static inline soft_unit_code _Nonnull soft_unit_entry(const soft_unit *_Nonnull unit, long form, long variant) {
  return (soft_unit_code)((const char *)soft_units + unit->code[form] +
                          unit->stride[form] * (variant & unit->mask[form]));
}

// A unit's code as a number, and running it on two sources: what fast operations do.
static inline uint64_t soft_unit_address(const soft_unit *_Nonnull unit, long form, long variant) {
  return (uint64_t)soft_unit_entry(unit, form, variant);
}
static inline uint64_t soft_run_at(uint64_t code, void *_Nonnull result, const void *_Nonnull a, const void *_Nonnull b) {
  return ((soft_unit_code)code)(result, a, b, a, 0, 0);
}

// Runs a unit that knows nothing of MXCSR.
static inline uint64_t soft_run(
    soft_unit_code _Nonnull code, void *_Nonnull result, const void *_Nonnull a, const void *_Nonnull b,
    const void *_Nonnull c, uint64_t value, uint64_t value2) {
  return code(result, a, b, c, value, value2);
}

// Runs a unit under an MXCSR, which comes back with its flags.
static inline uint64_t soft_run_mxcsr(
    soft_unit_code _Nonnull code, void *_Nonnull result, const void *_Nonnull a, const void *_Nonnull b,
    const void *_Nonnull c, uint64_t value, uint32_t *_Nonnull mxcsr) {
  uint32_t host = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(*mxcsr);
  uint64_t rax = code(result, a, b, c, value, 0);
  *mxcsr = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(host);
  return rax;
}

// The same where MXCSR masks not all exceptions. One that it does not mask is the host's own: the flags come back as the
// processor left them, the result is to be thrown away, and `*trapped` is 1.
uint64_t soft_run_unmasked(
    soft_unit_code _Nonnull code, void *_Nonnull result, const void *_Nonnull a, const void *_Nonnull b,
    const void *_Nonnull c, uint64_t value, uint32_t *_Nonnull mxcsr, uint32_t *_Nonnull trapped);

// The instruction sets that the host can execute, as bits of these numbers.
enum {
  SOFT_HOST_SSE3,
  SOFT_HOST_SSSE3,
  SOFT_HOST_SSE41,
  SOFT_HOST_SSE42,
  SOFT_HOST_AES,
  SOFT_HOST_PCLMULQDQ,
  SOFT_HOST_SHA,
  SOFT_HOST_AVX,
  SOFT_HOST_AVX2,
  SOFT_HOST_FMA,
  SOFT_HOST_F16C,
};
uint32_t soft_host_units(void);

#endif
