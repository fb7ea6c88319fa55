// Loads, stores and port accesses of every size, at RDI or at port DX.
#include "guest.h"

GUEST load1
  mov al, [rdi]
END load1

GUEST load2
  mov ax, [rdi]
END load2

GUEST load4
  mov eax, [rdi]
END load4

GUEST load8
  mov rax, [rdi]
END load8

GUEST load16
  movups xmm0, [rdi]
END load16

GUEST loadsigned
  movsx rax, byte ptr [rdi]
END loadsigned

GUEST store1
  mov [rdi], al
END store1

GUEST store2
  mov [rdi], ax
END store2

GUEST store4
  mov [rdi], eax
END store4

GUEST store8
  mov [rdi], rax
END store8

GUEST out1
  out dx, al
END out1

GUEST out2
  out dx, ax
END out2

GUEST out4
  out dx, eax
END out4

GUEST in1
  in al, dx
END in1

GUEST in2
  in ax, dx
END in2

GUEST in4
  in eax, dx
END in4

GUEST outs1
  rep outsb
END outs1

GUEST outs2
  rep outsw
END outs2

GUEST outs4
  rep outsd
END outs4

GUEST ins1
  rep insb
END ins1

GUEST ins2
  rep insw
END ins2

GUEST ins4
  rep insd
END ins4

// Writes a word at RDI and at every RSI bytes after it, RCX times.
GUEST stores
1: mov [rdi], rcx
  add rdi, rsi
  dec rcx
  jnz 1b
END stores

// Reads likewise.
GUEST loads
1: mov rax, [rdi]
  add rdi, rsi
  dec rcx
  jnz 1b
END loads

GUEST doorbells
  out dx, al
  out dx, ax
  out dx, eax
  mov [rdi], al
  mov [rdi], ax
  mov [rdi], eax
  mov [rdi], rax
END doorbells
