/* Own the raw kernel calls: see kernel.h. Must not know regions, slots or windows.
 *
 * The structures below are the kernel's binary interface, written from its documentation, so that the library builds with
 * headers older than the kernel it runs on.
 */
#define _GNU_SOURCE
#include "kernel.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct uffd_api {
    uint64_t api, features, ioctls;
};
struct uffd_range {
    uint64_t start, len;
};
struct uffd_register {
    struct uffd_range range;
    uint64_t mode, ioctls;
};
struct uffd_copy {
    uint64_t dst, src, len, mode;
    int64_t copied;
};
struct uffd_protect {
    struct uffd_range range;
    uint64_t mode;
};
struct uffd_move {
    uint64_t dst, src, len, mode;
    int64_t moved;
};
struct scan_region {
    uint64_t start, end, categories;
};
struct scan {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define UFFD_API_NUMBER 0xaaull
#define DO_API _IOWR(0xaa, 0x3f, struct uffd_api)
#define DO_REGISTER _IOWR(0xaa, 0x00, struct uffd_register)
#define DO_UNREGISTER _IOR(0xaa, 0x01, struct uffd_range)
#define DO_WAKE _IOR(0xaa, 0x02, struct uffd_range)
#define DO_COPY _IOWR(0xaa, 0x03, struct uffd_copy)
#define DO_MOVE _IOWR(0xaa, 0x05, struct uffd_move)
#define DO_PROTECT _IOWR(0xaa, 0x06, struct uffd_protect)
#define DO_DEVICE_NEW _IO(0xaa, 0x00)
#define DO_SCAN _IOWR('f', 16, struct scan)

#define DONT_WAKE 1ull         /* of COPY and MOVE */
#define PROTECT_SET 1ull       /* of PROTECT */
#define PROTECT_DONT_WAKE 2ull /* with SET the kernel refuses it: nobody is woken then anyway */
#define PAGE_IS_PFNZERO (1ull << 5)

#ifndef __NR_userfaultfd
#error "no userfaultfd on this architecture"
#endif

static int status(long result) {
    return result < 0 ? -errno : 0;
}

/* On a stack of its own, in a process of its own that shares our memory: nothing but system calls. */
static int try_call(void *number) {
    const struct rlimit no_core = {1, 1}; /* 1 also keeps a core_pattern that is a pipe from being started */
    syscall(__NR_setrlimit, RLIMIT_CORE, &no_core);
    syscall(*(const long *)number, -1l, 0l, 0l, -1l, 0l, -1l);
    return 0;
}

bool pf_call_allowed(long number) {
    char stack[16384] __attribute__((aligned(16)));
    int result = 0;
    if (prctl(PR_GET_SECCOMP, 0, 0, 0, 0) == 0)
        return true;
    int pid = clone(try_call, stack + sizeof stack, CLONE_VM | CLONE_VFORK, &number);
    if (pid < 0)
        return false;
    while (waitpid(pid, &result, __WALL) < 0 && errno == EINTR)
        ;
    return WIFEXITED(result);
}

/* What would permit a userfaultfd that serves faults in kernel mode, if none of the ways was permitted. */
static void explain(int error, int device_error, char *why) {
    if (error == ENOSYS)
        pf_text(why, "this kernel has no userfaultfd (CONFIG_USERFAULTFD)");
    else
        pf_text(why, "userfaultfd is not permitted (errno %d, /dev/userfaultfd: %d): set vm.unprivileged_userfaultfd=1, "
                     "or grant /dev/userfaultfd or CAP_SYS_PTRACE; see seccomp", error, device_error);
}

int pf_uffd_open(int device, uint64_t features, char *why) {
    const int flags = O_CLOEXEC | O_NONBLOCK;
    int error = EPERM, device_error = 0, uffd = -1;
    if (pf_call_allowed(__NR_userfaultfd)) {
        uffd = (int)syscall(__NR_userfaultfd, flags);
        error = errno;
    }
    if (uffd < 0) {
        int own = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (own < 0) {
            device_error = errno;
        } else {
            uffd = ioctl(own, DO_DEVICE_NEW, flags);
            device_error = uffd < 0 ? errno : 0;
            close(own);
        }
        if (uffd < 0 && device >= 0)
            uffd = ioctl(device, DO_DEVICE_NEW, flags);
        if (uffd < 0) {
            explain(error, device_error, why);
            return -error;
        }
    }
    struct uffd_api api = {.api = UFFD_API_NUMBER, .features = features};
    if (ioctl(uffd, DO_API, &api)) {
        error = errno;
        close(uffd);
        pf_text(why, "userfaultfd lacks MOVE or asynchronous write protection: Linux 6.8 or later is needed (errno %d)",
                error);
        return error == EINVAL ? -EOPNOTSUPP : -error;
    }
    return uffd;
}

int pf_uffd_register(int uffd, uint64_t start, uint64_t bytes, uint64_t mode) {
    struct uffd_register request = {.range = {start, bytes}, .mode = mode};
    return status(ioctl(uffd, DO_REGISTER, &request));
}

int pf_uffd_unregister(int uffd, uint64_t start, uint64_t bytes) {
    struct uffd_range range = {start, bytes};
    const int result = status(ioctl(uffd, DO_UNREGISTER, &range));
    pf_uffd_wake(uffd, start, bytes);
    return result;
}

int pf_uffd_move(int uffd, uint64_t to, uint64_t from, uint64_t bytes) {
    struct uffd_move request = {.dst = to, .src = from, .len = bytes, .mode = DONT_WAKE};
    return status(ioctl(uffd, DO_MOVE, &request));
}

int pf_uffd_copy(int uffd, uint64_t to, const void *from, uint64_t bytes) {
    struct uffd_copy request = {.dst = to, .src = (uint64_t)(uintptr_t)from, .len = bytes, .mode = DONT_WAKE};
    return status(ioctl(uffd, DO_COPY, &request));
}

int pf_uffd_protect(int uffd, uint64_t start, uint64_t bytes, bool protect) {
    struct uffd_protect request = {.range = {start, bytes}, .mode = protect ? PROTECT_SET : PROTECT_DONT_WAKE};
    return status(ioctl(uffd, DO_PROTECT, &request));
}

int pf_uffd_wake(int uffd, uint64_t start, uint64_t bytes) {
    struct uffd_range range = {start, bytes};
    return status(ioctl(uffd, DO_WAKE, &range));
}

int pf_pagemap_open(void) {
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    return pagemap < 0 ? -errno : pagemap;
}

int pf_pagemap_read(int pagemap, uint64_t start, uint32_t pages, uint64_t *entries) {
    const size_t bytes = (size_t)pages * sizeof *entries;
    for (int tries = 0; tries < 8; tries++) {
        ssize_t got = pread(pagemap, entries, bytes, (off_t)(start / PF_PAGE * sizeof *entries));
        if (got == (ssize_t)bytes)
            return 0;
        if (got < 0 && errno != EINTR)
            return -errno;
    }
    return -EIO;
}

int pf_pagemap_zeros(int pagemap, uint64_t start, uint32_t pages, uint8_t *zero) {
    enum { MOST = 64 };
    struct scan_region found[MOST];
    const uint64_t end = start + (uint64_t)pages * PF_PAGE;
    for (uint32_t i = 0; i < pages; i++)
        zero[i] = 0;
    for (uint64_t from = start; from < end;) {
        struct scan request = {.size = sizeof request, .start = from, .end = end, .vec = (uint64_t)(uintptr_t)found,
                               .vec_len = MOST, .category_mask = PAGE_IS_PFNZERO, .return_mask = PAGE_IS_PFNZERO};
        int count = ioctl(pagemap, DO_SCAN, &request);
        if (count < 0)
            return -errno;
        for (int i = 0; i < count; i++)
            for (uint64_t at = found[i].start; at < found[i].end; at += PF_PAGE)
                zero[(at - start) / PF_PAGE] = 1;
        if (request.walk_end <= from)
            return -EIO;
        from = request.walk_end;
    }
    return 0;
}

#define POLICY_DEFAULT 0
#define POLICY_PREFERRED 1
#define OF_NODE 1ul
#define OF_ADDRESS 2ul
#define OF_ALLOWED 4ul
#define NODES 1024ul /* the most that Linux can be built for */

bool pf_hole(uint64_t start, uint32_t pages, uint32_t *tries) {
    const struct timespec pause = {.tv_nsec = 1000000};
    unsigned char there;
    for (uint32_t i = 0; i < pages; i++)
        if (!mincore((void *)(uintptr_t)(start + (uint64_t)i * PF_PAGE), PF_PAGE, &there) || errno != ENOMEM)
            return false;
    if (!*tries)
        return false;
    --*tries;
    nanosleep(&pause, NULL);
    return true;
}

bool pf_node_free(void) {
    unsigned long allowed[NODES / (8 * sizeof(long))] = {0};
    int policy = 0, nodes = 0;
    if (syscall(__NR_get_mempolicy, &policy, NULL, 0ul, NULL, 0ul) || policy != POLICY_DEFAULT ||
        syscall(__NR_get_mempolicy, NULL, allowed, NODES, NULL, OF_ALLOWED))
        return false;
    for (size_t i = 0; i < sizeof allowed / sizeof *allowed; i++)
        nodes += __builtin_popcountl(allowed[i]);
    return nodes > 1;
}

int pf_node_of(uint64_t address) {
    int node = 0;
    return syscall(__NR_get_mempolicy, &node, NULL, 0ul, address, OF_NODE | OF_ADDRESS) ? -errno : node;
}

void pf_node_prefer(int node) {
    unsigned long mask[NODES / (8 * sizeof(long))] = {0};
    const unsigned bits = 8 * sizeof *mask;
    if (node < 0 || (unsigned)node >= NODES) {
        syscall(__NR_set_mempolicy, POLICY_DEFAULT, NULL, 0ul);
        return;
    }
    mask[(unsigned)node / bits] = 1ul << (unsigned)node % bits;
    syscall(__NR_set_mempolicy, POLICY_PREFERRED, mask, NODES);
}

/* Only system calls here: the child is a copy of one thread among many that may hold any lock. */
static void __attribute__((noreturn)) twin_main(int read_end, int write_end) {
    char byte;
    syscall(__NR_close, write_end); /* or the pipe would never end */
    while (syscall(__NR_read, read_end, &byte, (size_t)1) < 0 && errno == EINTR)
        ;
    for (;;)
        syscall(__NR_exit_group, 0);
}

int pf_twin_start(struct pf_twin *twin) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC))
        return -errno;
    long pid = syscall(__NR_clone, 0ul, NULL, NULL, NULL, 0ul); /* no exit signal */
    if (pid == 0)
        twin_main(ends[0], ends[1]);
    int error = pid < 0 ? -errno : 0;
    close(ends[0]);
    if (error) {
        close(ends[1]);
        return error;
    }
    *twin = (struct pf_twin){.pid = (int)pid, .pipe = ends[1]};
    return 0;
}

void pf_twin_end(struct pf_twin *twin) {
    close(twin->pipe);
    while (waitpid(twin->pid, NULL, __WALL) < 0 && errno == EINTR)
        ;
    twin->pid = twin->pipe = -1;
}

static char *put_text(char *at, const char *end, const char *text) {
    while (*text && at < end)
        *at++ = *text++;
    return at;
}

static char *put_number(char *at, const char *end, int number) {
    char digits[12];
    int count = 0;
    unsigned rest = number < 0 ? 0u - (unsigned)number : (unsigned)number;
    do
        digits[count++] = (char)('0' + rest % 10);
    while (rest /= 10);
    if (number < 0)
        digits[count++] = '-';
    while (count && at < end)
        *at++ = digits[--count];
    return at;
}

void pf_text(char *text, const char *format, ...) {
    if (!text)
        return;
    const char *end = text + PF_TEXT - 1;
    char *at = text;
    va_list arguments;
    va_start(arguments, format);
    for (; *format && at < end; format++) {
        if (*format != '%') {
            *at++ = *format;
        } else if (*++format == 's') {
            at = put_text(at, end, va_arg(arguments, const char *));
        } else {
            at = put_number(at, end, va_arg(arguments, int));
        }
    }
    va_end(arguments);
    *at = 0;
}
