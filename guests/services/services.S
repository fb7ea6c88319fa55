// A boot disk of several sectors that tries the boot ROM's services with their answers, errors and limits. realmode asks what any
// firmware must answer; this one knows ours.

  .set STAGE2, 0x8000
  .set BUFFER, 0x6000
  .set SECTORS, (end - start) / 512
  .set COM1, 0x3f8
  .set PM_TIMER, 0x608

  .code16
  .section .text, "ax", @progbits
  .globl start
start:
  ljmp $0, $1f
1:
  xorw %ax, %ax
  movw %ax, %ds
  movw %ax, %es
  movw %ax, %ss
  movw $0x7c00, %sp
  cld
  movw $text_disk, %si
  call print
  movb $0x41, %ah                     // extensions
  movw $0x55aa, %bx
  movb $0x80, %dl
  int $0x13
  jc fail
  cmpw $0xaa55, %bx
  jne fail
  movw $packet, %si                   // all sectors but this one, in one go
  movb $0x42, %ah
  int $0x13
  jc fail
  jmp stage2

ok:
  movw $text_ok, %si
print:
  lodsb
  testb %al, %al
  jz 2f
  movb $0x0e, %ah
  int $0x10
  jmp print
2:
  ret

fail:
  movw $text_fail, %si
  call print
  movb $1, %al
  outb %al, $0xf4
3:
  cli
  hlt
  jmp 3b

  .balign 4
packet:
  .byte 16, 0
  .word SECTORS - 1
  .word STAGE2, 0
  .quad 1
text_disk: .asciz "disk"
text_ok: .asciz " ok\r\n"
text_fail: .asciz " FAIL\r\n"

  .org 510
  .byte 0x55, 0xaa

// Linked at 0x7E00, loaded at 0x8000: addresses of this part go through HERE.
#define HERE(label) ((label) - stage2_start + STAGE2)
  .macro section_begins text
  movw $HERE(\text), %si
  call print_far
  .endm
stage2_start:
  jmp main

print_far:
  lodsb
  testb %al, %al
  jz 1f
  movb $0x0e, %ah
  int $0x10
  jmp print_far
1:
  ret

passed:
  movw $HERE(line_ok), %si
  jmp print_far

failed:
  movw $HERE(line_fail), %si
  call print_far
  movb $1, %al
  outb %al, $0xf4
1:
  cli
  hlt
  jmp 1b

  .set stage2, STAGE2

main:
// Disk: the same sector by cylinder, head and sector; geometry; what is past the end; writes.
  movw $0x0201, %ax
  movw $0x0002, %cx
  movw $0x0080, %dx
  movw $BUFFER, %bx
  int $0x13
  jc failed
  movw $BUFFER, %si
  movw $STAGE2, %di
  movw $256, %cx
  repe cmpsw
  jne failed
  movb $8, %ah
  movb $0x80, %dl
  int $0x13
  jc failed
  cmpw $0x0f01, %dx
  jne failed
  andb $63, %cl
  cmpb $63, %cl
  jne failed
  xorw %ax, %ax
  movw %ax, %es
  movw $BUFFER, %si
  movw $26, (%si)
  movb $0x48, %ah
  movb $0x80, %dl
  int $0x13
  jc failed
  cmpl $SECTORS, BUFFER + 16
  jne failed
  cmpw $512, BUFFER + 24
  jne failed
  movl $SECTORS, HERE(far_packet) + 8
  movw $HERE(far_packet), %si
  movb $0x42, %ah
  int $0x13
  jnc failed
  cmpb $4, %ah
  jne failed
  movl $0xffffffff, HERE(far_packet) + 8
  movb $0x42, %ah
  int $0x13
  jnc failed
  movw $0x0301, %ax
  movw $0x0001, %cx
  movw $0x0080, %dx
  int $0x13
  jnc failed
  cmpb $3, %ah
  jne failed
  movb $1, %ah
  int $0x13
  cmpb $3, %ah
  jne failed
  movw $0x0201, %ax
  movw $0x0001, %cx
  movw $0x0081, %dx                   // no second disk
  int $0x13
  jnc failed
  call passed

// E820: no range wraps, there is RAM at 0 that stays below the BIOS's own and RAM at 1 MiB, and the sizes of E801h and 88h agree.
  section_begins line_map
  xorl %ebx, %ebx
  movl %ebx, HERE(extended)
1:
  movl $0xe820, %eax
  movl $0x534d4150, %edx
  movl $24, %ecx
  movw $BUFFER, %di
  int $0x15
  jc failed
  cmpl $20, %ecx
  jne failed
  movl BUFFER, %eax
  movl BUFFER + 4, %edx
  movl %eax, %ecx
  orl %edx, %ecx
  jnz 2f
  cmpl $0xa0000, BUFFER + 8
  ja failed
  incb HERE(base_seen)
2:
  cmpl $0x100000, %eax
  jne 3f
  testl %edx, %edx
  jnz 3f
  cmpl $1, BUFFER + 16
  jne failed
  movl BUFFER + 8, %ecx
  movl %ecx, HERE(extended)
3:
  addl BUFFER + 8, %eax
  adcl BUFFER + 12, %edx
  jc failed
  testl %ebx, %ebx
  jnz 1b
  movl $99, %ebx
  movl $0xe820, %eax
  movl $0x534d4150, %edx
  movl $20, %ecx
  int $0x15
  jnc failed
  cmpb $1, HERE(base_seen)
  jne failed
  shrl $10, HERE(extended)
  jz failed
  movw $0xe801, %ax
  int $0x15
  jc failed
  cmpw %ax, %cx
  jne failed
  cmpw %bx, %dx
  jne failed
  movzwl %ax, %eax
  movzwl %bx, %ebx
  shll $6, %ebx
  addl %ebx, %eax
  movl HERE(extended), %ecx
  cmpl $0x3c00, %ecx
  jbe 4f
  andl $~63, %ecx
4:
  cmpl %eax, %ecx
  jne failed
  movb $0x88, %ah
  int $0x15
  jc failed
  movzwl %ax, %eax
  cmpl HERE(extended), %eax
  ja failed
  call passed

// Block move: 17 words above 1 MiB and back.
  section_begins line_move
  movl $STAGE2, %eax
  movl $0x204000, %edx
  call block_move
  movl $0x204000, %eax
  movl $BUFFER, %edx
  call block_move
  movw $STAGE2, %si
  movw $BUFFER, %di
  movw $17, %cx
  repe cmpsw
  jne failed
  movw $0x2402, %ax                   // A20 is on: 1 MiB is not 0
  int $0x15
  jc failed
  cmpb $1, %al
  jne failed
  movw $0xffff, %ax
  movw %ax, %fs
  movl $0x12345678, %fs:0x6010
  movl $0x9abcdef0, BUFFER
  cmpl $0x12345678, %fs:0x6010
  jne failed
  call passed

// Wait 20 ms, which the PM timer must see; QEMU's chipset has no PM timer before a firmware places it.
  section_begins line_wait
  movw $PM_TIMER, %dx
  inl %dx, %eax
  movl %eax, %esi
  movb $0x86, %ah
  xorw %cx, %cx
  movw $20000, %dx
  int $0x15
  jc 5f
  movw $PM_TIMER, %dx
  inl %dx, %eax
  subl %esi, %eax
  andl $0xffffff, %eax
  cmpl $71590, %eax
  jb failed
  call passed
  jmp 6f
5:
  cmpl $-1, %esi
  jne failed
  section_begins line_none
6:

// Clocks: the tick count can be set and moves on; the RTC's digits are decimal.
  section_begins line_clock
  movb $1, %ah
  movw $5, %cx
  movw $1000, %dx
  int $0x1a
  sti
  hlt
  movb $0, %ah
  int $0x1a
  jc failed
  cmpw $5, %cx
  jne failed
  subw $1000, %dx
  cmpw $1000, %dx
  ja failed
  movb $2, %ah
  int $0x1a
  jc failed
  movb %ch, %al
  movb $0x23, %ah
  call decimal
  movb %cl, %al
  movb $0x59, %ah
  call decimal
  movb %dh, %al
  movb $0x60, %ah
  call decimal
  movb $4, %ah
  int $0x1a
  jc failed
  movb %cl, %al
  movb $0x99, %ah
  call decimal
  movb %dh, %al
  movb $0x12, %ah
  call decimal
  movb %dl, %al
  movb $0x31, %ah
  call decimal
  call passed

// The screen: mode 3 of 80 columns; a string; and what nobody knows is refused.
  section_begins line_screen
  movb $0x0f, %ah
  int $0x10
  cmpw $0x5003, %ax
  jne failed
  movw $0x1301, %ax
  movw $7, %bx
  movw $3, %cx
  xorw %dx, %dx
  movw $HERE(line_ok), %bp
  int $0x10
  movw $0x5300, %ax
  int $0x15
  jnc failed
  cmpb $0x86, %ah
  jne failed
  movb $3, %ah                        // COM1's transmitter is empty
  int $0x14
  testb $0x20, %ah
  jz failed
  movw $HERE(line_end), %si
  call print_far

// Long mode, with the registers as they were.
  section_begins line_long
  movl $HERE(long_mode), %ebx
  movl $0x11111111, %ecx
  movl $0x22222222, %edx
  movl $0x93333333, %esi
  movl $0x44444444, %edi
  movl $0x55555555, %ebp
  movw $0x4c4d, %ax
  int $0x15
  jmp failed

// AX, up to AH, is two decimal digits.
decimal:
  cmpb %ah, %al
  ja failed
  andb $15, %al
  cmpb $9, %al
  ja failed
  ret

// 17 words from EAX to EDX by INT 15h 87h.
block_move:
  movw $HERE(move_table), %si
  movl %eax, 0x12(%si)
  movb $0x93, 0x15(%si)
  movl %edx, 0x1a(%si)
  movb $0x93, 0x1d(%si)
  movw $17, %cx
  movb $0x87, %ah
  int $0x15
  jc failed
  ret

  .code64
long_mode:
  cmpl $0x7c00, %esp
  jne 1f
  cmpq $0x11111111, %rcx
  jne 1f
  cmpq $0x22222222, %rdx
  jne 1f
  movl $0x93333333, %eax
  cmpq %rax, %rsi
  jne 1f
  cmpq $0x44444444, %rdi
  jne 1f
  cmpq $0x55555555, %rbp
  jne 1f
  movl $0xfee00030, %eax              // the local APIC is mapped, and is one
  movl (%rax), %eax
  cmpb $0x10, %al
  jb 1f
  pushq %rax
  popq %rax
  movl $HERE(line_ok), %esi
  call print64
  movw $0x604, %dx
  movw $0x3400, %ax
  outw %ax, %dx
2:
  cli
  hlt
  jmp 2b
1:
  movl $HERE(line_fail), %esi
  call print64
  movb $1, %al
  outb %al, $0xf4
  jmp 2b

print64:
  lodsb
  testb %al, %al
  jz 3f
  movw $COM1, %dx
  outb %al, %dx
  jmp print64
3:
  ret

  .balign 8
move_table: .fill 48, 1, 0
far_packet:
  .byte 16, 0
  .word 1
  .word BUFFER, 0
  .quad 0
base_seen: .byte 0
extended: .long 0
line_ok: .asciz " ok\r\n"
line_fail: .asciz " FAIL\r\n"
line_none: .asciz ": no PM timer\r\n"
line_end: .asciz "\r\n"
line_map: .asciz "memory map"
line_move: .asciz "block move"
line_wait: .asciz "wait"
line_clock: .asciz "clocks"
line_screen: .asciz "screen"
line_long: .asciz "long mode"
  .balign 512
end:
