// The first sector of a disk that starts a kernel with a PVH entry on any PC BIOS: for emulators that load no kernels. The disk
// is made by BootDisk.swift, which fills in the fields at the sector's end:
//
//   sector 0       this
//   sector 1 on    32 sectors a chunk, read to PAYLOAD: a page with PVH's hvm_start_info, then the kernel, from its first byte
//                  at KERNEL to its last
  .set PAYLOAD, 0x10000
  .set START_INFO_SIZE, 0x1000
  .set KERNEL, 0x100000

  .section .rodata.bootdisk, "a", @progbits
  .globl swiftvmm_boot_disk_start
  .balign 16
swiftvmm_boot_disk_start:
  .set ORIGIN, swiftvmm_boot_disk_start - 0x7c00

  .code16
  xorw %ax, %ax
  movw %ax, %ds
  movw %ax, %es
  movw %ax, %ss
  movw $0x7c00, %sp
  cld
  inb $0x92, %al                      // A20
  orb $2, %al
  outb %al, $0x92
read:
  movb $0x42, %ah                     // extended read; DL is the disk that the BIOS has started from, and stays
  movw $packet - ORIGIN, %si
  int $0x13
  jc stop16
  addw $32 * 512 / 16, packet + 6 - ORIGIN
  addl $32, packet + 8 - ORIGIN
  decw chunks - ORIGIN
  jnz read
  cli
  lgdtl gdt_pointer - ORIGIN
  movl %cr0, %eax
  orb $1, %al
  movl %eax, %cr0
  ljmpl $8, $(protected - ORIGIN)
stop16:
  cli
  hlt
  jmp stop16

  .code32
protected:
  movl $16, %eax
  movl %eax, %ds
  movl %eax, %es
  movl %eax, %ss
  movl $PAYLOAD + START_INFO_SIZE, %esi
  movl $KERNEL, %edi
  movl words - ORIGIN, %ecx
  rep movsl
  movl $PAYLOAD, %ebx
  jmp *entry - ORIGIN

  .balign 8
gdt:
  .quad 0
  .quad 0x00cf9b000000ffff
  .quad 0x00cf93000000ffff
gdt_pointer:
  .word 23
  .long gdt - ORIGIN
  .balign 4
packet:                               // sectors, offset, segment, first sector
  .byte 16, 0
  .word 32, 0, PAYLOAD / 16
  .quad 1

  .org 496
entry: .long 0                        // the kernel's 32-bit PVH entry
words: .long 0                        // the kernel's size in words of 32 bits
chunks: .word 0
  .org 510
  .word 0xaa55

  .section .note.GNU-stack, "", @progbits
