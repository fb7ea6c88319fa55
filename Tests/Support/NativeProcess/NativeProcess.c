#define _GNU_SOURCE
#include "NativeProcess.h"

#include <cpuid.h>
#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define STATIC_FLAGS (1ull << 14 | 1ull << 21)  // NT and ID: sigreturn leaves them as they are.
#define TF 0x100ull

static native_arena *arena;
static uint8_t *code, *data;  // Writable.
static uint32_t batch, position;
static uint16_t repetitions;
static int started, handling;

// The child's FS base is the test's while it handles a signal: nothing here may touch thread-local storage.
#define BARE __attribute__((no_stack_protector))

BARE static long call(long number, long a, long b, long c, long d) {
  long result;
  register long r10 __asm__("r10") = d;
  __asm__ volatile("syscall" : "=a"(result) : "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
  return result;
}

BARE static void copy(void *to, const void *from, size_t count) {
  __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
}

static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

BARE void native_changes(const uint8_t *before, const uint8_t *after, native_result *result) {
  typedef uint64_t word __attribute__((may_alias, aligned(1)));
  const word *a = (const word *)before, *b = (const word *)after;
  uint32_t first = 0, end = NATIVE_WRITABLE_SIZE / 8;
  for (; first < end; first += 8) {
    uint64_t differs = 0;
    for (int i = 0; i < 8; i++) differs |= a[first + i] ^ b[first + i];
    if (differs) break;
  }
  if (first < end) {
    while (a[first] == b[first]) first++;
    while (a[end - 1] == b[end - 1]) end--;
  } else {
    first = end = 0;
  }
  uint64_t digest = 0;
  for (uint32_t i = first; i < end; i++) digest = (digest ^ b[i]) * 0x9e3779b97f4a7c15 + 1;
  result->first = first * 8;
  result->end = end * 8;
  result->digest = digest;
}

BARE static void take(native_result *result, ucontext_t *context) {
  greg_t *registers = context->uc_mcontext.gregs;
  native_registers *to = &result->registers;
  for (int i = 0; i < 16; i++) to->general[i] = (uint64_t)registers[order[i]];
  to->rip = (uint64_t)registers[REG_RIP];
  to->flags = (uint64_t)registers[REG_EFL];
  uint64_t selectors = (uint64_t)registers[REG_CSGSFS];
  to->selector[1] = (uint16_t)selectors;
  to->selector[2] = (uint16_t)(selectors >> 48);
  __asm__ volatile("mov %%es, %0" : "=rm"(to->selector[0]));
  __asm__ volatile("mov %%ds, %0" : "=rm"(to->selector[3]));
  __asm__ volatile("mov %%fs, %0" : "=rm"(to->selector[4]));
  __asm__ volatile("mov %%gs, %0" : "=rm"(to->selector[5]));
  __asm__ volatile("rdfsbase %0" : "=r"(to->fs_base));
  __asm__ volatile("rdgsbase %0" : "=r"(to->gs_base));
  const uint8_t *area = (const uint8_t *)context->uc_mcontext.fpregs;
  uint64_t present = *(const uint64_t *)(area + 512);
  to->control = present & 1 ? *(const uint16_t *)area : 0x37f;
  to->status = present & 1 ? *(const uint16_t *)(area + 2) : 0;
  to->valid = present & 1 ? area[4] : 0;
  to->mxcsr = *(const uint32_t *)(area + 24);
  for (int i = 0; i < 8; i++) {
    uint64_t *slot = (uint64_t *)to->stack[i];
    slot[0] = present & 1 ? *(const uint64_t *)(area + 32 + i * 16) : 0;
    slot[1] = present & 1 ? *(const uint16_t *)(area + 40 + i * 16) : 0;
  }
  for (int i = 0; i < 16; i++) {
    uint64_t *slot = (uint64_t *)to->vectors[i];
    for (int j = 0; j < 2; j++) {
      slot[j] = present & 2 ? *(const uint64_t *)(area + 160 + i * 16 + j * 8) : 0;
      slot[j + 2] = present & 4 ? *(const uint64_t *)(area + 576 + i * 16 + j * 8) : 0;
    }
  }
  result->vector = (int32_t)registers[REG_TRAPNO];
  result->error = (uint32_t)registers[REG_ERR];
  result->address = (uint64_t)registers[REG_CR2];
  native_changes(arena->data, data, result);
  copy(data + result->first, arena->data + result->first, result->end - result->first);
}

BARE static void set_static_flags(uint64_t flags) {
  __asm__ volatile("push %0\n\tpopfq" : : "r"((flags & STATIC_FLAGS) | 0x202) : "cc", "memory");
}

BARE static void load(const native_case *from, ucontext_t *context) {
  greg_t *registers = context->uc_mcontext.gregs;
  const native_registers *r = &from->registers;
  for (int i = 0; i < 16; i++) registers[order[i]] = (greg_t)r->general[i];
  registers[REG_RIP] = (greg_t)r->rip;
  registers[REG_EFL] = (greg_t)(r->flags | TF);
  registers[REG_CSGSFS] = (greg_t)((uint64_t)r->selector[1] | (uint64_t)r->selector[2] << 48);
  __asm__ volatile("mov %0, %%es" : : "rm"(r->selector[0]));
  __asm__ volatile("mov %0, %%ds" : : "rm"(r->selector[3]));
  __asm__ volatile("mov %0, %%fs" : : "rm"(r->selector[4]));
  __asm__ volatile("mov %0, %%gs" : : "rm"(r->selector[5]));
  __asm__ volatile("wrfsbase %0" : : "r"(r->fs_base));
  __asm__ volatile("wrgsbase %0" : : "r"(r->gs_base));
  uint8_t *area = (uint8_t *)context->uc_mcontext.fpregs;
  *(uint64_t *)(area + 512) |= 7;
  *(uint16_t *)area = r->control;
  *(uint16_t *)(area + 2) = r->status;
  area[4] = (uint8_t)r->valid;
  *(uint32_t *)(area + 24) = r->mxcsr;
  copy(area + 32, r->stack, 128);
  for (int i = 0; i < 16; i++) {
    copy(area + 160 + i * 16, r->vectors[i], 16);
    copy(area + 576 + i * 16, r->vectors[i] + 16, 16);
  }
  uint64_t offset = r->rip - NATIVE_CODE;
  for (int i = 0; i < from->length && offset + (uint64_t)i < NATIVE_CODE_SIZE; i++) code[offset + (uint64_t)i] = from->code[i];
  repetitions = from->repetitions;
  set_static_flags(r->flags);
}

BARE static void handle(int signal, siginfo_t *info, void *argument) {
  (void)info;
  // The instruction's AC is still set, where it was: no unaligned access before this.
  __asm__ volatile("push $0x202\n\tpopfq" : : : "cc", "memory");
  ucontext_t *context = argument;
  if (started) {
    const native_case *last = &arena->cases[batch & 1][position];
    // A fault of this handler's own: the parent gives up.
    if (signal == SIGUSR1 || handling) call(SYS_exit_group, 3, 0, 0, 0);
    handling = 1;
    if (context->uc_mcontext.gregs[REG_TRAPNO] == 1 && context->uc_mcontext.gregs[REG_RIP] == (greg_t)last->registers.rip &&
        repetitions) {
      repetitions--;
      handling = 0;
      set_static_flags((uint64_t)context->uc_mcontext.gregs[REG_EFL]);
      return;
    }
    take(&arena->results[batch & 1][position], context);
    uint64_t offset = last->registers.rip - NATIVE_CODE;
    for (int i = 0; i < last->length && offset + (uint64_t)i < NATIVE_CODE_SIZE; i++) code[offset + (uint64_t)i] = NATIVE_FILLER;
    position++;
  }
  while (!started || position == arena->count[batch & 1]) {
    if (started) {
      __atomic_store_n(&arena->done, batch, __ATOMIC_SEQ_CST);
      call(SYS_futex, (long)&arena->done, FUTEX_WAKE, 1, 0);
    }
    started = 1;
    uint32_t asked;
    while ((asked = __atomic_load_n(&arena->asked, __ATOMIC_SEQ_CST)) == batch)
      call(SYS_futex, (long)&arena->asked, FUTEX_WAIT, asked, 0);
    batch++;
    position = 0;
    // Another seed's data, perhaps.
    copy(data, arena->data, NATIVE_DATA_SIZE);
  }
  handling = 0;
  load(&arena->cases[batch & 1][position], context);
}

static void *map(uint64_t address, size_t size, int protection, int file, off_t offset) {
  void *mapped = mmap((void *)address, size, protection, MAP_SHARED | MAP_POPULATE | (address ? MAP_FIXED_NOREPLACE : 0), file, offset);
  if (mapped == MAP_FAILED || (address && mapped != (void *)address)) _exit(2);
  return mapped;
}

static void become(int file, pid_t parent) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(2);
  // What other tests of the process have mapped at addresses of their own choice is not there on the software side.
  if (munmap((void *)0x10000, 0x100000000 - 0x10000)) _exit(2);
  map(NATIVE_CODE, NATIVE_CODE_SIZE, PROT_READ | PROT_EXEC, file, 0);
  code = map(0, NATIVE_CODE_SIZE, PROT_READ | PROT_WRITE, file, 0);
  memset(code, NATIVE_FILLER, NATIVE_CODE_SIZE);
  data = map(0, NATIVE_DATA_SIZE, PROT_READ | PROT_WRITE, file, NATIVE_CODE_SIZE);
  map(NATIVE_DATA, NATIVE_WRITABLE_SIZE, PROT_READ | PROT_WRITE, file, NATIVE_CODE_SIZE);
  map(NATIVE_DATA + NATIVE_WRITABLE_SIZE, NATIVE_DATA_SIZE - NATIVE_WRITABLE_SIZE, PROT_READ, file,
      NATIVE_CODE_SIZE + NATIVE_WRITABLE_SIZE);
  size_t size = 1 << 18;
  stack_t stack = {
    .ss_sp = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0), .ss_size = size};
  if (stack.ss_sp == MAP_FAILED || sigaltstack(&stack, NULL)) _exit(2);
  struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
  int signals[] = {SIGFPE, SIGILL, SIGSEGV, SIGBUS, SIGTRAP, SIGUSR1};
  sigset_t set;
  sigemptyset(&set);
  for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) {
    sigaction(signals[i], &action, NULL);
    sigaddset(&set, signals[i]);
  }
  sigprocmask(SIG_UNBLOCK, &set, NULL);
  kill(getpid(), SIGUSR1);
  _exit(4);
}

native_arena *native_start(int *pid, const char **reason) {
  uint32_t a, b, c, d, low, high;
  *reason = NULL;
  if (!(getauxval(AT_HWCAP2) & 2)) {
    *reason = "the host has no FSGSBASE";
  } else if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) {
    *reason = "the host has no XSAVE";
  } else {
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 7) != 7) *reason = "the host has no AVX";
  }
  if (*reason) return NULL;
  int file = memfd_create("differential", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, NATIVE_CODE_SIZE + NATIVE_DATA_SIZE)) {
    *reason = "no shared memory";
    return NULL;
  }
  arena = mmap(NULL, sizeof *arena, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  pid_t parent = getpid();
  *pid = arena == MAP_FAILED ? -1 : fork();
  if (*pid == 0) become(file, parent);
  close(file);
  if (*pid < 0) {
    *reason = "no child process";
    return NULL;
  }
  return arena;
}

void native_submit(native_arena *arena, uint32_t batch, uint32_t count) {
  arena->count[batch & 1] = count;
  __atomic_store_n(&arena->asked, batch, __ATOMIC_SEQ_CST);
  call(SYS_futex, (long)&arena->asked, FUTEX_WAKE, 1, 0);
}

int native_await(native_arena *arena, int pid, uint32_t batch) {
  uint32_t done;
  while ((done = __atomic_load_n(&arena->done, __ATOMIC_SEQ_CST)) < batch) {
    struct timespec second = {.tv_sec = 1};
    call(SYS_futex, (long)&arena->done, FUTEX_WAIT, done, (long)&second);
    int status;
    if (__atomic_load_n(&arena->done, __ATOMIC_SEQ_CST) < batch && waitpid(pid, &status, WNOHANG) == pid) return status ? status : -1;
  }
  return 0;
}

void native_stop(native_arena *arena, int pid) {
  kill(pid, SIGKILL);
  waitpid(pid, NULL, 0);
  munmap(arena, sizeof *arena);
}
