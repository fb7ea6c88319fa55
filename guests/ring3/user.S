// Ring-3 code that does one thing each; ring3.swift says what must come of it.

  .macro user name
  .section .text.\name, "ax", @progbits
  .globl \name
\name:
  .endm

user user_divide
  xorl %ecx, %ecx
  movl $1, %eax
  xorl %edx, %edx
  divl %ecx
  ret

user user_undefined
  ud2

user user_read                        // RDI: where
  movq (%rdi), %rax
  jmp user_exit

user user_write
  movq $1, (%rdi)
  jmp user_exit

user user_jump
  jmp *%rdi

user user_halt
  hlt

user user_disable_interrupts
  cli

user user_port
  movw $0x80, %dx
  inb %dx, %al
  jmp user_exit

user user_control_register
  movq %cr0, %rax
  jmp user_exit

user user_read_msr
  movl $0x1b, %ecx
  rdmsr
  jmp user_exit

user user_non_canonical
  movabsq $0x800000000000, %rax
  movq (%rax), %rax
  jmp user_exit

user user_kernel_selector             // loads the kernel's data segment
  movl $0x10, %eax
  movl %eax, %ds
  jmp user_exit

// Checks that the registers are as before after interrupts and calls: every register holds a value of its own.
user user_registers                   // RDI: rounds
  movq %rdi, %rcx
  movq $0x0101010101010101, %rbx
  movq $0x0202020202020202, %rbp
  movq $0x0808080808080808, %r8
  movq $0x0909090909090909, %r9
  movq $0x1010101010101010, %r10
  movq $0x1111111111111111, %r11
  movq $0x1212121212121212, %r12
  movq $0x1313131313131313, %r13
  movq $0x1414141414141414, %r14
  movq $0x1515151515151515, %r15
1:
  movl $2, %eax
  movl $7, %edi
  int3
  cmpq $8, %rax
  jne 2f
  decq %rcx
  jnz 1b
  movq %rbx, %rdi
  xorq %rbp, %rdi
  xorq %r8, %rdi
  xorq %r9, %rdi
  xorq %r10, %rdi
  xorq %r11, %rdi
  xorq %r12, %rdi
  xorq %r13, %rdi
  xorq %r14, %rdi
  xorq %r15, %rdi
  xorl %eax, %eax
  int3
2:
  movq $-1, %rdi
  xorl %eax, %eax
  int3

user user_exit                        // RAX: the value
  movq %rax, %rdi
  xorl %eax, %eax
  int3
  ud2

  .section .note.GNU-stack, "", @progbits
