// Loops whose result depends on every iteration. They say READY whenever the count that is left has none of R8's bits.
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
  test rcx, r8
  jnz 2f
  out READY, al
2:
.endm

GUEST compute
1: STEP
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
  dec rcx
  jnz 1b
  movups [rdi + 0x2000], xmm0
  vmovups [rdi + 0x2020], ymm3
  fistp qword ptr [rdi + 0x2040]
END computevectors
