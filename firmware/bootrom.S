.section .rodata
.globl swiftvmm_boot_rom_start, swiftvmm_boot_rom_end
swiftvmm_boot_rom_start:
swiftvmm_boot_rom_end:
.section .note.GNU-stack,"",@progbits
