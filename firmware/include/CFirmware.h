// The built-in boot ROM, assembled into the executable (bootrom.S).
#pragma once
#include <stdint.h>
extern const uint8_t swiftvmm_boot_rom_start[];
extern const uint8_t swiftvmm_boot_rom_end[];

// Swift does not import arrays without a size.
static inline const uint8_t *swiftvmm_boot_rom_start_address(void) { return swiftvmm_boot_rom_start; }
static inline long swiftvmm_boot_rom_size(void) { return swiftvmm_boot_rom_end - swiftvmm_boot_rom_start; }

// The first sector of a disk that starts a PVH kernel on other machines' BIOS (bootdisk.S).
extern const uint8_t swiftvmm_boot_disk_start[];
static inline const uint8_t *swiftvmm_boot_disk_start_address(void) { return swiftvmm_boot_disk_start; }
