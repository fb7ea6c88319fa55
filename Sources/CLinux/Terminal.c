#define _GNU_SOURCE
#include "CLinux.h"
#include <signal.h>
#include <stdlib.h>
#include <sys/signalfd.h>
#include <termios.h>
#include <unistd.h>

static struct termios saved;
static volatile sig_atomic_t raw_terminal = -1;

void clinux_terminal_restore(void) {
  int terminal = raw_terminal;
  if (terminal < 0) return;
  raw_terminal = -1;
  tcsetattr(terminal, TCSANOW, &saved);
}

// Only calls that are safe in a signal handler; SA_RESETHAND makes the raised signal take its usual course.
static void restore_and_die(int signal) {
  clinux_terminal_restore();
  raise(signal);
}

int clinux_terminal_raw(int terminal) {
  if (tcgetattr(terminal, &saved) < 0) return -1;
  struct termios raw = saved;
  cfmakeraw(&raw);
  // Output keeps its line ends: the VMM's own messages share the terminal with the guest.
  raw.c_oflag |= OPOST | ONLCR;
  if (tcsetattr(terminal, TCSANOW, &raw) < 0) return -1;
  raw_terminal = terminal;
  static const int fatal[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGABRT, SIGFPE};
  struct sigaction action = {.sa_handler = restore_and_die, .sa_flags = SA_RESETHAND | SA_NODEFER};
  for (unsigned i = 0; i < sizeof fatal / sizeof *fatal; i++) sigaction(fatal[i], &action, 0);
  static int registered;
  if (!registered) registered = !atexit(clinux_terminal_restore);
  return 0;
}

int clinux_signal_descriptor(const int *signals, int count) {
  sigset_t set;
  sigemptyset(&set);
  for (int i = 0; i < count; i++) sigaddset(&set, signals[i]);
  if (pthread_sigmask(SIG_BLOCK, &set, 0) != 0) return -1;
  return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}
