// The instructions Swift has no words for, and the few symbols Swift shares with entry.S.
#pragma once
#include <stddef.h>
#include <stdint.h>

#pragma clang assume_nonnull begin

#define GUEST_INLINE static inline __attribute__((always_inline))

// Port I/O.
GUEST_INLINE void outb(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port) : "memory"); }
GUEST_INLINE void outw(uint16_t port, uint16_t value) { __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port) : "memory"); }
GUEST_INLINE void outl(uint16_t port, uint32_t value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port) : "memory"); }
GUEST_INLINE uint8_t inb(uint16_t port) { uint8_t v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port) : "memory"); return v; }
GUEST_INLINE uint16_t inw(uint16_t port) { uint16_t v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port) : "memory"); return v; }
GUEST_INLINE uint32_t inl(uint16_t port) { uint32_t v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port) : "memory"); return v; }
// One instruction a byte matters where ring 0 is emulated.
GUEST_INLINE void outsb(uint16_t port, const void *from, size_t count) { __asm__ volatile("rep outsb" : "+S"(from), "+c"(count) : "d"(port) : "memory"); }

// Physical memory and memory-mapped registers: one access of exactly this width, in a form that every emulator knows.
GUEST_INLINE uint8_t load8(uint64_t a) { uint8_t v; __asm__ volatile("movb %1, %0" : "=q"(v) : "m"(*(volatile uint8_t *)a) : "memory"); return v; }
GUEST_INLINE uint16_t load16(uint64_t a) { uint16_t v; __asm__ volatile("movw %1, %0" : "=r"(v) : "m"(*(volatile uint16_t *)a) : "memory"); return v; }
GUEST_INLINE uint32_t load32(uint64_t a) { uint32_t v; __asm__ volatile("movl %1, %0" : "=r"(v) : "m"(*(volatile uint32_t *)a) : "memory"); return v; }
GUEST_INLINE uint64_t load64(uint64_t a) { uint64_t v; __asm__ volatile("movq %1, %0" : "=r"(v) : "m"(*(volatile uint64_t *)a) : "memory"); return v; }
GUEST_INLINE void store8(uint64_t a, uint8_t v) { __asm__ volatile("movb %1, %0" : "=m"(*(volatile uint8_t *)a) : "q"(v) : "memory"); }
GUEST_INLINE void store16(uint64_t a, uint16_t v) { __asm__ volatile("movw %1, %0" : "=m"(*(volatile uint16_t *)a) : "r"(v) : "memory"); }
GUEST_INLINE void store32(uint64_t a, uint32_t v) { __asm__ volatile("movl %1, %0" : "=m"(*(volatile uint32_t *)a) : "r"(v) : "memory"); }
GUEST_INLINE void store64(uint64_t a, uint64_t v) { __asm__ volatile("movq %1, %0" : "=m"(*(volatile uint64_t *)a) : "r"(v) : "memory"); }

// Processor state.
struct cpuid_result { uint32_t eax, ebx, ecx, edx; };
GUEST_INLINE struct cpuid_result cpuid(uint32_t leaf, uint32_t subleaf) {
  struct cpuid_result r;
  __asm__ volatile("cpuid" : "=a"(r.eax), "=b"(r.ebx), "=c"(r.ecx), "=d"(r.edx) : "a"(leaf), "c"(subleaf));
  return r;
}
GUEST_INLINE uint64_t rdmsr(uint32_t msr) { uint32_t lo, hi; __asm__ volatile("rdmsr" : "=a"(lo), "=d"(hi) : "c"(msr) : "memory"); return (uint64_t)hi << 32 | lo; }
GUEST_INLINE void wrmsr(uint32_t msr, uint64_t v) { __asm__ volatile("wrmsr" ::"c"(msr), "a"((uint32_t)v), "d"((uint32_t)(v >> 32)) : "memory"); }
GUEST_INLINE uint64_t rdtsc(void) { uint32_t lo, hi; __asm__ volatile("rdtsc" : "=a"(lo), "=d"(hi)::"memory"); return (uint64_t)hi << 32 | lo; }
GUEST_INLINE uint64_t read_cr0(void) { uint64_t v; __asm__ volatile("movq %%cr0, %0" : "=r"(v)::"memory"); return v; }
GUEST_INLINE uint64_t read_cr2(void) { uint64_t v; __asm__ volatile("movq %%cr2, %0" : "=r"(v)::"memory"); return v; }
GUEST_INLINE uint64_t read_cr3(void) { uint64_t v; __asm__ volatile("movq %%cr3, %0" : "=r"(v)::"memory"); return v; }
GUEST_INLINE uint64_t read_cr4(void) { uint64_t v; __asm__ volatile("movq %%cr4, %0" : "=r"(v)::"memory"); return v; }
GUEST_INLINE void write_cr0(uint64_t v) { __asm__ volatile("movq %0, %%cr0" ::"r"(v) : "memory"); }
GUEST_INLINE void write_cr3(uint64_t v) { __asm__ volatile("movq %0, %%cr3" ::"r"(v) : "memory"); }
GUEST_INLINE void write_cr4(uint64_t v) { __asm__ volatile("movq %0, %%cr4" ::"r"(v) : "memory"); }
GUEST_INLINE void xsetbv(uint32_t r, uint64_t v) { __asm__ volatile("xsetbv" ::"c"(r), "a"((uint32_t)v), "d"((uint32_t)(v >> 32)) : "memory"); }
GUEST_INLINE void invlpg(uint64_t a) { __asm__ volatile("invlpg (%0)" ::"r"(a) : "memory"); }
GUEST_INLINE void nop(void) { __asm__ volatile("nop"); }
GUEST_INLINE void cli(void) { __asm__ volatile("cli" ::: "memory"); }
GUEST_INLINE void sti(void) { __asm__ volatile("sti" ::: "memory"); }
GUEST_INLINE void hlt(void) { __asm__ volatile("hlt" ::: "memory"); }
// sti holds interrupts off until hlt has begun, so a wake-up cannot slip in between.
GUEST_INLINE void sti_hlt_cli(void) { __asm__ volatile("sti; hlt; cli" ::: "memory"); }
GUEST_INLINE void cpu_pause(void) { __asm__ volatile("pause" ::: "memory"); }
// Orders stores before it with loads after it; emulators that know no SSE lack mfence.
GUEST_INLINE void full_fence(void) { __asm__ volatile("lock addl $0, (%%rsp)" ::: "cc", "memory"); }
GUEST_INLINE uint16_t read_tr(void) { uint16_t v; __asm__ volatile("str %0" : "=r"(v)); return v; }

// Fills memory with 64-bit words by one string instruction.
GUEST_INLINE void fill64(uint64_t a, uint64_t v, uint64_t count) { __asm__ volatile("rep stosq" : "+D"(a), "+c"(count) : "a"(v) : "memory"); }

// True when every one of count 64-bit words is v; count is not zero.
GUEST_INLINE uint8_t all_words64(uint64_t a, uint64_t v, uint64_t count) { uint8_t equal; __asm__ volatile("repe scasq; sete %2" : "+D"(a), "+c"(count), "=q"(equal) : "a"(v) : "cc", "memory"); return equal; }

// True when count 64-bit words are the same at both places; count is not zero.
GUEST_INLINE uint8_t equal_words64(uint64_t a, uint64_t b, uint64_t count) { uint8_t equal; __asm__ volatile("repe cmpsq; sete %2" : "+S"(a), "+D"(b), "=q"(equal), "+c"(count) :: "cc", "memory"); return equal; }

GUEST_INLINE void copy_words64(uint64_t to, uint64_t from, uint64_t count) { __asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(count)::"memory"); }

GUEST_INLINE void copy_bytes(void *to, const void *from, size_t count) { __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count)::"memory"); }

// What the interrupt stubs of entry.S push.
struct interrupt_frame {
  uint64_t r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
  uint64_t vector, error;
  uint64_t rip, cs, rflags, rsp, ss;
};
typedef void (*interrupt_handler)(struct interrupt_frame *);

// Symbols of entry.S, runtime.S and guest.ld, through functions: Swift imports no arrays and trusts no global of C's.
extern interrupt_handler _Nullable guest_handlers[256];
extern uint8_t guest_image_end[], guest_page_tables[], guest_tss[], guest_trampoline[], guest_trampoline_end[];
extern uint64_t guest_start_info, guest_ap_stack;
GUEST_INLINE void set_interrupt_handler(uint8_t vector, interrupt_handler handler) { guest_handlers[vector] = handler; }
GUEST_INLINE uint64_t start_info_address(void) { return guest_start_info; }
GUEST_INLINE uint64_t image_end_address(void) { return (uint64_t)guest_image_end; }
GUEST_INLINE uint64_t page_tables_address(void) { return (uint64_t)guest_page_tables; }
GUEST_INLINE uint64_t trampoline_address(void) { return (uint64_t)guest_trampoline; }
GUEST_INLINE uint64_t trampoline_size(void) { return (uint64_t)(guest_trampoline_end - guest_trampoline); }
GUEST_INLINE void set_ap_stack(uint64_t stack) { *(volatile uint64_t *)&guest_ap_stack = stack; }

// Memory that nobody gives back (runtime.S): zero on a machine that has just started.
uint64_t guest_allocate(uint64_t size, uint64_t alignment);

// Runs body(argument); an exception inside ends it early. See guest_catch in entry.S and Interrupts.swift.
void guest_catch(void (* body)(uint64_t), uint64_t argument);
extern volatile uint64_t guest_catch_stack;
extern uint8_t guest_catch_resume[];
GUEST_INLINE uint64_t catch_stack(void) { return guest_catch_stack; }
GUEST_INLINE uint64_t catch_resume_address(void) { return (uint64_t)guest_catch_resume; }

// Runs ring-3 code at rip with RDI = argument until a handler calls User.leave (user.S, User.swift).
void guest_enter_user(uint64_t rip, uint64_t stack, uint64_t argument);
extern volatile uint64_t guest_user_stack;
extern uint8_t guest_user_resume[];
GUEST_INLINE uint64_t user_stack(void) { return guest_user_stack; }
GUEST_INLINE uint64_t user_resume_address(void) { return (uint64_t)guest_user_resume; }
// From ring 3: exception 3 is the call gate. Returns what the handler leaves in RAX.
uint64_t user_call(uint64_t number, uint64_t argument);
extern uint8_t guest_text_start[], guest_text_end[];
GUEST_INLINE uint64_t text_start_address(void) { return (uint64_t)guest_text_start; }
GUEST_INLINE uint64_t text_end_address(void) { return (uint64_t)guest_text_end; }

// Offset of the first such byte at or after `from`, or `size`. A string instruction, because each ring-0 instruction may cost a
// microsecond where ring 0 is emulated.
GUEST_INLINE uint64_t scan_byte(uint64_t base, uint64_t from, uint64_t size, uint8_t byte) {
  const uint8_t *p = (const uint8_t *)base + from;
  uint64_t left = size - from;
  uint8_t found = 0;
  if (from >= size) return size;
  __asm__ volatile("repne scasb; sete %2" : "+D"(p), "+c"(left), "=q"(found) : "a"(byte) : "cc", "memory");
  return found ? size - left - 1 : size;
}

#pragma clang assume_nonnull end
