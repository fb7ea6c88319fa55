// libFuzzer as a library: SwiftPM gives an executable its own main, so the driver is called by it.
#pragma once
#include <stddef.h>
#include <stdint.h>
int LLVMFuzzerRunDriver(int *argc, char ***argv, int (*callback)(const uint8_t *data, size_t size));
