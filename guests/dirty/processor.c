// What each processor needs to run ring-3 code of its own: GuestKit's `User` serves one.
#include "CDirty.h"
#include "CGuest.h"

struct __attribute__((packed)) pointer { uint16_t limit; uint64_t base; };

static const uint64_t tss_offset = 64;

void dirty_load_tables(uint64_t block) {
  uint64_t tss = block + tss_offset;
  fill64(block, 0, 32);
  store64(block + 0x08, 0x00af9b000000ffff);  // kernel code
  store64(block + 0x10, 0x00cf93000000ffff);  // kernel data
  store64(block + 0x20, 0x00cff3000000ffff);  // user data
  store64(block + 0x28, 0x00affb000000ffff);  // user code
  store64(block + 0x30, 103 | (tss & 0xffffff) << 16 | (uint64_t)0x89 << 40 | (tss >> 24 & 0xff) << 56);
  store64(block + 0x38, tss >> 32);
  store16(tss + 102, 104);
  struct pointer gdt = {63, block};
  __asm__ volatile("lgdt %0" ::"m"(gdt) : "memory");
  __asm__ volatile("ltr %w0" ::"r"(0x30) : "memory");
}

// The frame lies on top of the stack that dirty_enter_user left.
void dirty_end_user(struct interrupt_frame *frame) {
  frame->rip = user_resume_address();
  frame->cs = 0x08;
  frame->rflags = 2;
  frame->rsp = (uint64_t)(frame + 1);
  frame->ss = 0x10;
}
