#define _GNU_SOURCE
#include "CLinux.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

// For kernels' headers that do not have the device yet.
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

int clinux_user_faults(void) {
  int file = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
  if (file < 0) {
    int code = errno;
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device >= 0) file = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    if (device >= 0) close(device);
    if (file < 0) {
      errno = code;
      return -1;
    }
  }
  struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};
  if (ioctl(file, UFFDIO_API, &api) == 0) return file;
  int code = errno;
  close(file);
  errno = code;
  return -1;
}

int clinux_user_faults_begin(int file, void *start, uint64_t length) {
  struct uffdio_register request = {
      .range = {.start = (uintptr_t)start, .len = length}, .mode = UFFDIO_REGISTER_MODE_MISSING};
  return ioctl(file, UFFDIO_REGISTER, &request);
}

int clinux_user_faults_end(int file, void *start, uint64_t length) {
  struct uffdio_range range = {.start = (uintptr_t)start, .len = length};
  return ioctl(file, UFFDIO_UNREGISTER, &range);
}

int clinux_user_faults_wake(int file, void *start, uint64_t length) {
  struct uffdio_range range = {.start = (uintptr_t)start, .len = length};
  return ioctl(file, UFFDIO_WAKE, &range);
}

int clinux_user_faults_copy(int file, void *page, const void *bytes, uint64_t length) {
  struct uffdio_copy copy = {.dst = (uintptr_t)page, .src = (uintptr_t)bytes, .len = length};
  return ioctl(file, UFFDIO_COPY, &copy);
}

int clinux_user_faults_zero(int file, void *page, uint64_t length) {
  struct uffdio_zeropage zero = {.range = {.start = (uintptr_t)page, .len = length}};
  return ioctl(file, UFFDIO_ZEROPAGE, &zero);
}

int clinux_user_faults_take(int file, uint64_t *addresses, int capacity) {
  struct uffd_msg messages[16];
  ssize_t got = read(file, messages, sizeof messages[0] * (capacity < 16 ? capacity : 16));
  if (got < 0) return errno == EAGAIN || errno == EINTR ? 0 : -1;
  int count = 0;
  for (size_t index = 0; index < got / sizeof messages[0]; index++)
    if (messages[index].event == UFFD_EVENT_PAGEFAULT) addresses[count++] = messages[index].arg.pagefault.address;
  return count;
}
