#define _GNU_SOURCE
#include "CLinux.h"
#include <fcntl.h>
#include <linux/falloc.h>
#include <unistd.h>

int clinux_replace_descriptor(int file, int old) { return dup3(file, old, O_CLOEXEC); }

int clinux_lock_byte(int file, int64_t offset, int lock) {
  struct flock request = {
      .l_type = lock ? F_RDLCK : F_UNLCK, .l_whence = SEEK_SET, .l_start = offset, .l_len = 1};
  return fcntl(file, F_OFD_SETLK, &request);
}

int clinux_byte_is_locked(int file, int64_t offset) {
  struct flock request = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = offset, .l_len = 1};
  if (fcntl(file, F_OFD_GETLK, &request) < 0) return -1;
  return request.l_type != F_UNLCK;
}

int clinux_punch_hole(int file, int64_t offset, int64_t length) {
  return fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
}

int clinux_zero_range(int file, int64_t offset, int64_t length) {
  return fallocate(file, FALLOC_FL_ZERO_RANGE, offset, length);
}

int64_t clinux_seek_data(int file, int64_t offset) { return lseek(file, offset, SEEK_DATA); }
int64_t clinux_seek_hole(int file, int64_t offset) { return lseek(file, offset, SEEK_HOLE); }

const int clinux_direct_flag = O_DIRECT;

int clinux_allocate(int file, int64_t offset, int64_t length) {
  return fallocate(file, 0, offset, length);
}

int clinux_begin_writing(int file) { return sync_file_range(file, 0, 0, SYNC_FILE_RANGE_WRITE); }
