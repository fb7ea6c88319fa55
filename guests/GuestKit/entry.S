// Where a guest begins, and everything about it that is a table or needs its own calling convention.
//
// Every instruction of ring 0 may be emulated at a microsecond each, so the tables below are constants of the link: entry
// loads them and calls Swift, about thirty instructions after the first.

  .set TABLES, 0x100000               // guest.ld places .tables and .stubs here
  .set STUBS, 0x108000
  .set TRAMPOLINE, 0x8000             // where SMP.swift copies guest_trampoline; INIT/SIPI vector 8

  .set CODE64, 0x08
  .set DATA, 0x10
  .set CODE32, 0x18

// PVH: the note says where a loader enters in 32-bit protected mode with EBX at an hvm_start_info.
  .section .note.pvh, "a", @note
  .balign 4
  .long 4, 8, 18                      // name size, value size, XEN_ELFNOTE_PHYS32_ENTRY
  .asciz "Xen"
  .quad guest_entry32

  .section .tables, "aw", @progbits
  .globl guest_tss, guest_page_tables
guest_tss:                            // its address is written into the GDT below
  .long 0
  .quad 0, 0, 0                       // RSP0 (user.S sets it), RSP1, RSP2
  .quad 0
  .quad fault_stack_end               // IST1: double faults
  .quad 0, 0, 0, 0, 0, 0, 0
  .word 0, 104                        // no I/O permission bitmap
  .balign 16
guest_gdt:
  .quad 0
  .quad 0x00af9b000000ffff            // 0x08 kernel code
  .quad 0x00cf93000000ffff            // 0x10 kernel data
  .quad 0x00cf9b000000ffff            // 0x18 32-bit code, on the way up
  .quad 0x00cff3000000ffff            // 0x20 user data
  .quad 0x00affb000000ffff            // 0x28 user code
  .word 103, TABLES & 0xffff          // 0x30 TSS
  .byte (TABLES >> 16) & 0xff, 0x89, 0, TABLES >> 24
  .quad 0
guest_gdt_end:
  .balign 16
  .word 0, 0, 0
gdt_pointer:
  .word guest_gdt_end - guest_gdt - 1
  .quad guest_gdt
  .word 0, 0, 0
idt_pointer:
  .word 4095
  .quad idt

  .balign 4096
idt:                                  // vector 8 runs on IST1; ring 3 may raise 3 and 4 itself
  .set vector, 0
  .rept 256
  .set gate, 0x8e00
  .if vector == 8
  .set gate, 0x8e01
  .endif
  .if vector == 3 || vector == 4
  .set gate, 0xee00
  .endif
  .word (STUBS + 16 * vector) & 0xffff, CODE64, gate, (STUBS + 16 * vector) >> 16
  .quad 0
  .set vector, vector + 1
  .endr

  .balign 4096
guest_page_tables:                    // 4 GiB identity mapped; leaves are the supervisor's, uncached from the PCI hole up
  .quad page_directory_pointers + 7
  .fill 511, 8, 0
page_directory_pointers:
  .quad page_directories + 0x0007, page_directories + 0x1007, page_directories + 0x2007, page_directories + 0x3007
  .fill 508, 8, 0
page_directories:
  .set page, 0
  .rept 1536
  .quad page * 0x200000 + 0x83
  .set page, page + 1
  .endr
  .rept 512
  .quad page * 0x200000 + 0x9b
  .set page, page + 1
  .endr

  .bss
  .balign 4096
  .globl guest_handlers, guest_start_info, guest_ap_stack, guest_catch_stack
  .skip 16384
boot_stack_end:
  .skip 4096
fault_stack_end:
guest_handlers: .skip 256 * 8
guest_start_info: .skip 8
guest_ap_stack: .skip 8
guest_catch_stack: .skip 8

  .text
  .code32
guest_entry32:
  movl %ebx, guest_start_info
  movl $guest_page_tables, %eax
  movl %eax, %cr3
  movl $0x620, %eax                   // PAE; OSFXSR and OSXMMEXCPT for ring 3
  movl %eax, %cr4
  movl $0xc0000080, %ecx              // EFER: NXE, LME
  movl $0x900, %eax
  xorl %edx, %edx
  wrmsr
  movl $0x80010033, %eax              // PG, WP, NE, ET, MP, PE
  movl %eax, %cr0
  lgdtl gdt_pointer
  ljmpl $CODE64, $long_mode

  .code64
  .globl guest_entry64
guest_entry64:                        // plain ELF64: long mode already, RBX at an hvm_start_info if the loader has one
  cli
  movq %rbx, guest_start_info
  movq $guest_page_tables, %rax
  movl $0x620, %ecx
  movq %rcx, %cr4
  movl $0xc0000080, %ecx
  movl $0xd00, %eax                   // LMA is set: keep it
  xorl %edx, %edx
  wrmsr
  movq $guest_page_tables, %rax
  movq %rax, %cr3
  movl $0x80010033, %eax
  movq %rax, %cr0
  lgdt gdt_pointer
  movq $boot_stack_end, %rsp
  pushq $CODE64
  pushq $long_mode
  lretq

long_mode:
  movl $DATA, %eax
  movl %eax, %ds
  movl %eax, %es
  movl %eax, %ss
  xorl %eax, %eax
  movl %eax, %fs
  movl %eax, %gs
  movq $boot_stack_end, %rsp
  lidt idt_pointer
  movl $0x30, %eax
  ltr %ax
  xorl %ebp, %ebp
  call guest_start
halted:
  cli
  hlt
  jmp halted

// Another processor: SMP.swift copies this to TRAMPOLINE, points guest_ap_stack at a stack and sends INIT and SIPI.
  .section .rodata.trampoline, "a", @progbits
  .globl guest_trampoline, guest_trampoline_end
  .code16
guest_trampoline:
  cli
  movw %cs, %ax
  movw %ax, %ds
  lgdtl trampoline_gdt_pointer - guest_trampoline
  movl $0x33, %eax
  movl %eax, %cr0
  ljmpl $CODE32, $(TRAMPOLINE + trampoline32 - guest_trampoline)
  .code32
trampoline32:
  movl $guest_page_tables, %eax
  movl %eax, %cr3
  movl $0x620, %eax
  movl %eax, %cr4
  movl $0xc0000080, %ecx
  movl $0x900, %eax
  xorl %edx, %edx
  wrmsr
  movl $0x80010033, %eax
  movl %eax, %cr0
  ljmpl $CODE64, $ap_long_mode
  .balign 4
  .word 0
trampoline_gdt_pointer:
  .word guest_gdt_end - guest_gdt - 1
  .long guest_gdt
guest_trampoline_end:

  .text
  .code64
ap_long_mode:
  movl $DATA, %eax
  movl %eax, %ds
  movl %eax, %es
  movl %eax, %ss
  xorl %eax, %eax
  movl %eax, %fs
  movl %eax, %gs
  movq guest_ap_stack, %rsp
  lidt idt_pointer
  xorl %ebp, %ebp
  call guest_ap_start
  jmp halted

// Interrupts and exceptions: the stubs leave a struct interrupt_frame and call the vector's handler.
  .section .stubs, "ax", @progbits
  .set vector, 0
  .rept 256
  .balign 16
  .if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30
  .else
  pushq $0
  .endif
  pushq $vector
  jmp interrupt
  .set vector, vector + 1
  .endr

  .text
interrupt:
  pushq %rax
  pushq %rbx
  pushq %rcx
  pushq %rdx
  pushq %rsi
  pushq %rdi
  pushq %rbp
  pushq %r8
  pushq %r9
  pushq %r10
  pushq %r11
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  cld
  movq 120(%rsp), %rax
  movq guest_handlers(, %rax, 8), %rax
  movq %rsp, %rdi
  testq %rax, %rax
  jnz 1f
  movq $guest_unhandled, %rax
1:
  call *%rax
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %r11
  popq %r10
  popq %r9
  popq %r8
  popq %rbp
  popq %rdi
  popq %rsi
  popq %rdx
  popq %rcx
  popq %rbx
  popq %rax
  addq $16, %rsp
  iretq

// void guest_catch(body, argument): while body runs, guest_catch_stack is where an exception's handler goes back to.
  .globl guest_catch, guest_catch_resume
guest_catch:
  pushq %rbx
  pushq %rbp
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  movq %rsp, guest_catch_stack
  movq %rdi, %rax
  movq %rsi, %rdi
  call *%rax
guest_catch_resume:
  movq $0, guest_catch_stack
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbp
  popq %rbx
  ret

  .section .note.GNU-stack, "", @progbits
