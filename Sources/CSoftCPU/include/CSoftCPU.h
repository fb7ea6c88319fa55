// The state of a software CPU, in C: emitted code and assembly stubs touch it as well as Swift.
#ifndef CSOFTCPU_H
#define CSOFTCPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// A segment register with its hidden part (Intel SDM, volume 3, section 3.4.3).
typedef struct {
  uint64_t base;
  // In bytes, the granularity counted in.
  uint32_t limit;
  uint16_t selector;
  // As VCPUState's SegmentRegister: bits 0-3 type, 4 S, 5-6 DPL, 7 P, 8 AVL, 9 L, 10 D/B, 11 G, 12 unusable.
  uint16_t attributes;
} soft_segment;

// One translation of the software TLB. A tag is a page's linear address with the context's number in its low 12 bits;
// 0 is no address that a context has, so it means "none".
typedef struct {
  uint64_t read_tag;
  // Set only where a write needs nothing but the store: the page is writable, dirty, RAM, and holds no decoded code.
  uint64_t write_tag;
  // Added to a linear address: the host's address.
  uint64_t addend;
  // The guest-physical address of the page.
  uint64_t physical;
} soft_tlb_entry;

enum {
  SOFT_TLB_BITS = 10,
  SOFT_TLB_ENTRIES = 1 << SOFT_TLB_BITS,
  // The general register that is always 0: an absent base or index.
  SOFT_ZERO_REGISTER = 16,
  // Forget every translation.
  SOFT_REQUEST_FLUSH = 1,
  // Forget code whose pages are in the processor's list.
  SOFT_REQUEST_CODE = 2,
  // The segment whose base is always 0.
  SOFT_FLAT_SEGMENT = 6,
};

typedef struct {
  // What every instruction touches.
  uint64_t general[17];
  uint64_t rip;
  // The status flags, lazily: ZF = flag_result is 0; SF and PF = sign and low byte of flag_result ^ flag_delta;
  // CF = bit 63, OF = bit 63 ^ bit 62, AF = bit 3 of flag_carries.
  int64_t flag_result;
  uint64_t flag_carries;
  uint64_t flag_delta;
  // RFLAGS without the status flags.
  uint64_t other_flags;
  // Low 12 bits of the tags of data accesses as the current mode makes them.
  uint64_t data_context;
  soft_tlb_entry *_Nonnull tlb;
  // The number of retired instructions at which the run loop looks around.
  int64_t budget;
  // Negative when another thread wants the run loop to look around; atomic.
  int64_t attention;
  // What other CPUs and the VMM ask of this one (SOFT_REQUEST_*), and whether it is executing; both atomic.
  uint64_t requests;
  uint64_t inside;
  // Retired instructions, without those of the block under way.
  uint64_t instructions;
  // Those, while an operation of the block executes the slow way and may look at the time; else 0.
  uint64_t position;
  // Virtual time when the count was 0, as of when this CPU last began to run.
  uint64_t time_base;
  // es, cs, ss, ds, fs, gs, flat, then ldtr and tr.
  soft_segment segment[9];

  // Control and system registers.
  uint64_t cr0, cr2, cr3, cr4, cr8, efer, xcr0, xss;
  uint64_t gdt_base, idt_base;
  uint16_t gdt_limit, idt_limit;
  uint8_t cpl;
  // The mode that instructions are decoded for: 0 16-bit, 1 32-bit, 2 64-bit.
  uint8_t code_mode;
  // Bit 0: blocking by STI; bit 1: by MOV SS. Cleared at the end of the next instruction.
  uint8_t interrupt_shadow;
  bool nmi_masked;
  uint64_t dr[8];
  uint64_t pdpte[4];
  uint64_t tsc_offset, tsc_adjust, tsc_aux, tsc_deadline;
  uint64_t star, lstar, cstar, fmask, kernel_gs_base;
  uint64_t sysenter_cs, sysenter_esp, sysenter_eip;
  uint64_t pat, mtrr_default, misc_enable, apic_base, spec_ctrl, debug_ctl;
  uint64_t mtrr_variable[16], mtrr_fixed[11];
  uint32_t pkru;

  // x87, MMX, SSE and AVX. st[] are the physical registers R0-R7 (80 bits in 16 bytes); the top is in fpu_status.
  uint32_t mxcsr;
  uint16_t fpu_control, fpu_status;
  // A bit a physical register: 1 not empty (FXSAVE's abridged tag word).
  uint8_t fpu_valid;
  uint16_t fpu_opcode, fpu_code_segment, fpu_data_segment;
  uint64_t fpu_instruction, fpu_data;
  __attribute__((aligned(16))) uint8_t st[8][16];
  __attribute__((aligned(16))) uint8_t vector[16][32];
  // Of the instruction under way: a vector from memory, a result not yet committed, an FXSAVE or XSAVE area.
  __attribute__((aligned(16))) uint8_t operand[32], result[32];
  __attribute__((aligned(16))) uint8_t area[1024];
} soft_cpu;

_Static_assert(offsetof(soft_cpu, general) == 0, "FastState takes the state's address for the registers'");

static inline uint64_t *_Nonnull soft_general(soft_cpu *_Nonnull cpu) { return cpu->general; }
static inline soft_segment *_Nonnull soft_segments(soft_cpu *_Nonnull cpu) { return cpu->segment; }
static inline uint64_t *_Nonnull soft_debug(soft_cpu *_Nonnull cpu) { return cpu->dr; }
static inline uint64_t *_Nonnull soft_pdptes(soft_cpu *_Nonnull cpu) { return cpu->pdpte; }
static inline uint64_t *_Nonnull soft_mtrr_variable(soft_cpu *_Nonnull cpu) { return cpu->mtrr_variable; }
static inline uint64_t *_Nonnull soft_mtrr_fixed(soft_cpu *_Nonnull cpu) { return cpu->mtrr_fixed; }
// The 16 bytes of physical register `index` (0 to 7).
static inline void *_Nonnull soft_st(soft_cpu *_Nonnull cpu, long index) { return cpu->st[index & 7]; }
// The 32 bytes of vector register `index` (0 to 15).
static inline void *_Nonnull soft_vector(soft_cpu *_Nonnull cpu, long index) { return cpu->vector[index & 15]; }

// Integers of host memory at any alignment: Swift's own unaligned loads are calls.
#define SOFT_ACCESS(bits)                                                                                              \
  static inline uint##bits##_t soft_get##bits(const void *_Nonnull p) {                                                \
    uint##bits##_t value;                                                                                              \
    __builtin_memcpy(&value, p, sizeof value);                                                                         \
    return value;                                                                                                      \
  }                                                                                                                    \
  static inline void soft_put##bits(void *_Nonnull p, uint##bits##_t value) { __builtin_memcpy(p, &value, sizeof value); }
SOFT_ACCESS(8)
SOFT_ACCESS(16)
SOFT_ACCESS(32)
SOFT_ACCESS(64)
static inline void *_Nonnull soft_operand(soft_cpu *_Nonnull cpu) { return cpu->operand; }
static inline void *_Nonnull soft_result(soft_cpu *_Nonnull cpu) { return cpu->result; }
static inline void *_Nonnull soft_area(soft_cpu *_Nonnull cpu) { return cpu->area; }

// Virtual time: the instructions of the CPU that runs, on top of what was before; another's begin where its end.
typedef struct {
  soft_cpu *_Nullable running;
} soft_time;

// The host's own time-stamp counter.
static inline uint64_t soft_host_counter(void) { return __builtin_ia32_rdtsc(); }

// Nanoseconds; exact on the thread that runs the CPU, recent on others.
static inline uint64_t soft_now(const soft_time *_Nonnull time) {
  soft_cpu *cpu = __atomic_load_n(&time->running, __ATOMIC_ACQUIRE);
  if (!cpu) return 0;
  return __atomic_load_n(&cpu->time_base, __ATOMIC_RELAXED) + __atomic_load_n(&cpu->instructions, __ATOMIC_RELAXED) +
         __atomic_load_n(&cpu->position, __ATOMIC_RELAXED);
}

// Makes `cpu` the one that runs, at a time of the caller's choice.
static inline void soft_time_run(soft_time *_Nonnull time, soft_cpu *_Nonnull cpu, uint64_t now) {
  __atomic_store_n(&cpu->time_base, now - cpu->instructions - cpu->position, __ATOMIC_RELAXED);
  __atomic_store_n(&time->running, cpu, __ATOMIC_RELEASE);
}

static inline int64_t soft_attention(soft_cpu *_Nonnull cpu) { return __atomic_load_n(&cpu->attention, __ATOMIC_RELAXED); }
static inline void soft_set_attention(soft_cpu *_Nonnull cpu, int64_t value) {
  __atomic_store_n(&cpu->attention, value, __ATOMIC_SEQ_CST);
}

// Compare-and-swap of guest memory that other vCPUs change: true where `*expected` was there and `desired` is now;
// else `*expected` is what was found. Any alignment within what the host's LOCK allows.
#define SOFT_CAS(bits)                                                                                                \
  static inline bool soft_cas##bits(void *_Nonnull p, uint##bits##_t *_Nonnull expected, uint##bits##_t desired) {     \
    uint##bits##_t old = *expected, found;                                                                            \
    __asm__ volatile("lock cmpxchg %3, %1" : "=a"(found), "+m"(*(uint##bits##_t *)p) : "0"(old), "r"(desired) : "memory", "cc"); \
    *expected = found;                                                                                                \
    return found == old;                                                                                              \
  }
SOFT_CAS(8)
SOFT_CAS(16)
SOFT_CAS(32)
SOFT_CAS(64)

// The same for 16 aligned bytes, low half first.
static inline bool soft_cas128(void *_Nonnull p, uint64_t *_Nonnull expected, uint64_t low, uint64_t high) {
  bool same;
  __asm__ volatile("lock cmpxchg16b %1" : "=@ccz"(same), "+m"(*(unsigned __int128 *)p), "+a"(expected[0]), "+d"(expected[1])
                   : "b"(low), "c"(high) : "memory");
  return same;
}

// A copy as REP MOVS makes it, low addresses first, at the processor's own speed; the runs do not overlap or the
// destination is below the source.
static inline void soft_copy(void *_Nonnull destination, const void *_Nonnull source, size_t count) {
  __asm__ volatile("rep movsb" : "+D"(destination), "+S"(source), "+c"(count) : : "memory");
}

// Vectors, to and from any address.
static inline void soft_copy16(void *_Nonnull destination, const void *_Nonnull source) {
  __builtin_memcpy(destination, source, 16);
}
static inline void soft_copy32(void *_Nonnull destination, const void *_Nonnull source) {
  __builtin_memcpy(destination, source, 32);
}

static inline uint64_t soft_load(const uint64_t *_Nonnull p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline void soft_store(uint64_t *_Nonnull p, uint64_t value) { __atomic_store_n(p, value, __ATOMIC_SEQ_CST); }
static inline uint64_t soft_exchange(uint64_t *_Nonnull p, uint64_t value) {
  return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);
}
static inline uint64_t soft_or(uint64_t *_Nonnull p, uint64_t bits) { return __atomic_fetch_or(p, bits, __ATOMIC_SEQ_CST); }
static inline uint64_t soft_and(uint64_t *_Nonnull p, uint64_t bits) { return __atomic_fetch_and(p, bits, __ATOMIC_SEQ_CST); }

static inline uint64_t *_Nonnull soft_requests(soft_cpu *_Nonnull cpu) { return &cpu->requests; }
static inline uint64_t *_Nonnull soft_instructions(soft_cpu *_Nonnull cpu) { return &cpu->instructions; }
static inline uint64_t *_Nonnull soft_inside(soft_cpu *_Nonnull cpu) { return &cpu->inside; }

static inline uint64_t soft_host_tsc(void) { return __builtin_ia32_rdtsc(); }

#include "NativeUnits.h"

#endif
