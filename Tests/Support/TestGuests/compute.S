// Loops whose result depends on every iteration; the count that is left is stored below RDI for the test to see.
#include "guest.h"

.macro STEP
  imul rax, rax, 0x5851f42d
  add rax, 0x14057b7f
  rol rax, 13
  mov rdx, rax
  and edx, 0xff8
  xor [rdi + rdx], rax
  push rax
  pop rbp
  adc rbx, rbp
.endm

GUEST compute
1: STEP
  mov [rdi - 8], rcx
  dec rcx
  jnz 1b
END compute

// The same with SSE, AVX and x87 registers; ring 3.
GUEST computevectors
  fldz
1: STEP
  movq xmm1, rax
  paddd xmm0, xmm1
  vpaddd ymm2, ymm2, ymm0
  vpxor ymm3, ymm3, ymm2
  fld1
  faddp
  mov [rdi - 8], rcx
  dec rcx
  jnz 1b
  movups [rdi + 0x2000], xmm0
  vmovups [rdi + 0x2020], ymm3
  fistp qword ptr [rdi + 0x2040]
END computevectors
