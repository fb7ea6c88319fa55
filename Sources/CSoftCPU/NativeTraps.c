#define _GNU_SOURCE
#include "CSoftCPU.h"
#include "NativeUnits.h"
#include <signal.h>
#include <ucontext.h>

struct trap {
  uint32_t mxcsr;
  uint32_t happened;
};

// Where the thread's floating-point exceptions go; 0 while it runs no unit.
static _Thread_local struct trap *volatile expected;
static struct sigaction others;

// The unit goes on with everything masked, so that it ends in the usual way.
static void on_exception(int signal, siginfo_t *info, void *context) {
  struct trap *trap = expected;
  if (trap) {
    struct _libc_fpstate *state = ((ucontext_t *)context)->uc_mcontext.fpregs;
    trap->mxcsr = state->mxcsr;
    trap->happened = 1;
    state->mxcsr |= 0x1f80;
  } else if (others.sa_flags & SA_SIGINFO) {
    others.sa_sigaction(signal, info, context);
  } else if (others.sa_handler == SIG_DFL || others.sa_handler == SIG_IGN) {
    // The instruction faults again.
    sigaction(signal, &(struct sigaction){.sa_handler = SIG_DFL}, 0);
  } else {
    others.sa_handler(signal);
  }
}

uint64_t soft_run_unmasked(
    soft_unit_code code, void *result, const void *a, const void *b, const void *c, uint64_t value, uint32_t *mxcsr,
    uint32_t *trapped) {
  // Looked at each time: whoever makes the terminal raw later takes the signal too.
  struct sigaction now;
  sigaction(SIGFPE, 0, &now);
  if (!(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != on_exception) {
    others = now;
    sigaction(SIGFPE, &(struct sigaction){.sa_sigaction = on_exception, .sa_flags = SA_SIGINFO | SA_NODEFER}, 0);
  }
  struct trap trap = {};
  expected = &trap;
  uint64_t rax = soft_run_mxcsr(code, result, a, b, c, value, mxcsr);
  expected = 0;
  if (trap.happened) *mxcsr = trap.mxcsr;
  *trapped = trap.happened;
  return rax;
}
