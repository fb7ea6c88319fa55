// A boot sector that asks the firmware for everything a boot sector may: INT 10h, 11h, 12h, 13h, 15h, 16h and 1Ah. Each
// service that answers is a line; `FAIL` and debug exit 1 end the guest otherwise. Loaded at 0x7C00 with DL the drive. At the
// end it goes to long mode, where the firmware is ours.

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
  sti
  cld
  movb %dl, drive

  movw $text_hello, %si               // INT 10h: teletype
  call print

  movw $text_memory, %si              // INT 12h: base memory, between 512 and 640 KiB
  call print
  int $0x12
  cmpw $512, %ax
  jb fail
  cmpw $640, %ax
  ja fail
  call ok

  movw $text_map, %si                 // INT 15h E820: ends, and has RAM at 0
  call print
  xorl %ebx, %ebx
  movw $entry, %di
2:
  movl $0xe820, %eax
  movl $0x534d4150, %edx
  movl $20, %ecx
  int $0x15
  jc fail
  cmpl $0x534d4150, %eax
  jne fail
  movl entry, %eax
  orl entry + 4, %eax
  jnz 3f
  cmpb $1, entry + 16
  jne fail
  incb seen
3:
  testl %ebx, %ebx
  jnz 2b
  cmpb $1, seen
  jne fail
  call ok

  movw $text_ticks, %si               // INT 1Ah: the tick count moves
  call print
  xorb %ah, %ah
  int $0x1a
  movw %dx, %bx
4:
  hlt
  xorb %ah, %ah
  int $0x1a
  cmpw %bx, %dx
  je 4b
  call ok

  movw $text_disk, %si                // INT 13h: the sector we came from is the sector in memory
  call print
  movw $0x0201, %ax
  movw $0x0001, %cx
  xorb %dh, %dh
  movb drive, %dl
  movw $0x8000, %bx
  int $0x13
  jc fail
  movw $0x7c00 + 440, %si
  movw $0x8000 + 440, %di
  movw $36, %cx
  repe cmpsw
  jne fail
  call ok

  movw $text_key, %si                 // INT 16h: no key waits
  call print
  movb $1, %ah
  int $0x16
  jnz fail
  call ok

  movw $0x4c4d, %ax                   // INT 15h 4C4Dh, our boot ROM's way to long mode; others refuse it
  movl $long_mode, %ebx
  int $0x15
  movw $0x604, %dx                    // ACPI power-off: SLP_TYP 5 and SLP_EN, as our FADT and DSDT say
  movw $0x3400, %ax
  outw %ax, %dx
  movw $0x2000, %ax                   // QEMU's S5 is SLP_TYP 0
  outw %ax, %dx
  jmp stop
fail:
  movw $text_fail, %si
  call print
  movb $1, %al
  outb %al, $0xf4
stop:
  cli
  hlt
  jmp stop

ok:
  movw $text_ok, %si
print:
  lodsb
  testb %al, %al
  jz 6f
  movb $0x0e, %ah
  movw $7, %bx
  int $0x10
  jmp print
6:
  ret

  .code64
long_mode:
  movl $text_long, %esi
  movw $0x3f8, %dx
7:
  lodsb
  outb %al, %dx
  cmpb $'\n', %al
  jne 7b
  movw $0x604, %dx
  movw $0x3400, %ax
  outw %ax, %dx
8:
  hlt
  jmp 8b
  .code16

text_long: .ascii "long mode ok\r\n"
text_hello: .asciz "hello from real mode\r\n"
text_memory: .asciz "memory"
text_map: .asciz "e820"
text_ticks: .asciz "ticks"
text_disk: .asciz "disk"
text_key: .asciz "keyboard"
text_ok: .asciz " ok\r\n"
text_fail: .asciz " FAIL\r\n"
drive: .byte 0
seen: .byte 0

  .org 510
  .byte 0x55, 0xaa
  .set entry, 0x7e00
