/* Own giving back: merged pages become private anonymous memory again. Must not know the daemon, messages or Python.
 *
 * Why no byte is lost, while threads write and devices hold pins
 *
 *  1. The run is registered for write protection with the hold userfaultfd and protected: from now on whoever wants to
 *     make a page of it writable waits, threads and system calls alike. Reading goes on.
 *  2. A page that pagemap now shows as the file's (or absent) is the slot: its bytes never change. Nobody can hold a pin
 *     for writing on it, since that would have made it private first.
 *  3. A page that is private (broken: written since it was merged) can have been pinned before 1, by io_uring, direct I/O
 *     or a device that goes on writing through its pin. To copy such a page would lose what comes. So a child is cloned:
 *     the kernel gives a child its own copy of each page that is pinned, at once, and shares all others. In the parent
 *     exactly the pinned ones are still mapped once, which pagemap shows. Pages that a forked process of the program shared
 *     before cannot be pinned: a pin for writing had made them our own. Nor can pages that are swapped or being migrated:
 *     the kernel does not take a pinned page out of its place. Clone also waits for system calls that found a page by
 *     address earlier and write under mmap_lock (ptrace, /proc/PID/mem).
 *  4. After the clone pages that are not pinned are write-protected for the kernel too and no longer exclusive: a new pin
 *     must fault first, and there it waits for 1. So their bytes stand still, also when the child has gone.
 *  5. The pages that stand still (2, 4) are copied to staging. Then an empty anonymous mapping, registered MISSING, takes
 *     the place of the run by mremap: one step, in which an access sees either the old mapping or a missing page, and
 *     waits. The hold userfaultfd asks for remap events, because that keeps a registration through mremap; the event must
 *     be read by somebody while mremap waits: that is what the listener thread is for.
 *  6. UFFDIO_MOVE puts the copies in place; pagemap says when staging is empty. Then the registration ends, write tracking
 *     begins again, and all who waited are woken.
 *  7. An empty mapping that is moved becomes like one made there, so it can join its neighbours and the region be one
 *     mapping again. For that it must get its neighbour's anon_vma with its first page, which the kernel gives only if the
 *     flags of the two are equal in this moment: so the neighbouring page is registered the same way meanwhile (lend).
 *  8. Where no listener can be started, and in a plain restore, the copies themselves are moved over the run (one step
 *     too), and their mapping does not join its neighbours.
 *  9. What stays (pinned; no mapping or memory free) is made private in place by a write fault (MADV_POPULATE_WRITE), which
 *     is always safe: it needs the store no more, but stays in a file mapping.
 * 10. mremap frees the place before it moves; if it fails in between, which takes a failing allocation of the smallest
 *     size, it is tried again until it can (replace).
 * 11. As in window.c: a long-term pin for reading (RDMA, VFIO) taken between 2 or 4 and 5 keeps the old copy: equal bytes,
 *     but later writes do not reach it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include "fault.h"
#include "fresh.h"
#include "kernel.h"
#include "kit.h"
#include "window.h"

#define SMALL_PAGES 256u  /* of a batch without private pages: writers wait some 200 us */
#define LARGE_PAGES 4096u /* of a batch with some: one clone for all of them, and writers wait for that */
#define STRETCHES 256u
#define SMALL_STRETCHES 32u
#define LOOK_PAGES (1u << 18) /* of a region, looked through for one batch: 0.3 ms */

struct stretch {
    uint64_t start;
    uint32_t pages;
    bool held;
};

/* All that one pf_restore works with; nothing of it is on the heap. */
struct restore {
    bool placing;    /* copies go to the node that the slot is on */
    bool held;       /* in this batch: the kit is there, threads may write */
    bool empty;      /* in this batch: way 5 of above, else 8 */
    uint8_t *staging; /* LARGE_PAGES; of no child */
    struct pf_fresh fresh; /* what takes the place of runs, in this batch */
    uint8_t *copies;       /* where the next run is copied: in staging, or in the unused rest of fresh */
    struct pf_region *region;
    struct stretch stretches[STRETCHES];
    uint32_t count;
    uint32_t pages; /* of all stretches */
    uint64_t kept;   /* could not be given back */
    uint64_t failed; /* of those: not because they are pinned */
    uint64_t done;   /* given back */
    struct pf_listener listener;
};

static void *address(uint64_t start) {
    return (void *)(uintptr_t)start;
}

static uint64_t *where_of(const struct restore *restore, uint64_t start) {
    return restore->region->where + (start - restore->region->start) / PF_PAGE;
}

static bool is_private(uint64_t entry) {
    return entry & PF_PM_PRESENT && !(entry & PF_PM_FILE);
}

/* Private in place is the best that can be done for these. */
static void keep(struct restore *restore, uint64_t start, uint32_t pages, bool pinned) {
    madvise(address(start), (size_t)pages * PF_PAGE, PF_MADV_POPULATE_WRITE);
    restore->kept += pages;
    restore->failed += pinned ? 0 : pages;
}

/* Let go of a run that stays a file mapping. */
static void let_go(struct restore *restore, uint64_t start, uint32_t pages, bool pinned) {
    if (restore->held)
        pf_uffd_unregister(pf_kit.hold, start, (uint64_t)pages * PF_PAGE);
    keep(restore, start, pages, pinned);
}

/* Let memory take the place of a run. */
static bool replace(uint64_t start, uint32_t pages, uint64_t by) {
    const size_t bytes = (size_t)pages * PF_PAGE;
    uint32_t tries = 1000;
    while (mremap(address(by), bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, address(start)) == MAP_FAILED)
        if (!pf_hole(start, pages, &tries))
            return false;
    return true;
}

/* Fill the run, which is missing and waits, from staging. */
static void fill(uint64_t start, uint32_t pages, uint8_t *staging) {
    for (uint32_t done = 0, part; done < pages; done += part) {
        part = pages - done < PF_WINDOW_PAGES ? pages - done : PF_WINDOW_PAGES;
        pf_kit_put_back(pf_kit.hold, start + (uint64_t)done * PF_PAGE,
                        (uint64_t)(uintptr_t)(staging + (size_t)done * PF_PAGE), part);
    }
}

/* Give the private page before the run, or after it, the run's registration modes: see 7. 0: there is none. The page is
 * touched by nobody while it is missing, or waits a moment. */
static uint64_t lend(const struct restore *restore, uint64_t start, uint32_t pages) {
    const struct pf_region *region = restore->region;
    const uint64_t end = start + (uint64_t)pages * PF_PAGE;
    uint64_t page = 0;
    if (start > region->start && !*where_of(restore, start - PF_PAGE))
        page = start - PF_PAGE;
    else if (end < region->start + region->pages * PF_PAGE && !*where_of(restore, end))
        page = end;
    if (page && pf_uffd_register(pf_kit.track, page, PF_PAGE, PF_UFFD_MISSING | PF_UFFD_WP))
        page = 0;
    return page;
}

/* Take memory for the copies of a batch before anybody is held, because it takes longest: on the node where the slots are,
 * which is where the pages had been (a stretch is of one extent as a rule, and an extent is of one node). */
static bool take_memory(struct restore *restore) {
    if (!pf_fresh_map(&restore->fresh, restore->pages, restore->region->vma, restore->empty))
        return false;
    restore->copies = restore->empty ? restore->staging : address(restore->fresh.start);
    bool taken = true;
    uint8_t *at = restore->copies;
    for (uint32_t i = 0; i < restore->count && taken; i++) {
        const size_t bytes = (size_t)restore->stretches[i].pages * PF_PAGE;
        if (restore->placing)
            pf_node_prefer(pf_node_of(restore->stretches[i].start));
        taken = !madvise(at, bytes, PF_MADV_POPULATE_WRITE);
        at += bytes;
    }
    if (restore->placing)
        pf_node_prefer(-1);
    return taken;
}

/* Drop what is left of it. */
static void give_memory(struct restore *restore) {
    pf_fresh_unmap(&restore->fresh, restore->empty);
    if (restore->empty)
        madvise(restore->staging, (size_t)restore->pages * PF_PAGE, MADV_DONTNEED);
}

/* Replace one run whose bytes stand still. */
static void give_back(struct restore *restore, uint64_t start, uint32_t pages) {
    const size_t bytes = (size_t)pages * PF_PAGE;
    uint8_t *copies = restore->copies;
    memcpy(copies, address(start), bytes);
    PF_FAULT(PF_FAULT_RESTORE, 5);
    if (!replace(start, pages, restore->fresh.start)) {
        let_go(restore, start, pages, false);
        return;
    }
    PF_FAULT(PF_FAULT_RESTORE, 6);
    restore->copies += bytes;
    restore->fresh.start += bytes;
    restore->fresh.pages -= pages;
    if (restore->empty) {
        const uint64_t lent = lend(restore, start, pages);
        fill(start, pages, copies);
        if (lent)
            pf_kit_release(pf_kit.track, lent, 1, restore->region->tracked);
    }
    PF_FAULT(PF_FAULT_RESTORE, 7);
    memset(where_of(restore, start), 0, pages * sizeof(uint64_t));
    if (restore->held) {
        pf_kit_release(pf_kit.hold, start, pages, restore->region->tracked);
        PF_FAULT(PF_FAULT_RESTORE, 8);
    }
    pf_counts_all.restored += pages;
    restore->done += pages;
}

/* Take the next merged pages from `from` on, up to `end`; returns where to go on. */
static uint64_t gather(struct restore *restore, uint64_t from, uint64_t end, uint32_t most, uint32_t stretches) {
    restore->count = restore->pages = 0;
    while (from < end && restore->pages < most && restore->count < stretches) {
        if (!*where_of(restore, from)) {
            from += PF_PAGE;
            continue;
        }
        struct stretch *stretch = &restore->stretches[restore->count++];
        *stretch = (struct stretch){.start = from};
        for (; from < end && restore->pages < most && *where_of(restore, from); from += PF_PAGE) {
            stretch->pages++;
            restore->pages++;
        }
    }
    return from;
}

/* Whether a page of the batch is private; true also if the kernel does not say. */
static bool any_private(const struct restore *restore) {
    uint64_t entries[SMALL_PAGES];
    for (uint32_t i = 0; i < restore->count; i++) {
        const struct stretch *stretch = &restore->stretches[i];
        for (uint32_t done = 0, part; done < stretch->pages; done += part) {
            part = stretch->pages - done < SMALL_PAGES ? stretch->pages - done : SMALL_PAGES;
            if (pf_pagemap_read(pf_kit.pagemap, stretch->start + (uint64_t)done * PF_PAGE, part, entries))
                return true;
            for (uint32_t page = 0; page < part; page++)
                if (is_private(entries[page]))
                    return true;
        }
    }
    return false;
}

static void hold_all(struct restore *restore) {
    for (uint32_t i = 0; i < restore->count; i++) {
        struct stretch *stretch = &restore->stretches[i];
        const uint64_t bytes = (uint64_t)stretch->pages * PF_PAGE;
        stretch->held = !restore->held || (!pf_uffd_register(pf_kit.hold, stretch->start, bytes, PF_UFFD_WP) &&
                                           !pf_uffd_protect(pf_kit.hold, stretch->start, bytes, true));
    }
}

/* Mark the pages that may be pinned: the private ones that are still mapped once while the twin lives. */
static void mark_pinned(const struct stretch *stretch, bool cloned, uint8_t *pinned) {
    uint64_t entries[SMALL_PAGES];
    for (uint32_t done = 0, part; done < stretch->pages; done += part) {
        part = stretch->pages - done < SMALL_PAGES ? stretch->pages - done : SMALL_PAGES;
        if (pf_pagemap_read(pf_kit.pagemap, stretch->start + (uint64_t)done * PF_PAGE, part, entries)) {
            memset(pinned + done, 1, part);
            continue;
        }
        for (uint32_t i = 0; i < part; i++)
            pinned[done + i] = is_private(entries[i]) && (!cloned || entries[i] & PF_PM_EXCLUSIVE);
    }
}

/* One batch, under W from the first hold to the last wake. */
static void do_batch(struct restore *restore) {
    uint8_t pinned[LARGE_PAGES];
    struct pf_twin twin;
    bool cloned = false;
    PF_FAULT(PF_FAULT_RESTORE, 1);
    if (!take_memory(restore)) {
        give_memory(restore);
        for (uint32_t i = 0; i < restore->count; i++)
            keep(restore, restore->stretches[i].start, restore->stretches[i].pages, false);
        return;
    }
    hold_all(restore);
    PF_FAULT(PF_FAULT_RESTORE, 2);
    memset(pinned, 0, sizeof pinned);
    if (any_private(restore)) {
        cloned = !pf_twin_start(&twin);
        PF_FAULT(PF_FAULT_RESTORE, 3);
        for (uint32_t i = 0, done = 0; i < restore->count; done += restore->stretches[i++].pages)
            mark_pinned(&restore->stretches[i], cloned, pinned + done);
        if (cloned)
            pf_twin_end(&twin);
    }
    PF_FAULT(PF_FAULT_RESTORE, 4);
    for (uint32_t i = 0, done = 0; i < restore->count; done += restore->stretches[i++].pages) {
        const struct stretch *stretch = &restore->stretches[i];
        for (uint32_t page = 0, end; page < stretch->pages; page = end) {
            const uint8_t kind = pinned[done + page];
            for (end = page + 1; end < stretch->pages && pinned[done + end] == kind;)
                end++;
            const uint64_t start = stretch->start + (uint64_t)page * PF_PAGE;
            if (kind || !stretch->held)
                let_go(restore, start, end - page, kind);
            else
                give_back(restore, start, end - page);
        }
    }
    give_memory(restore);
    PF_FAULT(PF_FAULT_RESTORE, 9);
}

/* Restore the merged pages of [from, end) of the region at `from`, batch by batch; other users of W get turns. */
static void restore_all(struct restore *restore, uint64_t from, uint64_t end, bool plain) {
    while (from < end) {
        pf_w_lock_window();
        restore->region = pf_region_find_at(from);
        restore->held = pf_kit.ready;
        restore->empty = restore->held && pf_listener_serves(&restore->listener);
        /* Asked anew at each batch: who abandons a region (pf_forget, pf_discard) gives the memory to others at once. */
        if (!restore->region || restore->region->abandoned) {
            pf_w_unlock();
            return;
        }
        uint64_t last = restore->region->start + restore->region->pages * PF_PAGE;
        last = last < end ? last : end;
        last = last - from < LOOK_PAGES * (uint64_t)PF_PAGE ? last : from + LOOK_PAGES * (uint64_t)PF_PAGE;
        uint64_t next = gather(restore, from, last, LARGE_PAGES, STRETCHES);
        if (!any_private(restore))
            next = gather(restore, from, last, SMALL_PAGES, SMALL_STRETCHES);
        if (restore->held || plain)
            do_batch(restore);
        else
            for (uint32_t i = 0; i < restore->count; i++)
                keep(restore, restore->stretches[i].start, restore->stretches[i].pages, false);
        from = next;
        pf_w_unlock();
        PF_FAULT(PF_FAULT_RESTORE, 10);
    }
}

int64_t pf_restore(uint64_t start, uint64_t pages, int plain) {
    struct restore restore = {0};
    if (start % PF_PAGE || pages > UINT64_MAX / PF_PAGE || start + pages * PF_PAGE < start)
        return -EINVAL;
    restore.placing = pf_node_free();
    restore.staging = pf_empty_map(LARGE_PAGES, MAP_NORESERVE);
    if (restore.staging) {
        madvise(restore.staging, LARGE_PAGES * (size_t)PF_PAGE, MADV_DONTFORK);
        madvise(restore.staging, LARGE_PAGES * (size_t)PF_PAGE, MADV_NOHUGEPAGE);
        pf_listener_start(&restore.listener);
    }
    restore_all(&restore, start, start + pages * PF_PAGE, plain);
    /* Once more, where it may help: at the limit on mappings what was given back made room; and most pins are those of
     * direct I/O, which ends. */
    if (restore.held && restore.kept && (!restore.failed || restore.done)) {
        const struct timespec pause = {.tv_nsec = 2000000};
        if (!restore.failed)
            nanosleep(&pause, NULL);
        restore.kept = restore.failed = 0;
        restore_all(&restore, start, start + pages * PF_PAGE, plain);
    }
    pf_listener_stop(&restore.listener);
    if (restore.staging)
        munmap(restore.staging, LARGE_PAGES * (size_t)PF_PAGE);
    return (int64_t)restore.kept;
}
