#include "TestGuests.h"
#include <string.h>

// What END in guest.h puts into the section of this name.
struct entry {
  const char *name;
  const uint8_t *start, *end;
};
extern const struct entry __start_test_guests[], __stop_test_guests[];

int test_processor_has_avx2(void) { return __builtin_cpu_supports("avx2") != 0; }

const uint8_t *test_guest(const char *name, long *size) {
  for (const struct entry *entry = __start_test_guests; entry < __stop_test_guests; entry++) {
    if (strcmp(entry->name, name)) continue;
    *size = entry->end - entry->start;
    return entry->start;
  }
  return 0;
}
