// The built-in boot ROM: from the reset vector to a boot sector or a 64-bit entry, and real-mode services meanwhile.
//
// Map.  The ROM is 32 KiB. The VMM shows it twice: ending at 4 GiB, where the processor begins, and ending at 1 MiB, where
// real-mode code reaches it (F000:8000 to F000:FFFF). It writes nothing into itself. Addresses in it are differences of labels,
// so the image needs no relocation wherever the executable holds it.
//
// Boot descriptor.  The VMM may leave one at 0x9FC10, in the extended BIOS data area:
//   +0   u32  0x424D5653 ("SVMB"), or there is none
//   +4   u32  0: the boot sector that the VMM has put at 0x7C00;  1: the 64-bit entry below
//   +8   u64  entry: physical address below 4 GiB, called in long mode with 4 GiB identity mapped
//   +16  u64  what RBX holds at the entry
//   +24  u32  physical address of a disk image in guest memory, below 4 GiB; 0: none
//   +28  u32  its 512-byte sectors
// Without a descriptor the boot sector at 0x7C00 is booted, and it is the whole disk.
//
// A boot sector starts at 0000:7C00 with DL=80h, DS=ES=SS=0, SP=7C00h, interrupts on.
//
// Services (what is not listed fails with CF=1 and AH=86h, or does nothing for INT 10h):
//   10h  AH=0Eh, 09h, 0Ah, 13h print to COM1; 03h, 0Fh answer a cursor at 0 and mode 3; the rest does nothing
//   11h  equipment   12h  KiB of base memory
//   13h  DL=80h: AH=00h, 01h, 02h, 04h, 08h, 15h, 41h, 42h, 48h; 16 heads of 63 sectors; writes answer 03h (write protected)
//   14h  AH=01h, 02h, 03h: COM1 write, read, status
//   15h  E820h, E801h, 88h, 87h (block move), 86h (wait, by the ACPI timer), 2400h-2403h (A20 is always on), EC00h,
//        4C4Dh ("LM"): enter long mode, see below
//   16h  AH=00h/10h, 01h/11h, 02h/12h: keys from COM1
//   1Ah  AH=00h, 01h (ticks of the PIT at 18.2 Hz), 02h, 04h (RTC, BCD)
//   18h  says that nothing boots   19h  boots again
//   08h counts at 40:6C and calls 1Ch. Exceptions 0 and 6 print where they happened and halt.
//
// INT 15h AX=4C4Dh, the way to long mode: EBX is the physical address of 64-bit code, which starts with interrupts off,
// 4 GiB identity mapped, flat segments (code 18h, data 10h), an empty IDT, SSE enabled, RSP the caller's linear stack, and
// ECX, EDX, ESI, EDI, EBP as the caller left them, zero-extended. It does not return. Tables are the ROM's: do not write them.
//
// E820 is fw_cfg's file etc/e820 (base u64, length u64, type u32 an entry; RAM from 0 on is split where it covers the BIOS's
// own areas), or CMOS's memory sizes where there is no fw_cfg.
//
// Ring 0 may be emulated at a microsecond an instruction and ten a port access: from reset to a boot sector this is about
// 100 instructions and 30 accesses; memory is looked at when somebody asks.

#define SIZE 0x8000
#define AT(label) ((label) - swiftvmm_boot_rom_start + 0x10000 - SIZE)
#define LINEAR(label) ((label) - swiftvmm_boot_rom_start + 0x100000 - SIZE)
#define TOP(label) ((label) - swiftvmm_boot_rom_start + 0x100000000 - SIZE)

#define COM1 0x3f8
#define PM_TIMER 0x608
#define FW_CFG 0x510

// The extended BIOS data area, by segment 0x9FC0. The VMM's FACS is its last 64 bytes.
#define EBDA 0x9fc0
#define DESCRIPTOR 0x10
#define DESCRIPTOR_KIND 0x14
#define DESCRIPTOR_ENTRY 0x18
#define DESCRIPTOR_ARGUMENT 0x20
#define DESCRIPTOR_DISK 0x28
#define DESCRIPTOR_SECTORS 0x2c
#define MAP_COUNT 0x30                // E820 entries, 0 until somebody asks
#define KEY 0x31                      // a key that INT 16h AH=01h saw
#define KEY_WAITS 0x32
#define DISK_STATUS 0x33
#define SCRATCH 0x40
#define MAP 0x80
#define MAP_END 0x3bc                 // 41 entries

// What `enter` leaves at BP.
#define F_ES 0
#define F_DS 2
#define F_EDI 4
#define F_ESI 8
#define F_EBP 12
#define F_EBX 20
#define F_EDX 24
#define F_ECX 28
#define F_EAX 32
#define F_FLAGS 40
#define CARRY 1
#define ZERO 0x40

  .section .rodata, "a", @progbits
  .balign 4096
  .globl swiftvmm_boot_rom_start, swiftvmm_boot_rom_end
swiftvmm_boot_rom_start:

// Page tables: accessed and dirty already, because nobody can set those bits in a ROM. Uncached from the PCI hole up.
page_map:
  .quad TOP(page_directory_pointers) + 0x23
  .fill 511, 8, 0
page_directory_pointers:
  .quad TOP(page_directories) + 0x23, TOP(page_directories) + 0x1023
  .quad TOP(page_directories) + 0x2023, TOP(page_directories) + 0x3023
  .fill 508, 8, 0
page_directories:
  .set page, 0
  .rept 1536
  .quad page * 0x200000 + 0xe3
  .set page, page + 1
  .endr
  .rept 512
  .quad page * 0x200000 + 0xfb
  .set page, page + 1
  .endr

  .balign 8
gdt:
  .quad 0
  .quad 0x00009b0f0000ffff            // 0x08 16-bit code at F000
  .quad 0x00cf93000000ffff            // 0x10 flat data
  .quad 0x00af9b000000ffff            // 0x18 64-bit code
  .quad 0x000093000000ffff            // 0x20 real mode's data limits
gdt_pointer:
  .word gdt_pointer - gdt - 1
  .long LINEAR(gdt)
no_idt:
  .word 0
  .long 0

// IVT entries 0 to 1Fh, and 70h to 77h.
  .balign 4
vectors:
#define VECTOR(label) .word AT(label), 0xf000
  VECTOR(exception0)
  .rept 5
  VECTOR(ignore)
  .endr
  VECTOR(exception6)
  VECTOR(ignore)
  VECTOR(int08)
  .rept 7
  VECTOR(ignore_irq)
  .endr
  VECTOR(int10)
  VECTOR(int11)
  VECTOR(int12)
  VECTOR(int13)
  VECTOR(int14)
  VECTOR(int15)
  VECTOR(int16)
  VECTOR(ignore)
  VECTOR(int18)
  VECTOR(int19)
  VECTOR(int1a)
  .rept 5
  VECTOR(ignore)
  .endr
slave_vectors:
  .rept 8
  VECTOR(ignore_irq_slave)
  .endr

// Port writes that set the machine up: port, value.
port_writes:
#define WRITE(port, value) .word port; .byte value
  WRITE(COM1 + 3, 0x80)               // 115200 8n1, FIFO on, an interrupt for each received byte
  WRITE(COM1 + 0, 0x01)
  WRITE(COM1 + 1, 0x00)
  WRITE(COM1 + 3, 0x03)
  WRITE(COM1 + 2, 0x07)
  WRITE(COM1 + 4, 0x0b)
  WRITE(COM1 + 1, 0x01)
  WRITE(0x20, 0x11)                   // PICs at 08h and 70h
  WRITE(0xa0, 0x11)
  WRITE(0x21, 0x08)
  WRITE(0xa1, 0x70)
  WRITE(0x21, 0x04)
  WRITE(0xa1, 0x02)
  WRITE(0x21, 0x01)
  WRITE(0xa1, 0x01)
  WRITE(0x21, 0xea)                   // the timer, COM1 and the cascade
  WRITE(0xa1, 0xff)
  WRITE(0x43, 0x36)                   // PIT channel 0 at 18.2 Hz
  WRITE(0x40, 0x00)
  WRITE(0x40, 0x00)
port_writes_end:

text_no_boot: .asciz "swiftvmm: no boot sector: the 512 bytes at 0x7c00 do not end in 55 AA\r\n"
text_exception: .asciz "swiftvmm: real-mode exception "
text_at: .asciz " at "
name_e820: .asciz "etc/e820"

// Between these two DS and ES reach 4 GiB from 0. Changes AX; interrupts are off.
  .macro begin_flat
  pushfw
  pushw %ds
  pushw %es
  cli
  lgdtl %cs:AT(gdt_pointer)
  movl %cr0, %eax
  orb $1, %al
  movl %eax, %cr0
  ljmpw $0x08, $AT(1f)
1:
  movw $0x10, %ax
  movw %ax, %ds
  movw %ax, %es
  .endm

  .macro end_flat
  movw $0x20, %ax
  movw %ax, %ds
  movw %ax, %es
  movl %cr0, %eax
  andb $0xfe, %al
  movl %eax, %cr0
  ljmpw $0xf000, $AT(1f)
1:
  popw %es
  popw %ds
  popfw
  .endm

  .balign 16
  .code16
post:
  cli
  cld
  xorw %ax, %ax
  movw %ax, %ss
  movw $0x7c00, %sp
  movw %ax, %es
  movw %cs, %ax
  movw %ax, %ds

  xorw %di, %di
  movw $AT(vectors), %si
  movw $64, %cx
  rep movsw
  movl $(0xf0000000 + AT(ignore)), %eax
  movw $224, %cx
  rep stosl
  movw $(0x70 * 4), %di
  movw $AT(slave_vectors), %si
  movw $16, %cx
  rep movsw

  xorw %ax, %ax                       // BIOS data area: COM1, EBDA, equipment, base memory; video mode 3, 80 columns
  movw $0x400, %di
  movw $128, %cx
  rep stosw
  movw $COM1, %es:0x400
  movw $EBDA, %es:0x40e
  movw $0x0222, %es:0x410
  movw $639, %es:0x413
  movw $0x001e, %es:0x41a             // keyboard buffer: empty
  movw $0x001e, %es:0x41c
  movb $3, %es:0x449
  movw $80, %es:0x44a
  movb $1, %es:0x475                  // one disk
  movb $24, %es:0x484

  movw $AT(port_writes), %si
  movw $((port_writes_end - port_writes) / 3), %cx
1:
  lodsw
  movw %ax, %dx
  lodsb
  outb %al, %dx
  loop 1b

  begin_flat                          // local APIC on, the PICs through its LINT0, NMI through its LINT1
  movl $0xfee00000, %ebx
  movl $0x1ff, 0xf0(%ebx)
  movl $0x700, 0x350(%ebx)
  movl $0x400, 0x360(%ebx)
  end_flat

  movw $EBDA, %ax
  movw %ax, %ds
  movb $1, 0
  movl $0, MAP_COUNT
  cmpl $0x424d5653, DESCRIPTOR
  jne boot_sector
  cmpl $1, DESCRIPTOR_KIND
  jne boot_sector
  movl DESCRIPTOR_ENTRY, %eax
  movl %eax, SCRATCH
  movl $0x7c00, SCRATCH + 4
  movl DESCRIPTOR_ARGUMENT, %eax
  movl %eax, SCRATCH + 16
  movl DESCRIPTOR_ARGUMENT + 4, %eax
  movl %eax, SCRATCH + 20
  jmp long_mode

boot_sector:
  cmpw $0xaa55, %es:0x7dfe
  jne int18
  xorw %ax, %ax
  movw %ax, %ds
  movw $0x80, %dx
  sti
  ljmp $0, $0x7c00

int19:
  jmp post

int18:
  movw $AT(text_no_boot), %si
  call print
stop:
  cli                                 // halted for good, and a VMM can see it
  hlt
  jmp stop

exception0:
  movb $'0', %cl
  jmp exception
exception6:
  movb $'6', %cl
exception:
  movw $AT(text_exception), %si
  call print
  movb %cl, %al
  call putc
  movw $AT(text_at), %si
  call print
  popw %bx
  popw %ax
  call print_word
  movb $':', %al
  call putc
  movw %bx, %ax
  call print_word
  movb $'\r', %al
  call putc
  movb $'\n', %al
  call putc
  jmp stop

// Prints the text at CS:SI. Changes AX, SI.
print:
  lodsb %cs:(%si), %al
  testb %al, %al
  jz 1f
  call putc
  jmp print
1:
  ret

// Prints AX in hexadecimal. Changes AX, CX.
print_word:
  movw $4, %cx
1:
  rolw $4, %ax
  pushw %ax
  andb $15, %al
  addb $'0', %al
  cmpb $'9', %al
  jbe 2f
  addb $('a' - '0' - 10), %al
2:
  call putc
  popw %ax
  loop 1b
  ret

// Sends AL to COM1.
putc:
  pushw %dx
  pushw %ax
  movw $(COM1 + 5), %dx
1:
  inb %dx, %al
  testb $0x20, %al
  jz 1b
  popw %ax
  movw $COM1, %dx
  outb %al, %dx
  popw %dx
  ret

ignore_irq_slave:
  pushw %ax
  movb $0x20, %al
  outb %al, $0xa0
  jmp 1f
ignore_irq:
  pushw %ax
  movb $0x20, %al
1:
  outb %al, $0x20
  popw %ax
ignore:
  iretw

int08:
  pushw %ds
  pushl %eax
  xorw %ax, %ax
  movw %ax, %ds
  movl 0x46c, %eax
  incl %eax
  cmpl $0x1800b0, %eax                // midnight
  jb 1f
  xorl %eax, %eax
  movb $1, 0x470
1:
  movl %eax, 0x46c
  int $0x1c
  movb $0x20, %al
  outb %al, $0x20
  popl %eax
  popw %ds
  iretw

// A service's frame: its registers at BP, DS at the extended BIOS data area, ES as the caller has it, CF clear.
  .macro enter_service
  pushal
  pushw %ds
  pushw %es
  cld
  movw %sp, %bp
  movw $EBDA, %si
  movw %si, %ds
  movw F_ESI(%bp), %si
  andw $~CARRY, F_FLAGS(%bp)
  .endm

unsupported:
  movb $0x86, F_EAX + 1(%bp)
fail:
  orw $CARRY, F_FLAGS(%bp)
done:
  popw %es
  popw %ds
  popal
  iretw

int10:
  cmpb $0x0e, %ah
  jne 1f
  call putc
  iretw
1:
  enter_service
  cmpb $0x13, %ah
  je 3f
  cmpb $0x0f, %ah
  je 5f
  cmpb $0x03, %ah
  je 6f
  cmpb $0x09, %ah
  je 2f
  cmpb $0x0a, %ah
  jne done
2:
  jcxz done
  call putc
  loop 2b
  jmp done
3:
  jcxz done
  movw F_EBP(%bp), %si
4:
  lodsb %es:(%si), %al
  call putc
  testb $2, F_EAX(%bp)                // characters with attributes
  jz 7f
  incw %si
7:
  loop 4b
  jmp done
5:
  movw $0x5003, F_EAX(%bp)
  movb $0, F_EBX + 1(%bp)
  jmp done
6:
  movw $0x0607, F_ECX(%bp)
  movw $0, F_EDX(%bp)
  jmp done

int11:
  movw $0x0222, %ax
  iretw

int12:
  movw $639, %ax
  iretw

int13:
  enter_service
  cmpb $0x80, %dl
  jne disk_bad
  movb %ah, %bl
  movl $0x7c00, %esi                  // without a descriptor: the boot sector
  movl $1, %edi
  cmpl $0x424d5653, DESCRIPTOR
  jne 1f
  cmpl $0, DESCRIPTOR_DISK
  je 1f
  movl DESCRIPTOR_DISK, %esi
  movl DESCRIPTOR_SECTORS, %edi
1:                                    // ESI the image, EDI its sectors
  testb %bl, %bl
  jz disk_ok
  cmpb $0x01, %bl
  je disk_last
  cmpb $0x02, %bl
  je disk_read
  cmpb $0x03, %bl
  je disk_protected
  cmpb $0x04, %bl
  je disk_ok
  cmpb $0x08, %bl
  je disk_geometry
  cmpb $0x15, %bl
  je disk_type
  cmpb $0x41, %bl
  je disk_extensions
  cmpb $0x42, %bl
  je disk_extended_read
  cmpb $0x43, %bl
  je disk_protected
  cmpb $0x48, %bl
  je disk_extended_geometry
disk_bad:
  movb $0x01, %al
  jmp disk_error
disk_protected:
  movb $0x03, %al
  jmp disk_error
disk_not_found:
  movb $0x04, %al
disk_error:
  movb %al, DISK_STATUS
  movb %al, F_EAX + 1(%bp)
  jmp fail
disk_last:
  movb DISK_STATUS, %al
  movb %al, F_EAX + 1(%bp)
  jmp done
disk_ok:
  movb $0, DISK_STATUS
  movb $0, F_EAX + 1(%bp)
  jmp done

disk_read:                            // CHS of 16 heads and 63 sectors: LBA = (cylinder * 16 + head) * 63 + sector - 1
  movw F_ECX(%bp), %cx
  movzbl %ch, %eax
  movzbw %cl, %dx
  shlw $2, %dx
  movb %dh, %ah
  shll $4, %eax
  movzbl F_EDX + 1(%bp), %edx
  cmpb $16, %dl
  jae disk_bad
  addl %edx, %eax
  imull $63, %eax, %eax
  andl $63, %ecx
  jz disk_bad
  leal -1(%eax, %ecx), %eax
  movzbl F_EAX(%bp), %ecx
  movzwl F_EBX(%bp), %ebx
  movzwl F_ES(%bp), %edx
disk_copy:                            // EAX the LBA, ECX sectors, EDX:EBX where to
  shll $4, %edx
  addl %ebx, %edx
  subl %eax, %edi
  jbe disk_not_found
  cmpl %ecx, %edi
  jb disk_not_found
  shll $9, %eax
  addl %eax, %esi
  movl %edx, %edi
  shll $8, %ecx
  call copy
  jmp disk_ok

disk_extended_read:
  movw F_ESI(%bp), %bx
  movw F_DS(%bp), %ds
  movzwl 2(%bx), %ecx
  movl 8(%bx), %eax
  movl 12(%bx), %edx
  pushl 4(%bx)                        // offset, then segment
  movw $EBDA, %bx
  movw %bx, %ds
  popw %bx
  movzwl %bx, %ebx
  testl %edx, %edx
  popw %dx
  jnz disk_not_found
  movzwl %dx, %edx
  jmp disk_copy

disk_geometry:
  movl %edi, %eax
  call cylinders
  decw %ax
  movb %al, %ch
  shlb $6, %ah
  orb $63, %ah
  movb %ah, %cl
  movw %cx, F_ECX(%bp)
  movw $0x0f01, F_EDX(%bp)
  movb $0, F_EBX(%bp)
  jmp disk_ok

// EAX sectors -> EAX cylinders, 1 to 1024. Changes ECX, EDX.
cylinders:
  xorl %edx, %edx
  movl $(16 * 63), %ecx
  divl %ecx
  incl %eax
  cmpl $1024, %eax
  jbe 1f
  movl $1024, %eax
1:
  ret

disk_type:
  movw %di, F_EDX(%bp)
  shrl $16, %edi
  movw %di, F_ECX(%bp)
  movb $3, F_EAX + 1(%bp)
  jmp done

disk_extensions:
  cmpw $0x55aa, F_EBX(%bp)
  jne disk_bad
  movw $0xaa55, F_EBX(%bp)
  movb $0x21, F_EAX + 1(%bp)
  movw $1, F_ECX(%bp)                 // AH=42h-44h, 47h, 48h
  jmp done

disk_extended_geometry:
  movw F_ESI(%bp), %bx
  movl %edi, %eax
  call cylinders
  movw F_DS(%bp), %ds
  cmpw $26, (%bx)
  jb disk_bad_parameters
  movw $26, (%bx)
  movw $2, 2(%bx)                     // the geometry is valid
  movl %eax, 4(%bx)
  movl $16, 8(%bx)
  movl $63, 12(%bx)
  movl %edi, 16(%bx)
  movl $0, 20(%bx)
  movw $512, 24(%bx)
  movw $EBDA, %bx
  movw %bx, %ds
  jmp disk_ok
disk_bad_parameters:
  movw $EBDA, %bx
  movw %bx, %ds
  jmp disk_bad

// Copies ECX words from physical ESI to physical EDI, upwards. Changes AX, ECX, ESI, EDI.
copy:
  begin_flat
  rep movsw %ds:(%esi), %es:(%edi)
  end_flat
  ret

int14:
  enter_service
  movb %al, %bl
  cmpb $3, %ah
  je 2f
  cmpb $2, %ah
  je 1f
  cmpb $1, %ah
  jne done
  call putc
  jmp 2f
1:
  call wait_key
  movb %al, F_EAX(%bp)
  movb $0, F_EAX + 1(%bp)
  jmp done
2:
  movw $(COM1 + 5), %dx
  inb %dx, %al
  movb %al, F_EAX + 1(%bp)
  jmp done

int15:
  enter_service
  cmpw $0xe820, %ax
  je memory_map
  cmpw $0xe801, %ax
  je memory_sizes
  cmpw $0x4c4d, %ax
  je enter_long_mode
  cmpw $0xec00, %ax
  je service_ok
  cmpb $0x88, %ah
  je extended_memory
  cmpb $0x87, %ah
  je block_move
  cmpb $0x86, %ah
  je wait
  cmpb $0x24, %ah
  jne unsupported
  cmpb $2, %al                        // A20
  jb service_ok
  je 1f
  cmpb $3, %al
  jne unsupported
  movw $3, F_EBX(%bp)
  jmp service_ok
1:
  movb $1, F_EAX(%bp)
service_ok:
  movb $0, F_EAX + 1(%bp)
  jmp done

memory_map:
  cmpl $0x534d4150, F_EDX(%bp)
  jne unsupported
  cmpl $20, F_ECX(%bp)
  jb unsupported
  call build_map
  movzbl MAP_COUNT, %ecx
  movl F_EBX(%bp), %ebx
  cmpl %ecx, %ebx
  jae unsupported
  imulw $20, %bx, %si
  addw $MAP, %si
  movw F_EDI(%bp), %di
  movw $10, %cx
  rep movsw
  incl %ebx
  cmpb MAP_COUNT, %bl
  jb 1f
  xorl %ebx, %ebx
1:
  movl %ebx, F_EBX(%bp)
  movl $20, F_ECX(%bp)
  movl $0x534d4150, F_EAX(%bp)
  jmp done

memory_sizes:                         // KiB from 1 to 16 MiB, 64 KiB blocks from 16 MiB to the hole
  call extended_kib
  movl %eax, %ecx
  xorw %bx, %bx
  cmpl $0x3c00, %eax
  jbe 1f
  movl $0x3c00, %eax
  subl %eax, %ecx
  shrl $6, %ecx
  movw %cx, %bx
1:
  movw %ax, F_EAX(%bp)
  movw %ax, F_ECX(%bp)
  movw %bx, F_EBX(%bp)
  movw %bx, F_EDX(%bp)
  jmp done

extended_memory:
  call extended_kib
  cmpl $0xfc00, %eax
  jbe 1f
  movw $0xfc00, %ax
1:
  movw %ax, F_EAX(%bp)
  jmp done

// EAX: KiB of RAM from 1 MiB on, below 4 GiB. Changes ECX, ESI.
extended_kib:
  call build_map
  movzbw MAP_COUNT, %cx
  movw $MAP, %si
1:
  cmpl $0x100000, (%si)
  jne 2f
  cmpl $0, 4(%si)
  jne 2f
  cmpl $1, 16(%si)
  jne 2f
  movl 8(%si), %eax
  shrl $10, %eax
  ret
2:
  addw $20, %si
  loop 1b
  xorl %eax, %eax
  ret

block_move:                           // ES:SI a GDT: source at +10h, destination at +18h; CX words
  movw F_ESI(%bp), %bx
  movl %es:0x12(%bx), %esi
  andl $0xffffff, %esi
  movzbl %es:0x17(%bx), %eax
  shll $24, %eax
  orl %eax, %esi
  movl %es:0x1a(%bx), %edi
  andl $0xffffff, %edi
  movzbl %es:0x1f(%bx), %eax
  shll $24, %eax
  orl %eax, %edi
  movzwl F_ECX(%bp), %ecx
  call copy
  jmp service_ok

wait:                                 // CX:DX microseconds, by the 3.579545 MHz timer; more than 1000 s is 1000 s
  movw F_ECX(%bp), %ax
  shll $16, %eax
  movw F_EDX(%bp), %ax
  cmpl $1000000000, %eax
  jbe 1f
  movl $1000000000, %eax
1:
  movl $3579545, %ecx
  mull %ecx
  movl $1000000, %ecx
  divl %ecx
  movl %eax, %edi                     // ticks to go
  sti
  movw $PM_TIMER, %dx
  inl %dx, %eax
  cmpl $-1, %eax
  je unsupported
  movl %eax, %ecx
2:
  inl %dx, %eax
  movl %eax, %ebx
  subl %ecx, %eax
  andl $0xffffff, %eax
  movl %ebx, %ecx
  subl %eax, %edi
  ja 2b
  jmp service_ok

enter_long_mode:
  movl F_EBX(%bp), %eax
  movl %eax, SCRATCH
  xorl %ebx, %ebx
  movw %ss, %bx
  shll $4, %ebx
  movzwl %bp, %eax
  leal F_FLAGS + 2(%eax, %ebx), %eax
  movl %eax, SCRATCH + 4
  movl F_ECX(%bp), %eax
  movl %eax, SCRATCH + 8
  movl F_EDX(%bp), %eax
  movl %eax, SCRATCH + 12
  xorl %eax, %eax
  movl %eax, SCRATCH + 16
  movl %eax, SCRATCH + 20
  movl F_ESI(%bp), %esi
  movl F_EDI(%bp), %edi
  movl F_EBP(%bp), %ebp

// To 64-bit code, with ESI, EDI and EBP as they are; SCRATCH holds entry, stack, ECX, EDX and RBX.
long_mode:
  cli
  lidtl %cs:AT(no_idt)
  lgdtl %cs:AT(gdt_pointer)
  movl $0x620, %eax                   // PAE, OSFXSR, OSXMMEXCPT
  movl %eax, %cr4
  movl $TOP(page_map), %eax
  movl %eax, %cr3
  movl $0xc0000080, %ecx              // EFER: NXE, LME
  movl $0x900, %eax
  xorl %edx, %edx
  wrmsr
  movl $0x80000033, %eax              // PG, NE, ET, MP, PE
  movl %eax, %cr0
  ljmpl $0x18, $LINEAR(1f)
  .code64
1:
  movl $0x10, %eax
  movl %eax, %ds
  movl %eax, %es
  movl %eax, %ss
  xorl %eax, %eax
  movl %eax, %fs
  movl %eax, %gs
  movl $(EBDA * 16 + SCRATCH), %eax
  movl 4(%rax), %esp
  movl 8(%rax), %ecx
  movl 12(%rax), %edx
  movq 16(%rax), %rbx
  movl (%rax), %eax
  movl %esi, %esi
  movl %edi, %edi
  movl %ebp, %ebp
  jmp *%rax
  .code16

// Fills MAP if nobody has asked yet.
build_map:
  cmpb $0, MAP_COUNT
  je 1f
  ret
1:
  pushal
  pushw %es
  movw %ds, %ax
  movw %ax, %es
  xorw %ax, %ax
  call fw_cfg_select
  movw $4, %cx
  call fw_cfg_scratch
  cmpl $0x554d4551, SCRATCH           // "QEMU"
  jne map_from_cmos
  movw $0x19, %ax                     // the directory: a count, then size, selector and name of each file, big-endian
  call fw_cfg_select
  movw $4, %cx
  call fw_cfg_scratch
  movl SCRATCH, %ebx
  bswapl %ebx
2:
  testl %ebx, %ebx
  jz map_from_cmos
  decl %ebx
  movw $64, %cx
  call fw_cfg_scratch
  movw $(SCRATCH + 8), %di
  movw $AT(name_e820), %si
  movw $9, %cx
  repe cmpsb %es:(%di), %cs:(%si)
  jne 2b

  movl SCRATCH, %eax
  bswapl %eax
  xorl %edx, %edx
  movl $20, %ecx
  divl %ecx
  movl %eax, %ebx
  cmpl $((MAP_END - MAP) / 20 - 3), %ebx
  jbe 3f
  movl $((MAP_END - MAP) / 20 - 3), %ebx
3:
  movw SCRATCH + 4, %ax
  xchgb %al, %ah
  call fw_cfg_select
  movw $MAP, %di
4:
  testw %bx, %bx
  jz map_done
  decw %bx
  movw $20, %cx
  rep insb
  movl -20(%di), %eax                 // RAM from 0 to beyond 1 MiB in one piece?
  orl -16(%di), %eax
  jnz 4b
  cmpl $1, -4(%di)
  jne 4b
  movl -12(%di), %ecx
  movl -8(%di), %ebp
  subl $0x100000, %ecx
  sbbl $0, %ebp
  jc 4b
  pushw %dx
  subw $20, %di
  call map_below_1m
  movl $1, %edx
  call map_entry
  movl %ebp, -8(%di)
  popw %dx
  jmp 4b

map_from_cmos:
  movw $MAP, %di
  call map_below_1m
  movb $0x35, %al                     // 64 KiB blocks from 16 MiB on
  call cmos_pair
  jz 5f
  shll $16, %eax
  addl $0xf00000, %eax
  jmp 6f
5:
  movb $0x31, %al                     // KiB from 1 MiB on
  call cmos_pair
  shll $10, %eax
6:
  movl %eax, %ecx
  movl $0x100000, %eax
  movl $1, %edx
  call map_entry
  movb $0x5d, %al                     // 64 KiB blocks from 4 GiB on, 24 bits
  call cmos
  movzbl %al, %ebx
  shll $16, %ebx
  movb $0x5c, %al
  call cmos_pair
  orl %ebx, %eax
  jz map_done
  movl %eax, %ecx
  movl %eax, %ebx
  shll $16, %ecx
  shrl $16, %ebx
  xorl %eax, %eax
  movl $1, %edx
  call map_entry
  movl $1, -16(%di)
  movl %ebx, -8(%di)
map_done:
  movw %di, %ax
  subw $MAP, %ax
  movb $20, %cl
  xorl %edx, %edx
  movzwl %ax, %eax
  movl $20, %ecx
  divl %ecx
  movb %al, MAP_COUNT
  popw %es
  popal
  ret

// Entries for RAM, the extended BIOS data area and the BIOS area, at ES:DI; EAX is 1 MiB after. Keeps ECX.
map_below_1m:
  pushl %ecx
  xorl %eax, %eax
  movl $(EBDA * 16), %ecx
  movl $1, %edx
  call map_entry
  movl $(EBDA * 16), %eax
  movl $0x400, %ecx
  movl $2, %edx
  call map_entry
  movl $0xe0000, %eax
  movl $0x20000, %ecx
  call map_entry
  movl $0x100000, %eax
  popl %ecx
  ret

// An entry at ES:DI: base EAX, length ECX, type EDX. Changes EAX.
map_entry:
  stosl
  xorl %eax, %eax
  stosl
  movl %ecx, %eax
  stosl
  xorl %eax, %eax
  stosl
  movl %edx, %eax
  stosl
  ret

fw_cfg_select:
  movw $FW_CFG, %dx
  outw %ax, %dx
  incw %dx
  ret

// Reads CX bytes to SCRATCH.
fw_cfg_scratch:
  movw $SCRATCH, %di
  rep insb
  ret

// EAX: CMOS register AL as the high byte and the one below it as the low byte; ZF.
cmos_pair:
  movb %al, %ah
  call cmos
  xchgb %al, %ah
  decb %al
  call cmos
  movzwl %ax, %eax
  testl %eax, %eax
  ret

cmos:
  outb %al, $0x70
  inb $0x71, %al
  ret

// AL: the next key. Waits with interrupts on. Changes DX.
wait_key:
  cmpb $0, KEY_WAITS
  jne 2f
  movw $(COM1 + 5), %dx
1:
  inb %dx, %al
  testb $1, %al
  jnz 3f
  sti
  hlt
  cli
  jmp 1b
2:
  movb $0, KEY_WAITS
  movb KEY, %al
  ret
3:
  movw $COM1, %dx
  inb %dx, %al
  ret

// AX: the key AL with its scan code.
scan_code:
  xorb %ah, %ah
  cmpb $0x0d, %al
  jne 1f
  movb $0x1c, %ah
1:
  cmpb $0x1b, %al
  jne 2f
  movb $0x01, %ah
2:
  cmpb $0x7f, %al                     // terminals send DEL for backspace
  jne 3f
  movw $0x0e08, %ax
3:
  ret

int16:
  enter_service
  andb $0xef, %ah                     // the services of enhanced keyboards are the same
  jz 1f
  cmpb $1, %ah
  je 2f
  cmpb $2, %ah
  jne unsupported
  movb $0, F_EAX(%bp)
  jmp done
1:
  call wait_key
  call scan_code
  movw %ax, F_EAX(%bp)
  jmp done
2:
  cmpb $0, KEY_WAITS
  jne 3f
  movw $(COM1 + 5), %dx
  inb %dx, %al
  testb $1, %al
  jz 4f
  movw $COM1, %dx
  inb %dx, %al
  movb %al, KEY
  movb $1, KEY_WAITS
3:
  movb KEY, %al
  call scan_code
  movw %ax, F_EAX(%bp)
  andw $~ZERO, F_FLAGS(%bp)
  jmp done
4:
  orw $ZERO, F_FLAGS(%bp)
  jmp done

int1a:
  enter_service
  cmpb $1, %ah
  jb 1f
  je 2f
  cmpb $2, %ah
  je 3f
  cmpb $4, %ah
  jne unsupported
  movb $0x32, %al
  call cmos
  movb %al, F_ECX + 1(%bp)
  movb $9, %al
  call cmos
  movb %al, F_ECX(%bp)
  movb $8, %al
  call cmos
  movb %al, F_EDX + 1(%bp)
  movb $7, %al
  call cmos
  movb %al, F_EDX(%bp)
  jmp service_ok
1:
  xorw %ax, %ax
  movw %ax, %ds
  movw 0x46c, %ax
  movw %ax, F_EDX(%bp)
  movw 0x46e, %ax
  movw %ax, F_ECX(%bp)
  movb 0x470, %al
  movb %al, F_EAX(%bp)
  movb $0, 0x470
  jmp service_ok
2:
  xorw %ax, %ax
  movw %ax, %ds
  movw %dx, 0x46c
  movw %cx, 0x46e
  movb $0, 0x470
  jmp service_ok
3:
  movb $4, %al
  call cmos
  movb %al, F_ECX + 1(%bp)
  movb $2, %al
  call cmos
  movb %al, F_ECX(%bp)
  movb $0, %al
  call cmos
  movb %al, F_EDX + 1(%bp)
  movb $0, F_EDX(%bp)
  jmp service_ok

  .org SIZE - 16                      // the processor begins here, at FFFF:FFF0 below 4 GiB
  ljmpw $0xf000, $AT(post)
  .ascii "11/23/26"
  .byte 0, 0xfc, 0
swiftvmm_boot_rom_end:
  .section .note.GNU-stack, "", @progbits
