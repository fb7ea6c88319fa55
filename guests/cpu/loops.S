// The measured loops of the guest `cpu` and of `swiftvmm bench cpu` on the physical CPU: the same instructions in both, which
// no compiler chooses. CLoops.h says how many each executes; a change here changes that count.
// General registers only, so that an emulated ring 0 can run them.

  .macro loop name
  .text
  .balign 64
  .globl \name
  .type \name, @function
\name:
  .endm

loop loop_alu                         // (iterations): each instruction but two needs the result of an earlier one
  movq %rdi, %rcx
  movabsq $0x9e3779b97f4a7c15, %r8
  movl $1, %esi
  xorl %eax, %eax
  xorl %edx, %edx
  xorl %edi, %edi
1:
  addq %r8, %rax
  xorq %rax, %rdx
  rolq $13, %rdx
  leaq 7(%rsi, %rdx, 4), %rsi
  subq %rsi, %rax
  andl %esi, %edi
  orq $1, %r8
  shrq $3, %rdi
  decq %rcx
  jnz 1b
  xorq %rdx, %rax
  addq %rsi, %rax
  ret

loop loop_calls                       // (n): Fibonacci's number n, by recursion
  cmpl $2, %edi
  jae 1f
  movl %edi, %eax
  ret
1:
  pushq %rbx
  pushq %rdi
  decl %edi
  call loop_calls
  movl %eax, %ebx
  popq %rdi
  subl $2, %edi
  call loop_calls
  addl %ebx, %eax
  popq %rbx
  ret

loop loop_branchy                     // (iterations): a branch that nobody can predict; both ways are equally long
  movq %rdi, %rcx
  movabsq $0x9e3779b97f4a7c15, %rax
  xorl %edx, %edx
1:
  movq %rax, %rsi
  shlq $13, %rsi
  xorq %rsi, %rax
  movq %rax, %rsi
  shrq $7, %rsi
  xorq %rsi, %rax
  movq %rax, %rsi
  shlq $17, %rsi
  xorq %rsi, %rax
  testb $16, %al
  jnz 2f
  xorq %rax, %rdx
  jmp 3f
2:
  addq %rax, %rdx
  rolq $1, %rdx
3:
  decq %rcx
  jnz 1b
  movq %rdx, %rax
  ret

loop loop_chase                       // (address, loads / 8): each load's address is what the one before has read
  movq %rdi, %rax
  movq %rsi, %rcx
1:
  .rept 8
  movq (%rax), %rax
  .endr
  decq %rcx
  jnz 1b
  ret

loop loop_copy                        // (to, from, blocks of 32 bytes)
  movq %rdx, %rcx
1:
  movq (%rsi), %rax
  movq 8(%rsi), %rdx
  movq 16(%rsi), %r8
  movq 24(%rsi), %r9
  movq %rax, (%rdi)
  movq %rdx, 8(%rdi)
  movq %r8, 16(%rdi)
  movq %r9, 24(%rdi)
  addq $32, %rsi
  addq $32, %rdi
  decq %rcx
  jnz 1b
  ret

loop loop_rep_movsq                   // (to, from, words of 64 bits)
  movq %rdx, %rcx
  rep movsq
  ret

loop loop_cr3                         // (root, other root, iterations, address): ring 0 only; sums a word of each of 64 pages
  movq %rcx, %r8
  xorl %eax, %eax
1:
  movq %rsi, %cr3
  xchgq %rdi, %rsi
  movq %r8, %r9
  movl $64, %ecx
2:
  addq (%r9), %rax
  addq $4096, %r9
  decl %ecx
  jnz 2b
  decq %rdx
  jnz 1b
  ret

  .section .note.GNU-stack, "", @progbits
