// GUEST name, bits ... END name: position-independent code that the tests load by its name.
//
// The tests set the registers (RDI is an address, RDX a port, RAX a value, RCX a count) and see what leaves the guest:
// port 0x98 an exception nobody expected, 0x99 the end, 0x90 to 0x92 what a guest has to say on the way.
.intel_syntax noprefix

.macro GUEST name, bits=64
  .section .rodata.test_guests, "a", @progbits
  .code\bits
\name\()_start:
.endm

.macro END name
9: out 0x99, al
  jmp 9b
\name\()_end:
  .pushsection test_guests, "awR", @progbits
  .quad 1f, \name\()_start, \name\()_end
  .popsection
  .pushsection .rodata.test_guest_names, "a", @progbits
1: .asciz "\name"
  .popsection
.endm

.set READY, 0x90
.set HANDLED, 0x91
.set DATA, 0x100000
.set LOCAL_APIC, 0xfee00000
.set IO_APIC, 0xfec00000
