#define _GNU_SOURCE
#include "CLinux.h"
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

int clinux_memfd_create(const char *name, unsigned int flags) { return memfd_create(name, flags); }

int clinux_gettid(void) { return (int)syscall(SYS_gettid); }

int clinux_tgkill(int process, int thread, int signal) { return (int)syscall(SYS_tgkill, process, thread, signal); }

static void ignore(int signal) { (void)signal; }

int clinux_install_kick_handler(int signal) {
  struct sigaction action = {.sa_handler = ignore};
  sigemptyset(&action.sa_mask);
  return sigaction(signal, &action, 0);
}
