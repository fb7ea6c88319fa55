// The built-in boot ROM, assembled into the executable (bootrom.S).
#pragma once
#include <stdint.h>
extern const uint8_t swiftvmm_boot_rom_start[];
extern const uint8_t swiftvmm_boot_rom_end[];
