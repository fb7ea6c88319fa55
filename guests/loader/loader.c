// A loader of relocatable ELF64 modules (ELF-64, System V ABI AMD64 4.4). All of it is in its own pages; nothing that the
// kernel says is believed: modules come from the staging area and go to the arena that LOADER_SETUP named.
#include "CLoader.h"

#define CODE __attribute__((section(".loader.text"), noinline, used))
#define DATA __attribute__((section(".loader.data")))

enum { KERNEL = 1, LOADER = 2, R = 1, W = 2, X = 4, PAGE = 4096 };
enum { SYMTAB = 2, RELA = 4, NOBITS = 8, ALLOC = 2, EXEC = 4, SECTIONS = 64 };

struct header { uint8_t ident[16]; uint16_t type, machine; uint32_t version; uint64_t entry, phoff, shoff; uint32_t flags; uint16_t ehsize, phentsize, phnum, shentsize, shnum, shstrndx; };
struct section { uint32_t name, type; uint64_t flags, addr, offset, size; uint32_t link, info; uint64_t align, entsize; };
struct symbol { uint32_t name; uint8_t info, other; uint16_t shndx; uint64_t value, size; };
struct rela { uint64_t offset; uint32_t type, symbol; int64_t addend; };

DATA static struct { uint64_t arena, arena_size, staging, staging_size, service, mark; uint32_t hardened, slow, ready; } loader = {.mark = 0x5ec7e7};
DATA static uint64_t place[SECTIONS];
// The text and data pages of what is loaded at each page of the arena.
DATA static uint16_t text_pages[256], data_pages[256];

// Whole pages.
CODE static void clear(uint64_t to, uint64_t size) {
  uint64_t words = size / 8;
  __asm__ volatile("rep stosq" : "+D"(to), "+c"(words) : "a"(0) : "memory");
}

CODE static int allow(uint64_t start, uint64_t size, uint64_t views, uint64_t rights) {
  return !loader.hardened || size == 0 || harden_call(HARDEN_SET, start, size, views, rights) >= 0;
}

CODE static int inside(uint64_t start, uint64_t size, uint64_t area, uint64_t area_size) {
  return start >= area && size <= area_size && start - area <= area_size - size;
}

CODE static int is_symbol(const char *name, uint64_t left, const char *wanted) {
  for (uint64_t i = 0; i < left; i++) {
    if (name[i] != wanted[i]) return 0;
    if (!wanted[i]) return 1;
  }
  return 0;
}

// Where a symbol is; 0 for none. The kernel offers one function.
CODE static uint64_t address(uint64_t image, uint64_t size, struct section *symbols, struct section *strings, uint32_t index) {
  DATA static char offered[] = "kernel_service";
  if (index >= symbols->size / sizeof(struct symbol)) return 0;
  struct symbol *s = (struct symbol *)(image + symbols->offset) + index;
  if (s->shndx == 0) {
    if (s->name < strings->size && is_symbol((const char *)image + strings->offset + s->name, strings->size - s->name, offered)) return loader.service;
    return 0;
  }
  return s->shndx < SECTIONS && place[s->shndx] ? place[s->shndx] + s->value : 0;
}

// Lays the allocated sections out, executable ones first; returns the entry, `module_run`, or 0.
CODE static uint64_t link_module(uint64_t image, uint64_t size, uint64_t to, uint64_t room) {
  DATA static char wanted[] = "module_run";
  struct header *h = (struct header *)image;
  if (size < sizeof *h || h->ident[0] != 0x7f || h->ident[1] != 'E' || h->ident[2] != 'L' || h->ident[3] != 'F') return 0;
  if (h->type != 1 || h->machine != 62 || h->shnum > SECTIONS || h->shentsize != sizeof(struct section)) return 0;
  if (!inside(h->shoff, h->shnum * sizeof(struct section), 0, size)) return 0;
  struct section *s = (struct section *)(image + h->shoff), *symbols = 0;
  uint64_t used = 0, text = 0, page = (to - loader.arena) / PAGE;
  for (int pass = 0; pass < 2; pass++) {
    for (int i = 0; i < h->shnum; i++) {
      if (!pass) place[i] = 0;
      if (s[i].type != NOBITS && !inside(s[i].offset, s[i].size, 0, size)) return 0;
      if (s[i].type == SYMTAB) symbols = &s[i];
    }
    for (int i = 0; i < h->shnum; i++) {
      if (!(s[i].flags & ALLOC) || !!(s[i].flags & EXEC) == pass || s[i].size == 0) continue;
      uint64_t align = s[i].align ? s[i].align : 1;
      if (align > PAGE || (align & (align - 1))) return 0;
      used = (used + align - 1) & -align;
      if (used > room || s[i].size > room - used) return 0;
      place[i] = to + used;
      if (s[i].type != NOBITS) copy_words(place[i], image + s[i].offset, s[i].size);
      used += s[i].size;
    }
    used = (used + PAGE - 1) & -(uint64_t)PAGE;
    if (!pass) text = used;
  }
  if (used > room || !symbols || symbols->link >= h->shnum) return 0;
  text_pages[page] = text / PAGE;
  data_pages[page] = (used - text) / PAGE;
  struct section *strings = &s[symbols->link];
  for (int i = 0; i < h->shnum; i++) {
    if (s[i].type != RELA || s[i].info >= h->shnum || !place[s[i].info]) continue;
    struct rela *r = (struct rela *)(image + s[i].offset);
    for (uint64_t n = 0; n < s[i].size / sizeof *r; n++) {
      uint64_t target = address(image, size, symbols, strings, r[n].symbol);
      uint64_t width = r[n].type == 1 ? 8 : 4;
      if (!target || !inside(r[n].offset, width, 0, s[s[i].info].size)) return 0;
      uint64_t at = place[s[i].info] + r[n].offset, value = target + r[n].addend;
      switch (r[n].type) {
      case 1: *(uint64_t *)at = value; break;
      case 2: case 4: *(uint32_t *)at = (uint32_t)(value - at); break;
      case 10: case 11: *(uint32_t *)at = (uint32_t)value; break;
      default: return 0;
      }
    }
  }
  for (uint32_t i = 0; i < symbols->size / sizeof(struct symbol); i++) {
    struct symbol *sym = (struct symbol *)(image + symbols->offset) + i;
    if (sym->shndx && sym->name < strings->size && is_symbol((const char *)image + strings->offset + sym->name, strings->size - sym->name, wanted)) return address(image, size, symbols, strings, i);
  }
  return 0;
}

CODE static uint64_t unload(uint64_t to) {
  uint64_t page = (to - loader.arena) / PAGE;
  uint64_t size = (uint64_t)(text_pages[page] + data_pages[page]) * PAGE;
  if (!size) return 0;
  // Not executable before it can be written.
  if (!allow(to, size, KERNEL, R) || !allow(to, size, LOADER, R | W)) return 0;
  clear(to, size);
  text_pages[page] = data_pages[page] = 0;
  return allow(to, size, KERNEL, R | W);
}

CODE static uint64_t load(uint64_t image, uint64_t size, uint64_t to) {
  uint64_t pages = (size + PAGE - 1) & -(uint64_t)PAGE, room = loader.arena + loader.arena_size - to;
  // Nobody writes the module from here on, on any processor: what is checked is what is used.
  if (!allow(image, pages, KERNEL | LOADER, R)) return 0;
  uint64_t entry = 0;
  if (!loader.hardened || harden_call(HARDEN_VERIFY, image, size, 0, 0) >= 0) {
    // The time for another processor to change what has been checked: it is told, and answers.
    if (loader.slow) {
      volatile uint64_t *mailbox = (volatile uint64_t *)(loader.staging + loader.staging_size - 16);
      mailbox[0] = 1;
      while (!mailbox[1]) __asm__ volatile("pause");
    }
    if (room > 16 * PAGE) room = 16 * PAGE;
    if (allow(to, room, KERNEL, R) && allow(to, room, LOADER, R | W)) {
      uint64_t page = (to - loader.arena) / PAGE;
      entry = link_module(image, size, to, room);
      uint64_t text = text_pages[page] * PAGE, all = text + data_pages[page] * PAGE;
      if (entry && !(allow(to, text, LOADER, R) && allow(to, text, KERNEL, R | X))) entry = 0;
      if (!entry) {
        unload(to);
        all = 0;
      }
      if (!allow(to + (all ? text : 0), room - (all ? text : 0), KERNEL, R | W)) entry = 0;
    }
  }
  return allow(image, pages, KERNEL | LOADER, R | W) ? entry : 0;
}

CODE uint64_t loader_main(uint64_t operation, uint64_t a, uint64_t b, uint64_t c) {
  switch (operation) {
  case LOADER_SETUP:
    if (loader.ready) return 0;
    loader.arena = a;
    loader.arena_size = b & 0xffffff;
    loader.staging = a + loader.arena_size;
    loader.staging_size = loader.arena_size;
    loader.hardened = b >> 32 & 1;
    loader.slow = b >> 33 & 1;
    loader.service = c;
    loader.ready = 1;
    return 1;
  case LOADER_LOAD:
    if ((a | c) & (PAGE - 1) || !inside(a, b, loader.staging, loader.staging_size) || !inside(c, 16 * PAGE, loader.arena, loader.arena_size)) return 0;
    if (text_pages[(c - loader.arena) / PAGE]) return 0;
    return load(a, b, c);
  case LOADER_UNLOAD:
    if (a & (PAGE - 1) || !inside(a, PAGE, loader.arena, loader.arena_size)) return 0;
    return unload(a);
  case LOADER_SIGN: return loader.mark;
  case LOADER_WAIT:
    // Long enough for an interrupt.
    for (volatile uint64_t i = 0; i < a; i++) {}
    return loader.mark;
  default: return 0;
  }
}
