/* Own the hostile world of adverse.h. A refused MOVE is done in part, as when a page is being changed by others; a lie is told
 * after the work is complete, as Linux 6.18 does (window.md section 1). */
#include "adverse.h"

#ifdef TORTURE_ADVERSE
#undef ioctl
#undef mmap
#undef munmap
#undef mremap
#undef madvise
#undef memcmp
#endif

#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "chance.h"
#include "options.h"

static _Atomic int hostile;
static _Atomic uint64_t seeds;

void adverse_begin(uint64_t seed) {
    atomic_store(&seeds, seed);
    atomic_store(&hostile, 1);
}

void adverse_end(void) { atomic_store(&hostile, 0); }

#ifdef TORTURE_ADVERSE
#define UFFD_TYPE 0xaa
#define UFFD_REGISTER 0
#define UFFD_MOVE 5

struct move { /* as the kernel lays it out */
    uint64_t to, from, bytes, mode;
    int64_t moved;
};

static _Thread_local uint64_t stream;

int adverse_built(void) { return 1; }

static uint64_t *chance(void) {
    if (!stream)
        stream = mixed(atomic_fetch_add(&seeds, 1)) | 1;
    return &stream;
}

/* Give others time to come in between. Mostly nothing or little: long sleeps let fewer windows happen. */
static void hold_up(void) {
    if (!atomic_load(&hostile) || !options.delay || below(chance(), 4))
        return;
    uint32_t microseconds = below(chance(), options.delay + 1);
    struct timespec now, end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_nsec += microseconds * 1000l;
    if (microseconds > 100) {
        nanosleep(&(struct timespec){.tv_nsec = microseconds * 1000l}, NULL);
        return;
    }
    do
        clock_gettime(CLOCK_MONOTONIC, &now);
    while ((now.tv_sec - end.tv_sec) * 1000000000l + now.tv_nsec - end.tv_nsec < 0);
}

static int one_of(uint32_t number) { return atomic_load(&hostile) && number && !below(chance(), number); }

static int adverse_move(int file, unsigned long request, struct move *move) {
    uint64_t pages = move->bytes / 4096;
    if (one_of(options.refuse)) {
        move->bytes = below(chance(), (uint32_t)pages) * 4096ull;
        int result = move->bytes ? ioctl(file, request, move) : 0;
        move->bytes = pages * 4096;
        if (result)
            return result;
        move->moved = move->moved > 0 ? move->moved : -EAGAIN;
        errno = EAGAIN;
        return -1;
    }
    int result = ioctl(file, request, move);
    if (!result && one_of(options.lie)) {
        move->moved = -EEXIST;
        errno = EEXIST;
        return -1;
    }
    return result;
}

int adverse_ioctl(int file, unsigned long request, ...) {
    va_list words;
    va_start(words, request);
    void *argument = va_arg(words, void *);
    va_end(words);
    hold_up();
    int result;
    if (_IOC_TYPE(request) == UFFD_TYPE && _IOC_NR(request) == UFFD_MOVE)
        result = adverse_move(file, request, argument);
    else if (_IOC_TYPE(request) == UFFD_TYPE && _IOC_NR(request) == UFFD_REGISTER && one_of(options.refuse)) {
        errno = ENOMEM;
        result = -1;
    } else
        result = ioctl(file, request, argument);
    int error = errno;
    hold_up();
    errno = error;
    return result;
}

void *adverse_mmap(void *address, size_t bytes, int protection, int flags, int file, off_t offset) {
    hold_up();
    if (one_of(options.refuse)) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    void *result = mmap(address, bytes, protection, flags, file, offset);
    hold_up();
    return result;
}

int adverse_munmap(void *address, size_t bytes) {
    hold_up();
    return munmap(address, bytes);
}

void *adverse_mremap(void *address, size_t bytes, size_t more, int flags, ...) {
    va_list words;
    va_start(words, flags);
    void *to = flags & MREMAP_FIXED ? va_arg(words, void *) : NULL;
    va_end(words);
    hold_up();
    if (one_of(options.refuse)) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    void *result = mremap(address, bytes, more, flags, to);
    hold_up();
    return result;
}

int adverse_madvise(void *address, size_t bytes, int advice) {
    hold_up();
    int result = madvise(address, bytes, advice);
    hold_up();
    return result;
}

int adverse_memcmp(const void *one, const void *other, size_t bytes) {
    hold_up();
    int result = memcmp(one, other, bytes);
    hold_up();
    return result;
}
#else
int adverse_built(void) { return 0; }
#endif
