// Ring-3 code with vector registers, which ring 0 must not use.
#include "CGuest.h"

// The sum of i * i + 0.5 for i below rounds, in doubles; exact while it is below 2^52.
void user_sse(uint64_t rounds) {
  double sum = 0;
  for (uint64_t i = 0; i < rounds; i++) sum += (double)(int64_t)i * (double)(int64_t)i + 0.5;
  user_call(0, (uint64_t)(int64_t)sum);
}

typedef uint32_t lanes __attribute__((vector_size(16)));

// A sum in four lanes, while timer interrupts come in: `state` holds what the kernel counts. Ends after `*target` of them.
void user_compute(volatile uint64_t *state) {
  lanes sum = {1, 2, 3, 4};
  const lanes step = {1, 10, 100, 1000};
  uint64_t rounds = 0;
  while (state[0] < state[1]) {
    for (int i = 0; i < 1000; i++) {
      sum += step;
      __asm__ volatile("" : "+x"(sum));
    }
    rounds += 1000;
  }
  uint32_t n = (uint32_t)rounds;
  int right = sum[0] == 1 + n && sum[1] == 2 + n * 10 && sum[2] == 3 + n * 100 && sum[3] == 4 + n * 1000;
  user_call(0, right ? rounds : 0);
}

typedef uint64_t wide __attribute__((vector_size(32)));

// As user_sse, in 256-bit registers.
__attribute__((target("avx2"))) void user_avx(uint64_t rounds) {
  wide sum = {0, 0, 0, 0}, value = {1, 2, 3, 4};
  const wide step = {4, 4, 4, 4};
  for (uint64_t i = 0; i < rounds; i++) {
    sum += value;
    value += step;
    __asm__ volatile("" : "+x"(sum), "+x"(value));
  }
  user_call(0, sum[0] + sum[1] + sum[2] + sum[3]);
}
