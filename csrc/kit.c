/* Own the kit: opening and closing it, write tracking, and moving pages back: see kit.h. Must not know slots or the daemon.
 */
#define _GNU_SOURCE
#include "kit.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include "kernel.h"

#define NO_KIT {.ready = false, .track = -1, .hold = -1, .pagemap = -1}
struct pf_kit pf_kit = NO_KIT;
struct pf_counts pf_counts_all;

/* The self-test asks the kernel, and that is the same for all children: once per family is enough. */
static bool tested;

static const uint64_t common_features = PF_UFFD_FEATURE_MOVE | PF_UFFD_FEATURE_PAGEFAULT_FLAG_WP |
                                        PF_UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
static const uint64_t track_features = PF_UFFD_FEATURE_WP_ASYNC | PF_UFFD_FEATURE_WP_UNPOPULATED;
/* No WP_ASYNC here: its writers shall wait. EVENT_REMAP keeps a registration alive through mremap: restore.c. */
static const uint64_t hold_features = PF_UFFD_FEATURE_EVENT_REMAP;

static void close_one(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void close_all(void) {
    pf_kit.ready = false;
    close_one(&pf_kit.track); /* ends all registrations */
    close_one(&pf_kit.hold);
    close_one(&pf_kit.pagemap);
    if (pf_kit.scratch)
        munmap(pf_kit.scratch, (PF_SCRATCH_PAGES + 1) * (size_t)PF_PAGE);
    pf_kit.scratch = pf_kit.barrier = NULL;
    pf_kit.used = 0;
}

/* Scratch is not forked: the child would make its pages shared, and then they could not be moved back. */
static int map_scratch(void) {
    const size_t bytes = PF_SCRATCH_PAGES * (size_t)PF_PAGE;
    uint8_t *memory = mmap(NULL, bytes + PF_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return -errno;
    pf_kit.scratch = memory;
    pf_kit.barrier = memory + bytes;
    if (mprotect(pf_kit.barrier, PF_PAGE, PROT_NONE) || madvise(memory, bytes, MADV_NOHUGEPAGE) ||
        madvise(memory, bytes + PF_PAGE, MADV_DONTFORK) || munlock(memory, bytes + PF_PAGE) ||
        madvise(memory, bytes, MADV_DONTNEED)) /* the last two: after mlockall(MCL_FUTURE) it is filled and locked */
        return -errno;
    /* MOVE asks for a registration of its destination, of any kind. Not MISSING: mlockall would wait for ever. */
    return pf_uffd_register(pf_kit.track, (uint64_t)(uintptr_t)memory, bytes, PF_UFFD_WP);
}

static int open_all(int device, char *why) {
    int error;
    if (sysconf(_SC_PAGESIZE) != PF_PAGE) {
        pf_text(why, "pages of this machine are not 4096 bytes");
        return -EOPNOTSUPP;
    }
    error = pf_kit.pagemap = pf_pagemap_open();
    if (error < 0) {
        pf_text(why, "/proc/self/pagemap cannot be opened (errno %d): is /proc mounted?", -error);
        return error;
    }
    error = pf_kit.track = pf_uffd_open(device, common_features | track_features, why);
    if (error < 0)
        return error;
    error = pf_kit.hold = pf_uffd_open(device, common_features | hold_features, why);
    if (error < 0)
        return error;
    error = map_scratch();
    if (error) {
        pf_text(why, "no memory or mapping for windows (errno %d)", -error);
        return error;
    }
    error = tested ? 0 : pf_selftest(why);
    tested = tested || !error;
    return error;
}

int pf_kit_open(int device, char why[PF_TEXT]) {
    pf_w_lock();
    int error = -EALREADY;
    if (pf_kit.ready) {
        pf_text(why, "windows are open already");
    } else {
        why[0] = 0;
        close_all();
        error = open_all(device, why);
        pf_kit.ready = !error;
        pf_kit.number++;
        if (error) {
            int pagemap = pf_kit.pagemap; /* plain swaps still read it */
            pf_kit.pagemap = -1;
            close_all();
            pf_kit.pagemap = pagemap;
        }
    }
    pf_w_unlock();
    return error;
}

static void shut(void) {
    struct pf_region *region;
    close_all();
    for (uint32_t i = 0; (region = pf_region_index(i)); i++)
        region->tracked = 0;
}

void pf_kit_close(void) {
    pf_w_lock();
    shut();
    pf_w_unlock();
}

bool pf_kit_ready(void) {
    pf_w_lock();
    bool ready = pf_kit.ready;
    pf_w_unlock();
    return ready;
}

void pf_kit_forget(void) {
    const uint32_t number = pf_kit.number;
    pf_kit = (struct pf_kit)NO_KIT;
    pf_kit.number = number;
    pf_counts_all = (struct pf_counts){0};
}

void pf_window_counts(struct pf_counts *counts) {
    pf_w_lock();
    *counts = pf_counts_all;
    pf_w_unlock();
}

void pf_kit_barrier(void) {
    mprotect(pf_kit.barrier, PF_PAGE, PROT_NONE);
}

/* Call each(from, pages) for every stretch of `region` within [start, end) that is not merged. */
static int each_private(struct pf_region *region, uint64_t start, uint64_t end, int (*each)(uint64_t, uint64_t)) {
    uint64_t page = start > region->start ? (start - region->start) / PF_PAGE : 0;
    uint64_t last = (end - region->start) / PF_PAGE;
    if (last > region->pages)
        last = region->pages;
    while (page < last) {
        uint64_t from = page;
        while (page < last && !region->where[page])
            page++;
        if (page > from) {
            int error = each(region->start + from * PF_PAGE, page - from);
            if (error)
                return error;
        }
        while (page < last && region->where[page])
            page++;
    }
    return 0;
}

static int track_one(uint64_t start, uint64_t pages) {
    return pf_uffd_register(pf_kit.track, start, pages * PF_PAGE, PF_UFFD_WP);
}

static int untrack_one(uint64_t start, uint64_t pages) {
    pf_uffd_unregister(pf_kit.track, start, pages * PF_PAGE);
    return 0;
}

static int each_region(uint64_t start, uint64_t end, int (*each)(uint64_t, uint64_t), uint32_t tracked) {
    struct pf_region *region;
    int error = 0;
    for (uint32_t i = 0; (region = pf_region_index(i)) && region->start < end && !error; i++) {
        if (region->start + region->pages * PF_PAGE <= start)
            continue;
        if (tracked ? region->closing || region->suits : !region->tracked)
            continue; /* its memory is not ours to register any more, or not yet; or another's userfaultfd may be there */
        region->tracked = tracked;
        error = each_private(region, start, end, each);
    }
    return error;
}

int pf_track(uint64_t start, uint64_t bytes) {
    int error = -EBADF;
    pf_w_lock();
    if (pf_kit.ready) {
        error = each_region(start, start + bytes, track_one, 1);
        if (error)
            each_region(start, start + bytes, untrack_one, 0);
    }
    pf_w_unlock();
    return !error;
}

void pf_untrack(uint64_t start, uint64_t bytes) {
    pf_w_lock();
    if (pf_kit.ready)
        each_region(start, start + bytes, untrack_one, 0);
    pf_w_unlock();
}

void pf_kit_release(int uffd, uint64_t run, uint32_t pages, bool track) {
    /* A registration with more modes than asked for counts as done, so MISSING goes only by unregistering. That drops the
     * protection of the pages: they read as written, which is the safe side. Neither call splits a mapping: the run is one
     * of its own since it was registered, so the limit on mappings cannot fail them. */
    pf_uffd_unregister(uffd, run, (uint64_t)pages * PF_PAGE);
    if (track)
        pf_uffd_register(pf_kit.track, run, (uint64_t)pages * PF_PAGE, PF_UFFD_WP);
}

/* The first stretch of pages that are there: its length, 0 if there is none, UINT32_MAX if the kernel does not say. */
static uint32_t first_present(uint64_t start, uint32_t pages, uint32_t *from) {
    uint64_t entries[PF_WINDOW_PAGES];
    uint32_t at = 0, end;
    if (pf_pagemap_read(pf_kit.pagemap, start, pages, entries))
        return UINT32_MAX;
    while (at < pages && !(entries[at] & (PF_PM_PRESENT | PF_PM_SWAP)))
        at++;
    for (end = at; end < pages && entries[end] & (PF_PM_PRESENT | PF_PM_SWAP);)
        end++;
    *from = at;
    return end - at;
}

bool pf_kit_put_back(int uffd, uint64_t run, uint64_t scratch, uint32_t pages) {
    enum { PATIENCE = 64, COPY_AFTER = 256, GONE = 256, GONE_TOO = 4 };
    bool all = true;
    for (uint32_t failures = 0, gone = 0, most = pages;;) {
        uint32_t from = 0, length = first_present(scratch, pages, &from);
        if (!length)
            return all;
        if (length != UINT32_MAX) {
            const uint64_t to = run + (uint64_t)from * PF_PAGE, at = scratch + (uint64_t)from * PF_PAGE;
            length = length < most ? length : most;
            int error = pf_uffd_move(uffd, to, at, (uint64_t)length * PF_PAGE);
            most = error != -EINVAL ? pages : length > 1 ? length / 2 : 1; /* MOVE takes pages of one mapping only */
            if (!error || (error == -EINVAL && length > 1))
                continue;
            /* A scan for written pages, from another process, leaves markers where nothing is, and MOVE takes them for
             * pages: EEXIST for ever. */
            if (error == -EEXIST)
                pf_uffd_protect(uffd, to, (uint64_t)length * PF_PAGE, false);
            /* The page is ours alone, so a copy is as good; COPY does not refuse what MOVE may (a lock on the mapping). */
            if (failures > COPY_AFTER) {
                error = pf_uffd_copy(uffd, to, (const void *)(uintptr_t)at, PF_PAGE);
                /* Nobody but us fills a missing page: it is not our mapping any more, and what is there now, if anything,
                 * has bytes of its own. The other pages still go back. No memory is no reason to give up. */
                gone += error && error != -ENOMEM && error != -EAGAIN;
                if (!error || gone >= (all ? GONE : GONE_TOO)) {
                    munlock((void *)(uintptr_t)at, PF_PAGE); /* mlockall, meanwhile */
                    madvise((void *)(uintptr_t)at, PF_PAGE, MADV_DONTNEED);
                    all = all && !error;
                    gone = 0;
                }
            }
        }
        if (++failures > PATIENCE) {
            struct timespec pause = {.tv_nsec = 100000};
            nanosleep(&pause, NULL);
        }
    }
}

bool pf_kit_drop(void) {
    if (pf_kit.used && madvise(pf_kit.scratch, (size_t)pf_kit.used * PF_PAGE, MADV_DONTNEED)) {
        shut(); /* locked by mlockall: old pages would be taken for moved ones */
        return false;
    }
    pf_kit.used = 0;
    return true;
}

void pf_window_drop(void) {
    pf_w_lock();
    pf_kit_drop();
    pf_w_unlock();
}
