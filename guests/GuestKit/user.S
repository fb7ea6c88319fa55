// Into ring 3 and back.

  .bss
  .balign 8
  .globl guest_user_stack
guest_user_stack: .skip 8

// void guest_enter_user(rip, stack, argument): returns when a handler makes guest_user_resume the place to go back to. The
// user's interrupts come in on this stack, below what is saved here.
  .section .text.guest_enter_user, "ax", @progbits
  .globl guest_enter_user, guest_user_resume
guest_enter_user:
  pushq %rbx
  pushq %rbp
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  movq %rsp, guest_user_stack
  movq %rsp, guest_tss + 4
  pushq $0x23
  pushq %rsi
  pushq $0x202
  pushq $0x2b
  pushq %rdi
  movq %rdx, %rdi
  iretq
guest_user_resume:
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbp
  popq %rbx
  ret

// uint64_t user_call(number, argument), in ring 3. Exception 3 and not `syscall` or `int n`: those two are broken from ring 3
// on paravirtual KVM hosts, breakpoints are not.
  .section .text.user_call, "ax", @progbits
  .globl user_call
user_call:
  movq %rdi, %rax
  movq %rsi, %rdi
  int3
  ret

  .section .note.GNU-stack, "", @progbits
