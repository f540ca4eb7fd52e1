/* Own mmap and mremap that fail when a test says so, as kernels did that had unmapped the place by then. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/types.h>

extern int fail_maps;

void *__real_mmap(void *start, size_t bytes, int access, int how, int fd, off_t offset);
void *__real_mremap(void *from, size_t bytes, size_t then, int how, ...);
void *__wrap_mmap(void *start, size_t bytes, int access, int how, int fd, off_t offset);
void *__wrap_mremap(void *from, size_t bytes, size_t then, int how, ...);

int fail_maps; /* how many more onto a fixed place fail */

static void *fail(void *start, size_t bytes) {
    fail_maps--;
    munmap(start, bytes);
    errno = ENOMEM;
    return MAP_FAILED;
}

void *__wrap_mmap(void *start, size_t bytes, int access, int how, int fd, off_t offset) {
    if (fail_maps > 0 && how & (MAP_FIXED | MAP_FIXED_NOREPLACE))
        return fail(start, bytes);
    return __real_mmap(start, bytes, access, how, fd, offset);
}

void *__wrap_mremap(void *from, size_t bytes, size_t then, int how, ...) {
    va_list more;
    va_start(more, how);
    void *to = how & MREMAP_FIXED ? va_arg(more, void *) : NULL;
    va_end(more);
    if (fail_maps > 0 && to)
        return fail(to, then);
    return __real_mremap(from, bytes, then, how, to);
}
