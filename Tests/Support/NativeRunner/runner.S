.intel_syntax noprefix
.text
.globl native_enter
// native_enter(native_state *rdi, code *rsi, components edx)
native_enter:
  push rbx
  push rbp
  push r12
  push r13
  push r14
  push r15
  push rdx
  push rsi
  push rdi
  mov eax, edx
  xor edx, edx
  xrstor64 [rdi + 192]
  push [rdi + 128]
  popfq
  mov rax, [rdi]
  mov rcx, [rdi + 8]
  mov rdx, [rdi + 16]
  mov rbx, [rdi + 24]
  mov rbp, [rdi + 40]
  mov rsi, [rdi + 48]
  mov r8, [rdi + 64]
  mov r9, [rdi + 72]
  mov r10, [rdi + 80]
  mov r11, [rdi + 88]
  mov r12, [rdi + 96]
  mov r13, [rdi + 104]
  mov r14, [rdi + 112]
  mov r15, [rdi + 120]
  mov rdi, [rdi + 56]
  call [rsp + 8]
  pushfq
  push rdi
  mov rdi, [rsp + 16]
  mov [rdi], rax
  mov [rdi + 8], rcx
  mov [rdi + 16], rdx
  mov [rdi + 24], rbx
  mov [rdi + 40], rbp
  mov [rdi + 48], rsi
  mov [rdi + 64], r8
  mov [rdi + 72], r9
  mov [rdi + 80], r10
  mov [rdi + 88], r11
  mov [rdi + 96], r12
  mov [rdi + 104], r13
  mov [rdi + 112], r14
  mov [rdi + 120], r15
  pop [rdi + 56]
  pop [rdi + 128]
  mov eax, [rsp + 16]
  xor edx, edx
  xsave64 [rdi + 192]
  fninit
  cld
  lea rax, [rip + native_initial_mxcsr]
  ldmxcsr [rax]
  pop rdi
  pop rsi
  pop rdx
  pop r15
  pop r14
  pop r13
  pop r12
  pop rbp
  pop rbx
  ret

.section .rodata
native_initial_mxcsr:
  .long 0x1f80
.section .note.GNU-stack, "", @progbits
