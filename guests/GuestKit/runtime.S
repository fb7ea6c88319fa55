// The C library Embedded Swift asks for. String instructions: one instruction for any length, where ring 0 is emulated.
  .macro function name
  .section .text.\name, "ax", @progbits
  .globl \name
  .type \name, @function
\name:
  .endm

function memcpy
  movq %rdi, %rax
  movq %rdx, %rcx
  rep movsb
  ret

function memmove
  movq %rdi, %rax
  movq %rdx, %rcx
  movq %rdi, %r8
  subq %rsi, %r8
  cmpq %rdx, %r8                      // the destination begins inside the source: copy downwards
  jb 1f
  rep movsb
  ret
1:
  leaq -1(%rdi, %rdx), %rdi
  leaq -1(%rsi, %rdx), %rsi
  std
  rep movsb
  cld
  ret

function memset
  movq %rdi, %r8
  movl %esi, %eax
  movq %rdx, %rcx
  rep stosb
  movq %r8, %rax
  ret

function memcmp
  xorl %eax, %eax
  movq %rdx, %rcx
  cmpq %rcx, %rcx                     // equal when there is nothing to compare
  repe cmpsb
  je 1f
  movzbl -1(%rdi), %eax
  movzbl -1(%rsi), %ecx
  subl %ecx, %eax
1:
  ret

// Memory after the image, handed out upwards: a guest runs for milliseconds, so nothing is given back.
  .data
  .balign 8
heap_next: .quad guest_image_end

function guest_allocate               // (size, alignment), alignment a power of two
  movq heap_next, %rax
  leaq -1(%rax, %rsi), %rax
  negq %rsi
  andq %rsi, %rax
  leaq (%rax, %rdi), %rcx
  movq %rcx, heap_next
  ret

function posix_memalign
  pushq %rdi
  movq %rdx, %rdi
  call guest_allocate
  popq %rdi
  movq %rax, (%rdi)
  xorl %eax, %eax
  ret

function free
  ret

  .section .note.GNU-stack, "", @progbits
