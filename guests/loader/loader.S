// The way into the loader and out of it, and accesses that may be refused. The loader has its own pages and its own stack:
// nothing of it is in memory that the kernel can touch.
  .section .loader.text, "ax", @progbits
  .globl loader_entry, loader_poke
loader_entry:
1:
  movl $1, %eax
  xchgl %eax, loader_taken(%rip)
  testl %eax, %eax
  jz 2f
  pause
  jmp 1b
2:
  movq %rsp, loader_caller(%rip)
  leaq loader_stack_top(%rip), %rsp
  call loader_main
  movq loader_caller(%rip), %rsp
  movl $0, loader_taken(%rip)
  ret
  // Nobody calls this: it is what code in the middle of a loader can do for who gets there.
  .balign 16
loader_poke:
  movq %rsi, (%rdi)
  movl $0x600d, %eax
  ret

  .section .loader.data, "aw", @progbits
loader_taken:
  .long 0
  .balign 8
loader_caller:
  .quad 0
  .balign 16
  .skip 2048
loader_stack_top:

  .text
  .globl loader_call, loader_exit, victim
loader_call:
  call loader_entry
loader_exit:
  ret

  .balign 16
victim:
  movl $1, %eax
  ret
  .balign 16

  .globl try_store64, try_load64, try_call, try_call_failed, try_recovery, try_write_cr0, try_lidt
try_store64:
  movq %rsi, (%rdi)
  movl $1, %eax
  ret
try_load64:
  movq (%rdi), %rax
  movl $1, %eax
  ret
try_write_cr0:
  movq %rdi, %cr0
  movl $1, %eax
  ret
try_lidt:
  lidt (%rdi)
  movl $1, %eax
  ret
try_failed:
  xorl %eax, %eax
  ret
try_call:
  pushq %rbx
  pushq %rbp
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, try_call_stack(%rip)
  movq %rdi, %rax
  movq %rsi, %rdi
  movq %rdx, %rsi
  call *%rax
  jmp 1f
try_call_failed:
  movq $-1, %rax
1:
  movq $0, try_call_stack(%rip)
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbp
  popq %rbx
  ret
try_recovery:
  // An engine may tell of an access after its instruction.
  xorl %eax, %eax
  leaq try_store64(%rip), %rcx
  cmpq %rcx, %rdi
  jb 1f
  leaq try_failed(%rip), %rcx
  cmpq %rcx, %rdi
  cmovb %rcx, %rax
1:
  ret

  .data
  .balign 8
  .globl try_call_stack
try_call_stack:
  .quad 0
