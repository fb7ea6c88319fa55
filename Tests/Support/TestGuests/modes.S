// Modes of the processor, and ways to stop it.
#include "guest.h"

GUEST real, 16
  mov ax, 0x1000
  mov ds, ax
  mov word ptr [0x10], 0x1234
  mov ax, cs
END real

GUEST protected, 32
  mov dword ptr [DATA], 0x12345678
  push dword ptr [DATA]
  pop eax
END protected

GUEST long
  mov rax, 0x123456789abcdef0
  ror rax, 32
END long

// What only ring 3 may use on every host: SSE arithmetic and x87.
GUEST floating
  mov eax, 6
  cvtsi2sd xmm0, eax
  mulsd xmm0, xmm0
  cvttsd2si rbx, xmm0
  fld1
  fld1
  faddp
  fistp qword ptr [rdi]
  mov rax, [rdi]
END floating

GUEST undefined
  ud2
END undefined

GUEST jump
  jmp rdi
END jump

GUEST popcount
  popcnt rcx, rdx
END popcount

GUEST exchange16
  lock cmpxchg16b [rdi]
END exchange16

GUEST spin
1: pause
  jmp 1b
END spin

GUEST halt
  hlt
END halt

// Stops for ever; only an NMI or the VMM gets it out.
GUEST sleep
1: cli
  hlt
  jmp 1b
END sleep

// Instructions of 1, 3, 3 and 3 bytes.
GUEST steps
  nop
  inc rbx
  mov [rdi], rbx
  mov rax, [rdi]
END steps

GUEST flags
  pushfq
  pop rax
END flags

GUEST debugregisters
  mov rax, dr0
  mov rbx, dr7
END debugregisters
