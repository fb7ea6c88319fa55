#define _GNU_SOURCE
#include "NativeRunner.h"

#include <cpuid.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

void native_enter(native_state *state, const void *code, uint32_t components);

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint8_t *page;
static size_t code_length;
static int raised;

static void handle(int signal, siginfo_t *info, void *context) {
  (void)info;
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  if (registers[REG_RIP] != (greg_t)page) {
    // Not ours: what it would have been without this handler.
    struct sigaction standard = {.sa_handler = SIG_DFL};
    sigaction(signal, &standard, NULL);
    return;
  }
  raised = (int)registers[REG_TRAPNO];
  registers[REG_RIP] += (greg_t)code_length;
}

uint32_t native_components(void) {
  uint32_t a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low & 7;
}

int native_run(native_state *state, const uint8_t *bytes, size_t length) {
  pthread_mutex_lock(&lock);
  if (!page) {
    page = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO};
    int signals[] = {SIGFPE, SIGILL, SIGSEGV, SIGBUS, SIGTRAP};
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) sigaction(signals[i], &action, NULL);
  }
  memcpy(page, bytes, length);
  page[length] = 0xc3;
  code_length = length;
  raised = -1;
  native_enter(state, page, native_components());
  int result = raised;
  pthread_mutex_unlock(&lock);
  return result;
}
