// The loader's interface, its hypercalls, and accesses that may be refused.
#pragma once
#include <stdint.h>

#define LOADER_INLINE static inline __attribute__((always_inline))

// Eight bytes at a time: where a page may not be executed, KVM makes an exit of each access.
LOADER_INLINE void copy_words(uint64_t to, uint64_t from, uint64_t count) {
  uint64_t words = count / 8, rest = count % 8;
  __asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(words)::"memory");
  __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(rest)::"memory");
}

// swiftvmm's hypercalls (docs/hardening.md): a read of four bytes; negative for an error, and for nobody there.
#define HARDEN_VERSION 0u
#define HARDEN_REGISTER 1u
#define HARDEN_ENTRY 2u
#define HARDEN_EXIT 3u
#define HARDEN_LOCK 4u
#define HARDEN_SET 5u
#define HARDEN_QUERY 6u
#define HARDEN_VERIFY 7u
#define HARDEN_NOTE 8u
LOADER_INLINE int32_t harden_call(uint32_t function, uint64_t rsi, uint64_t rbx, uint64_t rcx, uint64_t r8) {
  uint32_t result;
  register uint64_t fourth __asm__("r8") = r8;
  __asm__ volatile("inl %%dx, %%eax"
                   : "=a"(result) : "d"((uint16_t)0x560), "D"(function), "S"(rsi), "b"(rbx), "c"(rcx), "r"(fourth) : "memory");
  return (int32_t)result;
}

// What loader_call does (loader.c). LOADER_SETUP is refused after the first time.
#define LOADER_SETUP 0ull
#define LOADER_LOAD 1ull
#define LOADER_UNLOAD 2ull
#define LOADER_SIGN 3ull
#define LOADER_WAIT 4ull
// From the kernel: through the one exit that is registered.
uint64_t loader_call(uint64_t operation, uint64_t a, uint64_t b, uint64_t c);
// The loader's own: registered entry point; and what only an attacker wants to reach.
extern uint8_t loader_entry[], loader_poke[], loader_exit[], loader_start[], loader_data[], loader_end[];
LOADER_INLINE uint64_t loader_entry_address(void) { return (uint64_t)loader_entry; }
LOADER_INLINE uint64_t loader_call_address(void) { return (uint64_t)loader_call; }
LOADER_INLINE uint64_t loader_poke_address(void) { return (uint64_t)loader_poke; }
LOADER_INLINE uint64_t loader_exit_address(void) { return (uint64_t)loader_exit; }
LOADER_INLINE uint64_t loader_start_address(void) { return (uint64_t)loader_start; }
LOADER_INLINE uint64_t loader_data_address(void) { return (uint64_t)loader_data; }
LOADER_INLINE uint64_t loader_end_address(void) { return (uint64_t)loader_end; }

// Accesses that a #GP may end; 1 where they went through.
uint64_t try_store64(uint64_t address, uint64_t value);
uint64_t try_load64(uint64_t address);
// Calls address(a, b); the result, or ~0 where a #GP ended it. On the boot processor.
uint64_t try_call(uint64_t address, uint64_t a, uint64_t b);
uint64_t try_write_cr0(uint64_t value);
uint64_t try_lidt(uint64_t address);
// For the handler of #GP: where to go on from rip; 0 where that is no such access.
uint64_t try_recovery(uint64_t rip);
extern volatile uint64_t try_call_stack;
extern uint8_t try_call_failed[];
LOADER_INLINE uint64_t call_stack(void) { return try_call_stack; }
LOADER_INLINE uint64_t call_failed_address(void) { return (uint64_t)try_call_failed; }

// What attacks are about: returns 1.
extern uint8_t victim[];
LOADER_INLINE uint64_t victim_address(void) { return (uint64_t)victim; }
LOADER_INLINE uint64_t call_function(uint64_t address, uint64_t argument) { return ((uint64_t (*)(uint64_t))address)(argument); }
// A vector's own stack: IST1 of the boot processor (SDM vol. 3, 7.7).
LOADER_INLINE void set_interrupt_stack(uint64_t top, uint8_t vector) {
  extern uint8_t guest_tss[];
  uint8_t table[16] __attribute__((aligned(16)));
  __asm__ volatile("sidt 6(%0)" ::"r"(table) : "memory");
  *(volatile uint32_t *)(guest_tss + 0x24) = (uint32_t)top;
  *(volatile uint32_t *)(guest_tss + 0x28) = (uint32_t)(top >> 32);
  *(volatile uint8_t *)(*(uint64_t *)(table + 8) + vector * 16 + 4) = 1;
}
LOADER_INLINE void set_idt_probe(uint64_t at) { __asm__ volatile("sidt (%0)" ::"r"(at) : "memory"); }
