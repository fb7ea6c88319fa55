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

// RDI rounds: changes the immediate of the function at 0xc000, then says so at 0xf000. With RSI, in a new page of the
// same memory's.
GUEST changecode
  mov rbx, 0xc000
  mov dword ptr [rbx], 0x000000b8       // mov eax, imm32
  mov dword ptr [rbx + 4], 0xccccc300   // ret
  mov byte ptr [0xf010], 1
  xor ecx, ecx
1: inc ecx
  mov dword ptr [rbx + 1], ecx
  mov dword ptr [0xf000], ecx
2: pause
  mov edx, dword ptr [0xf008]
  cmp edx, ecx
  jb 2b
  cmp ecx, edi
  jb 1b
END changecode

// Calls that function after each change that it is told of, to round RDI: R8 counts the calls that ran older code.
GUEST callchangedcode
  xor r8d, r8d
  xor r9d, r9d
  mov r11, 0xc000
1: pause
  cmp byte ptr [0xf010], 1
  jne 1b
2: mov r10d, dword ptr [0xf000]
  cmp r10d, r9d
  je 2b
  mov r9d, r10d
  xor eax, eax
  cpuid                                 // serializes, as the changer's partner must (SDM vol. 3, 9.1.3)
  call r11
  cmp eax, r9d
  je 3f
  inc r8d
3: mov dword ptr [0xf008], r9d
  cmp r9d, edi
  jb 2b
END callchangedcode
