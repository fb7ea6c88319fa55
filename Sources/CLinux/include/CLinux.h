// The kernel's interfaces that the Swift importer does not bring over by itself.
//
// linux/ and asm/ are the kernel's UAPI headers (GPL-2.0 WITH Linux-syscall-note), taken unchanged from Debian's
// linux-libc-dev 7.2.12-1~bpo13+1: the distribution's own are older than the kernels swiftvmm runs on.
#pragma once
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <linux/kvm.h>

// ioctl numbers: _IO macros do not import.
static const unsigned long CLINUX_KVM_GET_API_VERSION = KVM_GET_API_VERSION;
static const unsigned long CLINUX_KVM_CREATE_VM = KVM_CREATE_VM;
static const unsigned long CLINUX_KVM_X86_SET_MSR_FILTER = KVM_X86_SET_MSR_FILTER;
static const unsigned long CLINUX_KVM_GET_MSR_INDEX_LIST = KVM_GET_MSR_INDEX_LIST;
static const unsigned long CLINUX_KVM_GET_MSR_FEATURE_INDEX_LIST = KVM_GET_MSR_FEATURE_INDEX_LIST;
static const unsigned long CLINUX_KVM_CHECK_EXTENSION = KVM_CHECK_EXTENSION;
static const unsigned long CLINUX_KVM_GET_VCPU_MMAP_SIZE = KVM_GET_VCPU_MMAP_SIZE;
static const unsigned long CLINUX_KVM_GET_SUPPORTED_CPUID = KVM_GET_SUPPORTED_CPUID;
static const unsigned long CLINUX_KVM_GET_EMULATED_CPUID = KVM_GET_EMULATED_CPUID;
static const unsigned long CLINUX_KVM_CREATE_VCPU = KVM_CREATE_VCPU;
static const unsigned long CLINUX_KVM_GET_DIRTY_LOG = KVM_GET_DIRTY_LOG;
static const unsigned long CLINUX_KVM_CLEAR_DIRTY_LOG = KVM_CLEAR_DIRTY_LOG;
static const unsigned long CLINUX_KVM_SET_USER_MEMORY_REGION = KVM_SET_USER_MEMORY_REGION;
static const unsigned long CLINUX_KVM_SET_TSS_ADDR = KVM_SET_TSS_ADDR;
static const unsigned long CLINUX_KVM_SET_IDENTITY_MAP_ADDR = KVM_SET_IDENTITY_MAP_ADDR;
static const unsigned long CLINUX_KVM_CREATE_IRQCHIP = KVM_CREATE_IRQCHIP;
static const unsigned long CLINUX_KVM_IRQ_LINE = KVM_IRQ_LINE;
static const unsigned long CLINUX_KVM_GET_IRQCHIP = KVM_GET_IRQCHIP;
static const unsigned long CLINUX_KVM_SET_IRQCHIP = KVM_SET_IRQCHIP;
static const unsigned long CLINUX_KVM_SET_GSI_ROUTING = KVM_SET_GSI_ROUTING;
static const unsigned long CLINUX_KVM_IRQFD = KVM_IRQFD;
static const unsigned long CLINUX_KVM_IOEVENTFD = KVM_IOEVENTFD;
static const unsigned long CLINUX_KVM_CREATE_PIT2 = KVM_CREATE_PIT2;
static const unsigned long CLINUX_KVM_GET_PIT2 = KVM_GET_PIT2;
static const unsigned long CLINUX_KVM_SET_PIT2 = KVM_SET_PIT2;
static const unsigned long CLINUX_KVM_SET_BOOT_CPU_ID = KVM_SET_BOOT_CPU_ID;
static const unsigned long CLINUX_KVM_SIGNAL_MSI = KVM_SIGNAL_MSI;
static const unsigned long CLINUX_KVM_SET_CLOCK = KVM_SET_CLOCK;
static const unsigned long CLINUX_KVM_GET_CLOCK = KVM_GET_CLOCK;
static const unsigned long CLINUX_KVM_SET_TSC_KHZ = KVM_SET_TSC_KHZ;
static const unsigned long CLINUX_KVM_GET_TSC_KHZ = KVM_GET_TSC_KHZ;
static const unsigned long CLINUX_KVM_RUN = KVM_RUN;
static const unsigned long CLINUX_KVM_GET_REGS = KVM_GET_REGS;
static const unsigned long CLINUX_KVM_SET_REGS = KVM_SET_REGS;
static const unsigned long CLINUX_KVM_GET_SREGS = KVM_GET_SREGS;
static const unsigned long CLINUX_KVM_SET_SREGS = KVM_SET_SREGS;
static const unsigned long CLINUX_KVM_GET_SREGS2 = KVM_GET_SREGS2;
static const unsigned long CLINUX_KVM_SET_SREGS2 = KVM_SET_SREGS2;
static const unsigned long CLINUX_KVM_TRANSLATE = KVM_TRANSLATE;
static const unsigned long CLINUX_KVM_INTERRUPT = KVM_INTERRUPT;
static const unsigned long CLINUX_KVM_GET_MSRS = KVM_GET_MSRS;
static const unsigned long CLINUX_KVM_SET_MSRS = KVM_SET_MSRS;
static const unsigned long CLINUX_KVM_GET_LAPIC = KVM_GET_LAPIC;
static const unsigned long CLINUX_KVM_SET_LAPIC = KVM_SET_LAPIC;
static const unsigned long CLINUX_KVM_SET_CPUID2 = KVM_SET_CPUID2;
static const unsigned long CLINUX_KVM_GET_CPUID2 = KVM_GET_CPUID2;
static const unsigned long CLINUX_KVM_GET_MP_STATE = KVM_GET_MP_STATE;
static const unsigned long CLINUX_KVM_SET_MP_STATE = KVM_SET_MP_STATE;
static const unsigned long CLINUX_KVM_NMI = KVM_NMI;
static const unsigned long CLINUX_KVM_SET_GUEST_DEBUG = KVM_SET_GUEST_DEBUG;
static const unsigned long CLINUX_KVM_GET_VCPU_EVENTS = KVM_GET_VCPU_EVENTS;
static const unsigned long CLINUX_KVM_SET_VCPU_EVENTS = KVM_SET_VCPU_EVENTS;
static const unsigned long CLINUX_KVM_GET_DEBUGREGS = KVM_GET_DEBUGREGS;
static const unsigned long CLINUX_KVM_SET_DEBUGREGS = KVM_SET_DEBUGREGS;
static const unsigned long CLINUX_KVM_ENABLE_CAP = KVM_ENABLE_CAP;
static const unsigned long CLINUX_KVM_GET_XSAVE = KVM_GET_XSAVE;
static const unsigned long CLINUX_KVM_SET_XSAVE = KVM_SET_XSAVE;
static const unsigned long CLINUX_KVM_GET_XSAVE2 = KVM_GET_XSAVE2;
static const unsigned long CLINUX_KVM_GET_XCRS = KVM_GET_XCRS;
static const unsigned long CLINUX_KVM_SET_XCRS = KVM_SET_XCRS;
static const unsigned long CLINUX_KVM_RESET_DIRTY_RINGS = KVM_RESET_DIRTY_RINGS;
static const unsigned long CLINUX_KVM_SMI = KVM_SMI;
static const unsigned long CLINUX_KVM_KVMCLOCK_CTRL = KVM_KVMCLOCK_CTRL;
static const unsigned long CLINUX_KVM_GET_FPU = KVM_GET_FPU;
static const unsigned long CLINUX_KVM_SET_FPU = KVM_SET_FPU;
static const unsigned long CLINUX_KVM_SET_SIGNAL_MASK = KVM_SET_SIGNAL_MASK;
static const unsigned long CLINUX_KVM_SET_MEMORY_ATTRIBUTES = KVM_SET_MEMORY_ATTRIBUTES;
static const unsigned long CLINUX_KVM_HAS_DEVICE_ATTR = KVM_HAS_DEVICE_ATTR;
static const unsigned long CLINUX_KVM_GET_DEVICE_ATTR = KVM_GET_DEVICE_ATTR;
static const unsigned long CLINUX_KVM_SET_DEVICE_ATTR = KVM_SET_DEVICE_ATTR;
static const unsigned long long CLINUX_KVM_SYNC_X86_REGS = KVM_SYNC_X86_REGS;
static const unsigned long long CLINUX_KVM_SYNC_X86_SREGS = KVM_SYNC_X86_SREGS;
static const unsigned long long CLINUX_KVM_SYNC_X86_EVENTS = KVM_SYNC_X86_EVENTS;
// Flags whose macros do not import.
static const uint32_t CLINUX_KVM_MEM_LOG_DIRTY_PAGES = KVM_MEM_LOG_DIRTY_PAGES;
static const uint32_t CLINUX_KVM_MEM_READONLY = KVM_MEM_READONLY;
static const uint32_t CLINUX_KVM_IRQFD_FLAG_DEASSIGN = KVM_IRQFD_FLAG_DEASSIGN;
static const uint32_t CLINUX_KVM_IRQFD_FLAG_RESAMPLE = KVM_IRQFD_FLAG_RESAMPLE;
static const uint32_t CLINUX_KVM_IOEVENTFD_FLAG_DATAMATCH = KVM_IOEVENTFD_FLAG_DATAMATCH;
static const uint32_t CLINUX_KVM_IOEVENTFD_FLAG_PIO = KVM_IOEVENTFD_FLAG_PIO;
static const uint32_t CLINUX_KVM_IOEVENTFD_FLAG_DEASSIGN = KVM_IOEVENTFD_FLAG_DEASSIGN;
static const uint32_t CLINUX_KVM_CPUID_FLAG_SIGNIFCANT_INDEX = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
static const uint32_t CLINUX_KVM_GUESTDBG_USE_SW_BP = KVM_GUESTDBG_USE_SW_BP;
static const uint32_t CLINUX_KVM_GUESTDBG_USE_HW_BP = KVM_GUESTDBG_USE_HW_BP;
static const uint32_t CLINUX_KVM_GUESTDBG_BLOCKIRQ = KVM_GUESTDBG_BLOCKIRQ;
static const uint32_t CLINUX_KVM_DIRTY_GFN_F_DIRTY = KVM_DIRTY_GFN_F_DIRTY;
static const uint32_t CLINUX_KVM_DIRTY_GFN_F_RESET = KVM_DIRTY_GFN_F_RESET;
static const uint32_t CLINUX_KVM_DIRTY_GFN_F_MASK = KVM_DIRTY_GFN_F_MASK;

// Members of kvm_run's anonymous union import as computed properties, which have no address.
static inline void *clinux_kvm_mmio_data(struct kvm_run *run) { return run->mmio.data; }
static inline struct kvm_sync_regs *clinux_kvm_sync_regs(struct kvm_run *run) { return &run->s.regs; }
static inline uint64_t *clinux_kvm_hypercall_result(struct kvm_run *run) { return (uint64_t *)&run->hypercall.ret; }

// One CPUID leaf of the processor this program runs on.
struct clinux_cpuid_result {
  uint32_t eax, ebx, ecx, edx;
};
struct clinux_cpuid_result clinux_cpuid(uint32_t function, uint32_t index);

// Calls that glibc declares only under _GNU_SOURCE, which the importer does not set.

/// memfd_create(2) with close-on-exec, then sealed against shrinking: -1 and errno on failure.
int clinux_memory_file(const char *name, int64_t size);

/// epoll_pwait2(2) without a signal mask; a negative timeout waits for ever.
int clinux_epoll_wait(int epoll, struct epoll_event *events, int capacity, int64_t timeout_nanoseconds);

/// accept4(2) with close-on-exec, without the peer's address.
int clinux_accept(int listener);

/// Names the calling thread for debuggers; 15 bytes at most.
void clinux_name_thread(const char *name);

/// Thread ids and directed signals, for the kick that takes a vCPU thread out of KVM_RUN. The id is asked once a thread.
int clinux_gettid(void);
int clinux_tgkill(int process, int thread, int signal);

/// Installs a handler that does nothing, without SA_RESTART, so that the signal makes KVM_RUN return EINTR; and
/// unblocks the signal for the calling thread.
int clinux_install_kick_handler(int signal);

// Guest memory is shared with running vCPUs: every access is volatile, and naturally aligned ones are single.
#define CLINUX_VOLATILE(bits)                                                                     \
  typedef uint##bits##_t clinux_unaligned##bits __attribute__((aligned(1)));                      \
  static inline uint##bits##_t clinux_load##bits(const void *address) {                           \
    return *(const volatile clinux_unaligned##bits *)address;                                     \
  }                                                                                               \
  static inline void clinux_store##bits(void *address, uint##bits##_t value) {                    \
    *(volatile clinux_unaligned##bits *)address = value;                                          \
  }
CLINUX_VOLATILE(8)
CLINUX_VOLATILE(16)
CLINUX_VOLATILE(32)
CLINUX_VOLATILE(64)
#undef CLINUX_VOLATILE

/// Puts a terminal into raw mode: every key goes to the reader at once, unechoed. -1 and errno where it is no terminal.
///
/// Its former settings come back with clinux_terminal_restore, at exit(3), and when a fatal signal ends the process.
int clinux_terminal_raw(int terminal);
void clinux_terminal_restore(void);

/// Blocks `signals` in the calling thread and in those it starts later, and returns a signalfd(2) that reads them.
int clinux_signal_descriptor(const int *signals, int count);

// io_uring(7), as one thread uses it that both submits and reaps.

enum clinux_uring_operation { CLINUX_URING_READ, CLINUX_URING_WRITE, CLINUX_URING_SYNC_DATA, CLINUX_URING_SYNC };

struct clinux_uring {
  int file;
  unsigned entries, queued, sq_mask, cq_mask;
  unsigned *sq_head, *sq_tail, *sq_array, *cq_head, *cq_tail;
  void *rings, *submissions, *cq_entries;
  size_t rings_size, submissions_size;
};

/// Sets up a ring whose completions signal the eventfd `notifier` (none when negative); -1 and errno on failure.
int clinux_uring_open(struct clinux_uring *ring, unsigned entries, int notifier);
void clinux_uring_close(struct clinux_uring *ring);

/// Queues one operation; 0 where the submission queue is full. The vectors stay until the operation has completed. `in_bulk`: many
/// are under way, and how long one of them takes matters to nobody.
int clinux_uring_queue(struct clinux_uring *ring, enum clinux_uring_operation operation, int file,
                       const struct iovec *vectors, unsigned count, uint64_t offset, int in_bulk, uint64_t token);
/// Queues fallocate(2) of a range, for the write that is queued next and waits for it, whatever comes of it; 0 where there is no
/// room for both.
int clinux_uring_queue_allocation(struct clinux_uring *ring, int file, uint64_t offset, uint64_t length);


/// Hands what is queued to the kernel and waits for `wait_for` completions; -1 and errno on failure.
int clinux_uring_submit(struct clinux_uring *ring, unsigned wait_for);

/// Takes one completion; 0 where there is none.
int clinux_uring_reap(struct clinux_uring *ring, uint64_t *token, int32_t *result);

// Files: what glibc declares only under _GNU_SOURCE.

/// Has the descriptor `old` stand for what `file` stands for (dup3(2), closed by exec).
int clinux_replace_descriptor(int file, int old);
/// Takes (or, when `lock` is 0, gives up) a shared open-file-description lock on one byte (F_OFD_SETLK).
int clinux_lock_byte(int file, int64_t offset, int lock);
/// Whether another open file description holds a lock on the byte: 1 or 0; -1 and errno on failure.
int clinux_byte_is_locked(int file, int64_t offset);
/// fallocate(2) with the file's length kept.
int clinux_punch_hole(int file, int64_t offset, int64_t length);
/// fallocate(2): storage for a range, which reads as zeros where there was none; the file becomes longer. -1 with errno.
int clinux_allocate(int file, int64_t offset, int64_t length);
/// Begins to write what the page cache holds of the file, without waiting for it (sync_file_range(2)). -1 with errno.
int clinux_begin_writing(int file);

/// fallocate(2), which may make the file longer.
int clinux_zero_range(int file, int64_t offset, int64_t length);
/// lseek(2) to data or a hole at or after `offset`; -1 and errno (ENXIO past the last data) on failure.
int64_t clinux_seek_data(int file, int64_t offset);
int64_t clinux_seek_hole(int file, int64_t offset);
/// O_DIRECT.
extern const int clinux_direct_flag;

// userfaultfd(2): threads that touch a page that is not there wait until it is put there. -1 and errno on failure.

/// A non-blocking descriptor that is told of the kernel's own accesses, too.
int clinux_user_faults(void);
/// Begins for a mapping of a memory file, and ends; whoever waits then goes on.
int clinux_user_faults_begin(int file, void *start, uint64_t length);
int clinux_user_faults_end(int file, void *start, uint64_t length);
/// Has whoever waits for these pages look again.
int clinux_user_faults_wake(int file, void *start, uint64_t length);
/// Puts pages there and wakes who waits for them.
int clinux_user_faults_copy(int file, void *page, const void *bytes, uint64_t length);
int clinux_user_faults_zero(int file, void *page, uint64_t length);
/// Addresses of accesses that wait and were not told yet; 0 where there are none.
int clinux_user_faults_take(int file, uint64_t *addresses, int capacity);

// TAP interfaces (linux/if_tun.h). -1 and errno on failure.

/// Has an open /dev/net/tun stand for the TAP interface, whose frames have a virtio header of `header` bytes before them.
int clinux_tap_attach(int file, const char *name, int header);
/// What received frames may be: bits of TUN_F_*.
int clinux_tap_offload(int file, unsigned offloads);
