// Interrupt controllers, their handlers and a second processor. A guest says READY once it can take the interrupt.
#include "guest.h"

.macro ENABLE_LOCAL_APIC
  mov esi, LOCAL_APIC
  mov dword ptr [rsi + 0xf0], 0x1ff
.endm

.macro SLEEP_WITH_INTERRUPTS
  out READY, al
1: sti
  hlt
  jmp 1b
.endm

// Handlers: say HANDLED with interrupts acknowledged.
GUEST handler
  out HANDLED, al
  iretq
END handler

// Counts at [RDI] what `breakpoints` raises, RCX of them.
GUEST handler_breakpoint
  inc qword ptr [rdi]
  iretq
END handler_breakpoint

GUEST breakpoints
1: inc rax
  int3
  cmp rax, rcx
  jne 1b
END breakpoints

GUEST handler_pic
  mov al, 0x20
  out 0x20, al
  out HANDLED, al
  iretq
END handler_pic

GUEST handler_apic
  push rsi
  mov esi, LOCAL_APIC
  mov dword ptr [rsi + 0xb0], 0
  pop rsi
  out HANDLED, al
  iretq
END handler_apic

// PICs at vectors 0x20 and 0x28 with IRQ 4 open.
GUEST pic
  mov al, 0x11
  out 0x20, al
  out 0xa0, al
  mov al, 0x20
  out 0x21, al
  mov al, 0x28
  out 0xa1, al
  mov al, 4
  out 0x21, al
  mov al, 2
  out 0xa1, al
  mov al, 1
  out 0x21, al
  out 0xa1, al
  mov al, 0xef
  out 0x21, al
  mov al, 0xff
  out 0xa1, al
  SLEEP_WITH_INTERRUPTS
END pic

// Counter 0 of the PIT in mode 2, and the read-back of its status in AL.
GUEST pit
  mov al, 0x34
  out 0x43, al
  mov al, 0x34
  out 0x40, al
  mov al, 0x12
  out 0x40, al
END pit

GUEST pitstatus
  mov al, 0xe2
  out 0x43, al
  in al, 0x40
END pitstatus

// Pin 20 of the IOAPIC with the redirection entry's low half in EDI, for processor 0.
GUEST ioapic
  ENABLE_LOCAL_APIC
  mov esi, IO_APIC
  mov dword ptr [rsi], 0x10 + 2 * 20 + 1
  mov dword ptr [rsi + 0x10], 0
  mov dword ptr [rsi], 0x10 + 2 * 20
  mov [rsi + 0x10], edi
  SLEEP_WITH_INTERRUPTS
END ioapic

GUEST apic
  ENABLE_LOCAL_APIC
  SLEEP_WITH_INTERRUPTS
END apic

// Only sleeps: what the controllers know is left as it was restored.
GUEST wait
  SLEEP_WITH_INTERRUPTS
END wait

// The local APIC's timer: vector 0x30, once, after EDI ticks.
GUEST timer
  ENABLE_LOCAL_APIC
  mov dword ptr [rsi + 0x3e0], 0xb
  mov dword ptr [rsi + 0x320], 0x30
  mov [rsi + 0x380], edi
  SLEEP_WITH_INTERRUPTS
END timer

// Opens for interrupts only after it has said so.
GUEST window
  out READY, al
  sti
  nop
1: pause
  jmp 1b
END window

// Starts processor 1 at 0x9000, then counts with it.
GUEST startprocessor
  ENABLE_LOCAL_APIC
  mov dword ptr [rsi + 0x310], 0x01000000
  mov dword ptr [rsi + 0x300], 0xc500
  mov dword ptr [rsi + 0x310], 0x01000000
  mov dword ptr [rsi + 0x300], 0x4609
  mov edi, 0xf000
  mov ecx, 1000
1: lock inc dword ptr [rdi]
  dec ecx
  jnz 1b
2: pause
  cmp byte ptr [rdi + 16], 1
  jne 2b
END startprocessor

GUEST secondprocessor, 16
  xor ax, ax
  mov ds, ax
  mov cx, 1000
1: lock inc dword ptr [0xf000]
  dec cx
  jnz 1b
  mov byte ptr [0xf010], 1
2: cli
  hlt
  jmp 2b
END secondprocessor
