#define _GNU_SOURCE
#include "CLinux.h"
#include <cpuid.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clinux_memory_file(const char *name, int64_t size) {
  int file = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (file < 0) return -1;
  if (ftruncate(file, size) < 0 || fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK) < 0) {
    close(file);
    return -1;
  }
  return file;
}

int clinux_epoll_wait(int epoll, struct epoll_event *events, int capacity, int64_t timeout_nanoseconds) {
  struct timespec timeout = {.tv_sec = timeout_nanoseconds / 1000000000, .tv_nsec = timeout_nanoseconds % 1000000000};
  return epoll_pwait2(epoll, events, capacity, timeout_nanoseconds < 0 ? 0 : &timeout, 0);
}

int clinux_accept(int listener) { return accept4(listener, 0, 0, SOCK_CLOEXEC); }

void clinux_name_thread(const char *name) { pthread_setname_np(pthread_self(), name); }

int clinux_gettid(void) {
  static _Thread_local int id;
  if (!id) id = (int)syscall(SYS_gettid);
  return id;
}

int clinux_tgkill(int process, int thread, int signal) { return (int)syscall(SYS_tgkill, process, thread, signal); }

static void ignore(int signal) { (void)signal; }

int clinux_install_kick_handler(int signal) {
  struct sigaction action = {.sa_handler = ignore};
  sigemptyset(&action.sa_mask);
  if (sigaction(signal, &action, 0) < 0) return -1;
  // Whoever starts this program may have it blocked, and threads and programs inherit that.
  sigset_t mask;
  sigemptyset(&mask);
  sigaddset(&mask, signal);
  return pthread_sigmask(SIG_UNBLOCK, &mask, 0) == 0 ? 0 : -1;
}

struct clinux_cpuid_result clinux_cpuid(uint32_t function, uint32_t index) {
  struct clinux_cpuid_result result = {0};
  __cpuid_count(function, index, result.eax, result.ebx, result.ecx, result.edx);
  return result;
}
