// void dirty_enter_user(code, stack, worker, block): as GuestKit's guest_enter_user, whose other half it ends in, with the
// processor's own TSS (processor.c).
  .section .text.dirty_enter_user, "ax", @progbits
  .globl dirty_enter_user
dirty_enter_user:
  pushq %rbx
  pushq %rbp
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  movq %rsp, 64 + 4(%rcx)
  pushq $0x23
  pushq %rsi
  pushq $2
  pushq $0x2b
  pushq %rdi
  movq %rdx, %rdi
  iretq

  .section .note.GNU-stack, "", @progbits
