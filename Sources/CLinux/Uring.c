#define _GNU_SOURCE
#include "CLinux.h"
#include <errno.h>
#include <linux/io_uring.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

// The ring's layout and memory order: io_uring(7). One thread submits and reaps.

int clinux_uring_open(struct clinux_uring *ring, unsigned entries, int notifier) {
  memset(ring, 0, sizeof *ring);
  // Completions wait until the thread enters the kernel, instead of interrupting it; kernels before 5.19 cannot.
  struct io_uring_params parameters = {.flags = IORING_SETUP_COOP_TASKRUN};
  int file = (int)syscall(SYS_io_uring_setup, entries, &parameters);
  if (file < 0 && errno == EINVAL) {
    parameters = (struct io_uring_params){0};
    file = (int)syscall(SYS_io_uring_setup, entries, &parameters);
  }
  if (file < 0) return -1;
  // Kernels since 5.4 map both rings at once; older ones are left to the thread pool.
  if (!(parameters.features & IORING_FEAT_SINGLE_MMAP) || !(parameters.features & IORING_FEAT_NODROP)) {
    close(file);
    errno = ENOSYS;
    return -1;
  }
  size_t submission = parameters.sq_off.array + parameters.sq_entries * sizeof(unsigned);
  size_t completion = parameters.cq_off.cqes + parameters.cq_entries * sizeof(struct io_uring_cqe);
  ring->file = file;
  ring->entries = parameters.sq_entries;
  ring->rings_size = submission > completion ? submission : completion;
  ring->submissions_size = parameters.sq_entries * sizeof(struct io_uring_sqe);
  ring->rings = mmap(0, ring->rings_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file, IORING_OFF_SQ_RING);
  ring->submissions =
      mmap(0, ring->submissions_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file, IORING_OFF_SQES);
  if (ring->rings == MAP_FAILED || ring->submissions == MAP_FAILED ||
      (notifier >= 0 && syscall(SYS_io_uring_register, file, IORING_REGISTER_EVENTFD, &notifier, 1) < 0)) {
    int code = errno;
    clinux_uring_close(ring);
    errno = code;
    return -1;
  }
  char *base = ring->rings;
  ring->sq_head = (unsigned *)(base + parameters.sq_off.head);
  ring->sq_tail = (unsigned *)(base + parameters.sq_off.tail);
  ring->sq_array = (unsigned *)(base + parameters.sq_off.array);
  ring->sq_mask = *(unsigned *)(base + parameters.sq_off.ring_mask);
  ring->cq_head = (unsigned *)(base + parameters.cq_off.head);
  ring->cq_tail = (unsigned *)(base + parameters.cq_off.tail);
  ring->cq_mask = *(unsigned *)(base + parameters.cq_off.ring_mask);
  ring->cq_entries = base + parameters.cq_off.cqes;
  return 0;
}

void clinux_uring_close(struct clinux_uring *ring) {
  if (ring->rings && ring->rings != MAP_FAILED) munmap(ring->rings, ring->rings_size);
  if (ring->submissions && ring->submissions != MAP_FAILED) munmap(ring->submissions, ring->submissions_size);
  if (ring->file > 0) close(ring->file);
  memset(ring, 0, sizeof *ring);
}

// What an operation has whose outcome nobody minds.
static const uint64_t CLINUX_URING_NO_TOKEN = UINT64_MAX;

// Bytes from which a transfer is left to a worker, so that it does not hold up its submitter; in bulk, where nobody waits for one alone.
enum { CLINUX_URING_LARGE = 256 << 10, CLINUX_URING_LARGE_IN_BULK = 64 << 10 };

int clinux_uring_queue(struct clinux_uring *ring, enum clinux_uring_operation operation, int file,
                       const struct iovec *vectors, unsigned count, uint64_t offset, int in_bulk, uint64_t token) {
  unsigned tail = *ring->sq_tail;
  if (tail - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE) >= ring->entries) return 0;
  unsigned index = tail & ring->sq_mask;
  struct io_uring_sqe *entry = (struct io_uring_sqe *)ring->submissions + index;
  memset(entry, 0, sizeof *entry);
  entry->fd = file;
  entry->user_data = token;
  switch (operation) {
  case CLINUX_URING_READ:
  case CLINUX_URING_WRITE:
    entry->opcode = operation == CLINUX_URING_READ ? IORING_OP_READV : IORING_OP_WRITEV;
    entry->addr = (uint64_t)(uintptr_t)vectors;
    entry->len = count;
    entry->off = offset;
    // Copying so much from or to the page cache takes longer than handing it to a worker of the kernel's does.
    if (count > 0 && vectors[0].iov_len >= (in_bulk ? CLINUX_URING_LARGE_IN_BULK : CLINUX_URING_LARGE))
      entry->flags = IOSQE_ASYNC;
    break;
  case CLINUX_URING_SYNC_DATA:
  case CLINUX_URING_SYNC:
    entry->opcode = IORING_OP_FSYNC;
    entry->fsync_flags = operation == CLINUX_URING_SYNC_DATA ? IORING_FSYNC_DATASYNC : 0;
    break;
  }
  ring->sq_array[index] = index;
  __atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
  ring->queued++;
  return 1;
}

int clinux_uring_queue_allocation(struct clinux_uring *ring, int file, uint64_t offset, uint64_t length) {
  unsigned tail = *ring->sq_tail;
  if (tail - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE) + 1 >= ring->entries) return 0;
  unsigned index = tail & ring->sq_mask;
  struct io_uring_sqe *entry = (struct io_uring_sqe *)ring->submissions + index;
  memset(entry, 0, sizeof *entry);
  entry->opcode = IORING_OP_FALLOCATE;
  entry->flags = IOSQE_IO_HARDLINK;
  entry->fd = file;
  entry->off = offset;
  entry->addr = length;
  entry->user_data = CLINUX_URING_NO_TOKEN;
  ring->sq_array[index] = index;
  __atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
  ring->queued++;
  return 1;
}

int clinux_uring_submit(struct clinux_uring *ring, unsigned wait_for) {
  int submitted = (int)syscall(SYS_io_uring_enter, ring->file, ring->queued, wait_for,
                               wait_for ? IORING_ENTER_GETEVENTS : 0, 0, 0);
  if (submitted < 0) return -1;
  ring->queued -= (unsigned)submitted;
  return submitted;
}

int clinux_uring_reap(struct clinux_uring *ring, uint64_t *token, int32_t *result) {
  for (;;) {
    unsigned head = *ring->cq_head;
    if (head == __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE)) return 0;
    const struct io_uring_cqe *entry = (const struct io_uring_cqe *)ring->cq_entries + (head & ring->cq_mask);
    *token = entry->user_data;
    *result = entry->res;
    __atomic_store_n(ring->cq_head, head + 1, __ATOMIC_RELEASE);
    if (*token != CLINUX_URING_NO_TOKEN) return 1;
  }
}
