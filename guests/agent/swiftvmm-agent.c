// The agent in a Linux guest: answers swiftvmm's requests on the virtio port org.swiftvmm.agent.0 (docs/agent.md).
// One static program without libraries beside libc's; JSON of the protocol's small shapes only.
//
// swiftvmm-agent                       serves the port, and whoever asks the host through it by a socket
// swiftvmm-agent ask REQUEST [--KEY VALUE]...    sends one request to the host, prints its answer
// swiftvmm-agent snapshots list|attach|detach [--KEY VALUE]...    the same for snapshots of the disks
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <mntent.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define PORT "org.swiftvmm.agent.0"
// Whoever asks the host while the port is taken does it through the one that has it: root alone.
#define SOCKET "/run/swiftvmm-agent.socket"
#define LONGEST 16384
#define MOST_FROZEN 64
// A host that is gone must not leave the file systems frozen.
#define LONGEST_FREEZE 10000
#define LONGEST_ANSWER 10000
#define REQUEST_START "{\"id\": 1, "

static int frozen[MOST_FROZEN];
static int frozen_count;
static int64_t thaw_at;
// Who asks through this one.
static int listener = -1, client = -1;
static int64_t client_until;
static uint64_t client_id;

static int64_t now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000LL + time.tv_nsec / 1000000;
}

// The port's device, by the name that sysfs has for it.
static int open_port(void) {
  DIR *ports = opendir("/sys/class/virtio-ports");
  if (!ports) return -1;
  int port = -1;
  for (struct dirent *entry; port < 0 && (entry = readdir(ports));) {
    char path[512], name[128] = "";
    snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
    FILE *file = fopen(path, "re");
    if (!file) continue;
    if (fgets(name, sizeof name, file)) name[strcspn(name, "\n")] = 0;
    fclose(file);
    if (strcmp(name, PORT) != 0) continue;
    snprintf(path, sizeof path, "/dev/%s", entry->d_name);
    port = open(path, O_RDWR | O_CLOEXEC);
  }
  closedir(ports);
  return port;
}

static bool send_line(int file, const char *text) {
  size_t length = strlen(text);
  while (length > 0) {
    ssize_t count = write(file, text, length);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    text += count;
    length -= (size_t)count;
  }
  return true;
}

static int thaw(void) {
  int count = frozen_count;
  while (frozen_count > 0) {
    ioctl(frozen[--frozen_count], FITHAW, 0);
    close(frozen[frozen_count]);
  }
  thaw_at = 0;
  return count;
}

// Every file system that is on a disk; those that refuse are named in `error`.
static bool freeze(char *error, size_t size) {
  FILE *mounts = setmntent("/proc/self/mounts", "re");
  if (!mounts) return snprintf(error, size, "cannot read /proc/self/mounts"), false;
  sync();
  for (struct mntent *mount; (mount = getmntent(mounts));) {
    if (strncmp(mount->mnt_fsname, "/dev/", 5) != 0 || hasmntopt(mount, "ro")) continue;
    int folder = open(mount->mnt_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0) continue;
    if (frozen_count == MOST_FROZEN || ioctl(folder, FIFREEZE, 0) != 0) {
      bool isSkipped = errno == EOPNOTSUPP || errno == EBUSY; // cannot freeze, or mounted twice and frozen already
      if (!isSkipped) snprintf(error, size, "cannot freeze %.100s: %s", mount->mnt_dir, strerror(errno));
      close(folder);
      if (isSkipped) continue;
      endmntent(mounts);
      thaw();
      return false;
    }
    frozen[frozen_count++] = folder;
  }
  endmntent(mounts);
  thaw_at = now() + LONGEST_FREEZE;
  return true;
}

// The text or number of a member of a flat JSON object: its escapes stay as they are. False where it is not there.
static bool member(const char *line, const char *key, char *value, size_t size) {
  char quoted[64];
  snprintf(quoted, sizeof quoted, "\"%s\"", key);
  const char *place = strstr(line, quoted);
  if (!place) return false;
  place += strlen(quoted);
  while (isspace((unsigned char)*place)) place++;
  if (*place++ != ':') return false;
  while (isspace((unsigned char)*place)) place++;
  bool is_text = *place == '"';
  if (is_text) place++;
  size_t length = 0;
  while (*place && (is_text ? *place != '"' : *place != ',' && *place != '}' && !isspace((unsigned char)*place))) {
    if (length + 1 >= size) return false;
    value[length++] = *place++;
  }
  value[length] = 0;
  return true;
}

// What a page is to a host that moves this machine, by its flags (include/uapi/linux/kernel-page-flags.h).
enum { ORDINARY, PRIORITIZED, DEPRIORITIZED, IGNORED };

static int kind_of_page(uint64_t flags) {
  enum { DIRTY = 1 << 4, LRU = 1 << 5, ACTIVE = 1 << 6, WRITEBACK = 1 << 8, BUDDY = 1 << 10, MMAP = 1 << 11, ANON = 1 << 12,
    SWAPBACKED = 1 << 14, NOPAGE = 1 << 20, OFFLINE = 1 << 23 };
  if (flags & NOPAGE) return ORDINARY;
  if (flags & (BUDDY | OFFLINE)) return IGNORED; // free, or the balloon has it
  // Memory of files that are on disks: of running programs, or what can be read again.
  if (!(flags & LRU) || flags & (DIRTY | WRITEBACK | ANON | SWAPBACKED)) return ORDINARY;
  return flags & MMAP && flags & ACTIVE ? PRIORITIZED : flags & MMAP ? ORDINARY : DEPRIORITIZED;
}

// Runs of pages of each kind from a page on, in one line: shorter ones than `least` are left out, and what does not fit is
// for the next request.
static void page_hints(int port, const char *id, uint64_t first, uint64_t least) {
  enum { SHARE = (LONGEST - 512) / 3, CHUNK = 4096 };
  static char texts[IGNORED + 1][SHARE], reply[LONGEST];
  static uint64_t flags[CHUNK];
  size_t lengths[IGNORED + 1] = {0};
  int file = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
  if (file < 0) {
    snprintf(reply, sizeof reply, "{\"id\": %s, \"error\": \"cannot open /proc/kpageflags: %s\"}\n", id, strerror(errno));
    send_line(port, reply);
    return;
  }
  uint64_t page = first, start = first;
  int kind = ORDINARY;
  bool is_full = false, is_end = first > INT64_MAX / 8;
  while (!is_end && !is_full) {
    ssize_t got = pread(file, flags, sizeof flags, (off_t)(page * 8));
    if (got < 0 && errno == EINTR) continue;
    is_end = got < 8;
    ssize_t count = is_end ? 1 : got / 8; // the last run ends where there is nothing more
    for (ssize_t index = 0; index < count && !is_full; index++, page++) {
      int next = is_end ? ORDINARY : kind_of_page(flags[index]);
      if (next == kind) continue;
      if (kind != ORDINARY && page - start >= least) {
        char *text = texts[kind];
        size_t length = lengths[kind];
        int more = snprintf(text + length, SHARE - length, "%s%llu,%llu", length ? "," : "",
          (unsigned long long)start, (unsigned long long)(page - start));
        if (more < 0 || length + (size_t)more >= SHARE) {
          is_full = true;
          text[length] = 0;
          break;
        }
        lengths[kind] = length + (size_t)more;
      }
      kind = next;
      start = page;
    }
  }
  close(file);
  for (int each = PRIORITIZED; each <= IGNORED; each++) texts[each][lengths[each]] = 0;
  char next[40] = "null";
  if (is_full) snprintf(next, sizeof next, "%llu", (unsigned long long)start);
  snprintf(reply, sizeof reply,
    "{\"id\": %s, \"result\": {\"prioritized\":[%s],\"deprioritized\":[%s],\"ignored\":[%s],\"next\":%s}}\n", id,
    texts[PRIORITIZED], texts[DEPRIORITIZED], texts[IGNORED], next);
  send_line(port, reply);
}

static uint64_t number(const char *line, const char *key, uint64_t otherwise) {
  char text[32];
  return member(line, key, text, sizeof text) && *text && strspn(text, "0123456789") == strlen(text)
    ? strtoull(text, NULL, 10) : otherwise;
}

static int local_socket(bool is_listener) {
  int file = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = SOCKET};
  if (file < 0) return -1;
  if (is_listener) {
    unlink(SOCKET);
    umask(0177);
  }
  int status = is_listener ? bind(file, (struct sockaddr *)&name, sizeof name) || listen(file, 8)
                           : connect(file, (struct sockaddr *)&name, sizeof name);
  if (status == 0) return file;
  close(file);
  return -1;
}

static void end_client(void) {
  if (client >= 0) close(client);
  client = -1;
}

// Somebody wants to ask the host; one at a time.
static void take_client(int port) {
  int file = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
  if (file < 0) return;
  struct timeval second = {.tv_sec = 1};
  setsockopt(file, SOL_SOCKET, SO_RCVTIMEO, &second, sizeof second);
  if (now() > client_until) end_client();
  if (client >= 0) {
    send_line(file, "{\"id\": 1, \"error\": \"somebody else's request is being answered\"}\n");
    close(file);
    return;
  }
  char line[LONGEST], request[LONGEST + 32];
  size_t length = 0;
  while (length + 1 < sizeof line && !memchr(line, '\n', length)) {
    ssize_t got = read(file, line + length, sizeof line - 1 - length);
    if (got <= 0) break;
    length += (size_t)got;
  }
  line[length] = 0;
  const size_t start = sizeof REQUEST_START - 1;
  if (strncmp(line, REQUEST_START, start) != 0 || strchr(line, '\n') != line + length - 1) {
    close(file);
    return;
  }
  client = file;
  client_until = now() + LONGEST_ANSWER;
  // An answer that comes too late is nobody's.
  snprintf(request, sizeof request, "{\"id\": %llu, %s", (unsigned long long)++client_id, line + start);
  send_line(port, request);
}

static void answer(int port, const char *line) {
  char id[32], request[80], reply[512], error[256] = "";
  if (!member(line, "id", id, sizeof id)) return;
  if (strspn(id, "0123456789") != strlen(id)) return;
  if (!member(line, "request", request, sizeof request)) {
    if (client < 0 || strtoull(id, NULL, 10) != client_id) return;
    send_line(client, line);
    send_line(client, "\n");
    return end_client();
  }
  if (strcmp(request, "ping") == 0) {
    snprintf(reply, sizeof reply, "{\"id\": %s, \"result\": {}}\n", id);
  } else if (strcmp(request, "fs-freeze") == 0) {
    if (frozen_count > 0 || freeze(error, sizeof error))
      snprintf(reply, sizeof reply, "{\"id\": %s, \"result\": {\"frozen\": %d}}\n", id, frozen_count);
    else
      snprintf(reply, sizeof reply, "{\"id\": %s, \"error\": \"%s\"}\n", id, error);
  } else if (strcmp(request, "page-hints") == 0) {
    page_hints(port, id, number(line, "from", 0), number(line, "least", 8));
    return;
  } else if (strcmp(request, "fs-thaw") == 0) {
    snprintf(reply, sizeof reply, "{\"id\": %s, \"result\": {\"thawed\": %d}}\n", id, thaw());
  } else {
    snprintf(reply, sizeof reply, "{\"id\": %s, \"error\": \"unknown request\"}\n", id);
  }
  send_line(port, reply);
}

// Reads a line; false where none came in time, somebody else was served, or the port is gone (errno).
static bool read_line(int port, char *line, int timeout) {
  static char buffer[LONGEST];
  static size_t length;
  for (;;) {
    char *end = memchr(buffer, '\n', length);
    if (end) {
      size_t count = (size_t)(end - buffer);
      memcpy(line, buffer, count);
      line[count] = 0;
      length -= count + 1;
      memmove(buffer, end + 1, length);
      return true;
    }
    if (length == sizeof buffer) length = 0; // no line of the protocol is so long
    struct pollfd ready[] = {{.fd = port, .events = POLLIN}, {.fd = listener, .events = POLLIN}};
    errno = 0;
    int count = poll(ready, 2, timeout);
    if (count == 0 || (count < 0 && errno == EINTR)) return errno = ETIMEDOUT, false;
    if (ready[1].revents) take_client(port);
    if (!ready[0].revents) return errno = ETIMEDOUT, false;
    ssize_t got = read(port, buffer + length, sizeof buffer - length);
    if (got <= 0) return errno = EPIPE, false;
    length += (size_t)got;
  }
}

// Arguments of a request as members: numbers as they are, all else as text. False where they are no pairs or too long.
static bool add_members(char *line, size_t size, int count, char **words) {
  for (int index = 0; index < count; index += 2) {
    if (strncmp(words[index], "--", 2) != 0 || index + 1 == count) return false;
    const char *key = words[index] + 2, *value = words[index + 1];
    if (strpbrk(key, "\"\\\n") || strpbrk(value, "\"\\\n")) return false;
    bool is_number = *value && *value != '0' && strspn(value, "0123456789") == strlen(value);
    size_t length = strlen(line);
    const char *mark = is_number ? "" : "\"";
    int more = snprintf(line + length, size - length, ", \"%s\": %s%s%s", key, mark, value, mark);
    if (more < 0 || length + (size_t)more + 4 > size) return false;
  }
  strcat(line, "}\n");
  return true;
}

static int no_port(void) {
  fprintf(stderr, "swiftvmm-agent: there is no free port " PORT "; give the machine one with --agent\n");
  return 69;
}

// By the agent that serves the port, else by the port itself.
static int ask(const char *request, int count, char **words) {
  char line[LONGEST], id[32];
  snprintf(line, sizeof line, REQUEST_START "\"request\": \"%.64s\"", request);
  if (!add_members(line, sizeof line, count, words)) {
    fprintf(stderr, "swiftvmm-agent: arguments are --KEY VALUE, without quotes\n");
    return 64;
  }
  int port = local_socket(false);
  bool is_port = port < 0;
  if (is_port && (port = open_port()) < 0) return no_port();
  if (!send_line(port, line)) return perror("swiftvmm-agent: cannot write to the port"), 1;
  int64_t deadline = now() + LONGEST_ANSWER;
  while (now() < deadline) {
    if (!read_line(port, line, 1000)) {
      if (errno == ETIMEDOUT) continue;
      break;
    }
    if (!member(line, "id", id, sizeof id) || strstr(line, "\"request\"")) continue;
    if (is_port && strcmp(id, "1") != 0) continue;
    puts(line);
    return strstr(line, "\"error\"") ? 1 : 0;
  }
  fprintf(stderr, "swiftvmm-agent: the host does not answer\n");
  return 1;
}

int main(int count, char **words) {
  if (count >= 3 && strcmp(words[1], "ask") == 0) return ask(words[2], count - 3, words + 3);
  if (count >= 3 && strcmp(words[1], "snapshots") == 0) {
    const char *verbs[] = {"list", "attach", "detach"}, *requests[] = {"snapshots", "snapshot-attach", "snapshot-detach"};
    for (int verb = 0; verb < 3; verb++)
      if (strcmp(words[2], verbs[verb]) == 0) return ask(requests[verb], count - 3, words + 3);
  }
  if (count > 1) {
    fprintf(stderr, "usage: swiftvmm-agent [ask REQUEST | snapshots list|attach|detach] [--KEY VALUE]...\n");
    return 64;
  }
  int port = open_port();
  if (port < 0) return no_port();
  signal(SIGPIPE, SIG_IGN);
  listener = local_socket(true);
  if (listener < 0) fprintf(stderr, "swiftvmm-agent: no requests by " SOCKET ": %s\n", strerror(errno));
  send_line(port, "{\"event\": \"hello\", \"version\": 1, \"agent\": \"swiftvmm-agent\", \"system\": \"linux\"}\n");
  char line[LONGEST];
  for (;;) {
    int wait = thaw_at ? (int)(thaw_at - now()) : -1;
    if (thaw_at && wait <= 0) {
      thaw();
      continue;
    }
    if (read_line(port, line, wait)) {
      answer(port, line);
    } else if (errno != ETIMEDOUT) {
      // Nobody listens at the other end just now.
      struct timespec pause = {.tv_nsec = 100000000};
      nanosleep(&pause, NULL);
    }
  }
}
