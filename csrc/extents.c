/* Own the extents of the daemon's store in this process. */
#define _GNU_SOURCE
#include "extents.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "agent.h"
#include "kernel.h"
#include "link.h"

#define MOST_EXTENTS 65536u      /* address space only: 2.5 MiB, touched as far as used */
#define MOST_SLOTS (1u << 20)    /* 4 GiB */
#define TMPFS 0x01021994
#define SEAL_SHRINK 2
#define SEAL_GROW 4
#define SEAL_WRITE 8
#define SEAL_FUTURE_WRITE 16

static struct pf_extent_view *table;
static uint32_t used;
static uint32_t numbers; /* given out so far; a forked child goes on counting */

/* Sealed, so that nobody can write to a slot any more, punch it out or cut it off: the argument of window.c and our not
 * dying of SIGBUS rest on that, so it is asked of the kernel and not of the daemon. One thing cannot be asked and is assumed:
 * under SEAL_FUTURE_WRITE a writable mapping made before stays, and the daemon is believed to have none (store.py). */
static bool sealed(int fd, uint32_t slots) {
    struct stat about;
    struct statfs system;
    int seals = fcntl(fd, F_GET_SEALS);
    int mode = fcntl(fd, F_GETFL);
    return seals >= 0 && (seals & SEAL_SHRINK) && (seals & (SEAL_WRITE | SEAL_FUTURE_WRITE)) && mode >= 0 &&
           (mode & O_ACCMODE) != O_WRONLY && !(mode & O_PATH) && fstat(fd, &about) == 0 && S_ISREG(about.st_mode) &&
           about.st_size >= (off_t)slots * PF_PAGE && fstatfs(fd, &system) == 0 && system.f_type == TMPFS;
}

int pf_extent_take(uint32_t theirs, uint32_t slots, int fd) {
    if (theirs == 0 || slots == 0 || slots > MOST_SLOTS || pf_extent_find(theirs) || (fd >= 0 && !sealed(fd, slots))) {
        if (fd >= 0)
            close(fd);
        return -EINVAL;
    }
    if (table == NULL) {
        void *at = mmap(NULL, MOST_EXTENTS * sizeof *table, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at != MAP_FAILED)
            table = at;
    }
    if (table == NULL || used == MOST_EXTENTS || numbers >= PF_LINK_EXTENTS) {
        if (fd >= 0)
            close(fd);
        return -ENOMEM;
    }
    const uint8_t *bytes = NULL;
    if (fd >= 0) {
        void *at = mmap(NULL, (size_t)slots * PF_PAGE, PROT_READ, MAP_SHARED, fd, 0);
        if (at == MAP_FAILED) {
            close(fd);
            fd = -1;
        } else {
            bytes = at;
            madvise(at, (size_t)slots * PF_PAGE, MADV_DONTFORK);
            madvise(at, (size_t)slots * PF_PAGE, MADV_DONTDUMP);
        }
    }
    table[used++] = (struct pf_extent_view){theirs, ++numbers, slots, fd, bytes, false};
    return 0;
}

struct pf_extent_view *pf_extent_find(uint32_t theirs) {
    static uint32_t last; /* runs of a batch mostly go to one extent */
    if (last < used && table[last].theirs == theirs)
        return &table[last];
    for (uint32_t i = 0; i < used; i++)
        if (table[i].theirs == theirs)
            return &table[last = i];
    return NULL;
}

bool pf_extent_look(struct pf_extent_view *extent, uint32_t slot, uint32_t count) {
    extent->looked = true;
    return madvise((void *)(extent->bytes + (size_t)slot * PF_PAGE), (size_t)count * PF_PAGE, PF_MADV_POPULATE_READ) ==
               0 ||
           errno == EINVAL; /* before Linux 5.14: the window's own read does it */
}

static void drop(struct pf_extent_view *extent) {
    if (extent->looked) /* all of it: the kernel also mapped the neighbours of what we looked at */
        madvise((void *)extent->bytes, (size_t)extent->slots * PF_PAGE, MADV_DONTNEED);
    extent->looked = false;
}

void pf_extents_drop(void) {
    for (uint32_t i = 0; i < used; i++)
        drop(&table[i]);
}

static void release(struct pf_extent_view *extent) {
    if (extent->fd >= 0) {
        munmap((void *)extent->bytes, (size_t)extent->slots * PF_PAGE);
        close(extent->fd);
    }
}

bool pf_extent_release(uint32_t theirs) {
    struct pf_extent_view *extent = pf_extent_find(theirs);
    if (extent == NULL)
        return false;
    release(extent);
    *extent = table[--used];
    return true;
}

void pf_extents_release_all(void) {
    while (used > 0)
        release(&table[--used]);
}

void pf_extents_child(void) {
    used = 0;
}
