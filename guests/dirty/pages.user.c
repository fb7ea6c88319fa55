// Pages written and verified, in ring 3: where ring 0 is emulated, this runs at the processor's own speed.
#include "CDirty.h"
#include "CGuest.h"

static uint64_t next_random(uint64_t *state) {  // xorshift (Marsaglia, 2003)
  uint64_t x = *state;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return *state = x;
}

static uint64_t checksum(uint64_t number, uint64_t generation) {
  uint64_t mixed = (number * 0x9e3779b97f4a7c15) ^ (generation * 0xbf58476d1ce4e5b9);
  return mixed ^ mixed >> 29;
}

static volatile uint32_t *generation(const struct dirty_area *area, uint64_t page) {
  return (volatile uint32_t *)area->generations + page;
}

static const uint64_t *body(const struct dirty_worker *worker, uint64_t sum) {
  return (const uint64_t *)worker->pool + sum % DIRTY_POOL_PLACES;
}

static uint64_t page_sum(const struct dirty_area *area, uint64_t page) {
  return checksum(area->first + page, *generation(area, page));
}

static void write_page(struct dirty_worker *worker, const struct dirty_area *area, uint64_t page) {
  uint32_t next = *generation(area, page) + 1;
  uint64_t sum = checksum(area->first + page, next);
  uint64_t *words = (uint64_t *)(area->address + page * 4096);
  words[0] = area->first + page;
  words[1] = next;
  words[2] = sum;
  copy_words64((uint64_t)(words + 3), (uint64_t)body(worker, sum), 509);
  *generation(area, page) = next;
}

static int verify(struct dirty_worker *worker, uint64_t number, uint64_t page) {
  const struct dirty_area *area = &worker->area[number];
  uint64_t sum = page_sum(area, page);
  const volatile uint64_t *words = (const volatile uint64_t *)(area->address + page * 4096);
  const uint64_t *expected = body(worker, sum);
  uint64_t wrong = (words[0] ^ (area->first + page)) | (words[1] ^ *generation(area, page)) | (words[2] ^ sum);
  for (int i = 0; i < 509; i++) wrong |= words[3 + i] ^ expected[i];
  worker->verified++;
  if (!wrong) return 1;
  worker->failed = 1;
  worker->failed_area = number;
  worker->failed_page = page;
  return 0;
}

static uint64_t own_pages(const struct dirty_worker *worker, uint64_t area) {
  return worker->area[area].pages / worker->stride;
}

static uint64_t page_at(const struct dirty_worker *worker, uint64_t index) {
  return index * worker->stride + worker->number;
}

// In turn, any, or nine times in ten one of the first tenth.
static uint64_t choose(struct dirty_worker *worker, uint64_t own) {
  uint64_t index = worker->cursor;
  if (worker->pattern == DIRTY_LINEAR) {
    worker->cursor = index + 1 < own ? index + 1 : 0;
  } else {
    uint64_t among = own;
    if (worker->pattern == DIRTY_HOT && next_random(&worker->random) % 10 && own >= 10) among = own / 10;
    index = next_random(&worker->random) % among;
  }
  return page_at(worker, index);
}

// Each of the three areas that are verified is gone through with the same cursor.
static int check_another(struct dirty_worker *worker) {
  uint64_t index = worker->check_cursor++;
  for (uint64_t area = DIRTY_SET; area < DIRTY_FREE; area++) {
    uint64_t own = own_pages(worker, area);
    if (index < own) return verify(worker, area, page_at(worker, index));
    index -= own;
  }
  worker->check_cursor = 0;
  return 1;
}

static int write_next(struct dirty_worker *worker) {
  const struct dirty_area *set = &worker->area[DIRTY_SET];
  uint64_t page = choose(worker, own_pages(worker, DIRTY_SET));
  if (!verify(worker, DIRTY_SET, page)) return 0;
  worker->sum -= page_sum(set, page);
  write_page(worker, set, page);
  worker->sum += page_sum(set, page);
  worker->written++;
  return 1;
}

void dirty_fill(struct dirty_worker *worker) {
  uint64_t random = 0x5157494654564d4d;
  for (int i = 0; i < DIRTY_POOL_WORDS; i++) ((uint64_t *)worker->pool)[i] = next_random(&random);
  for (uint64_t area = 0; area < DIRTY_AREAS; area++) {
    for (uint64_t page = 0; page < worker->area[area].pages; page++) write_page(worker, &worker->area[area], page);
  }
  user_call(0, 0);
}

void dirty_begin(struct dirty_worker *worker) {
  for (uint64_t i = 0; i < own_pages(worker, DIRTY_SET); i++) {
    worker->sum += page_sum(&worker->area[DIRTY_SET], page_at(worker, i));
  }
  user_call(0, 0);
}

void dirty_round(struct dirty_worker *worker) {
  int right = 1;
  for (uint64_t i = 0; right && i < worker->writes; i++) right = write_next(worker);
  for (uint64_t i = 0; right && i < worker->checks; i++) right = check_another(worker);
  while (right && worker->reused < worker->reuse) write_page(worker, &worker->area[DIRTY_FREE], worker->reused++);
  if (right && worker->reused) verify(worker, DIRTY_FREE, next_random(&worker->random) % worker->reused);
  user_call(0, 0);
}

void dirty_finish(struct dirty_worker *worker) {
  int right = 1;
  uint64_t total = 0;
  for (uint64_t area = DIRTY_SET; area < DIRTY_FREE; area++) {
    for (uint64_t i = 0; right && i < own_pages(worker, area); i++) {
      uint64_t page = page_at(worker, i);
      right = verify(worker, area, page);
      if (area == DIRTY_SET) total += page_sum(&worker->area[area], page);
    }
  }
  for (uint64_t page = 0; right && page < worker->reused; page++) right = verify(worker, DIRTY_FREE, page);
  if (right && total != worker->sum) worker->failed = 2;
  user_call(0, 0);
}
