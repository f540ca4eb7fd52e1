/* Own the window: the swap of private pages for slots of the store while the program runs. Must not know the daemon or Python.
 *
 * Why no byte is lost
 *
 *  1. A page is in exactly one of {run, scratch}. UFFDIO_MOVE takes it out of the run under the page-table lock; whoever
 *     touches the run then finds it missing and, because the run is registered MISSING, waits: threads and system calls
 *     alike, since the userfaultfd serves faults in kernel mode too.
 *  2. Nobody else can reach a page in scratch. Programs do not know the address. A device or system call that pinned it
 *     (FOLL_PIN) before makes MOVE refuse: MOVE clears the entry, then looks at the pins, and a pin taken without lock
 *     looks at the entry after it counted itself: one of them sees the other. A page that a forked process shares is
 *     refused too. Who found the page by address and writes under mmap_lock (ptrace, /proc/PID/mem) has ended when the
 *     barrier returns, because the barrier needs that lock for writing.
 *  3. So equality of a page in scratch with its slot, found after the barrier, is final: the slot never changes either
 *     (sealed; that the daemon has no writable mapping left from before is assumed: extents.c).
 *  4. Only then the run is mapped to the slots, in one step per stretch. Before it an access waits, after it an access
 *     sees the same bytes; the waiters that the old mapping had are woken at the end and look again.
 *  5. An error of MOVE does not say what was moved: Linux 6.18 reports EEXIST after it had moved all. Moved is what
 *     pagemap shows in scratch and, after an error, no longer in the run. Scratch is empty before, or no window begins.
 *     (mlockall may fill it meanwhile, with zeros: if a hole of the run is taken for such a page, it had the same bytes.)
 *  6. Every other page goes back with MOVE before the registration ends (pf_kit_put_back). No path leaves the function
 *     without release and wake.
 *  7. W keeps fork (through the C library) and the end of the region out. The owner promised not to unmap, remap or
 *     protect the memory meanwhile; a raw clone(2) without CLONE_VM in a window would show its child zeros.
 *  8. No lock but W, no malloc, no stdio from the first step to the last: their owner may wait for a page of the run.
 *  9. Not seen by 2 are references without a pin (FOLL_GET) and without mmap_lock: direct I/O *into* such a page on NFS or
 *     9p, /dev/fuse read by a FUSE server into it. Such buffers must not be advised. vmsplice'd pages keep their old bytes
 *     in the pipe, as they do across a fork. ptrace and /proc/PID/mem get EIO for a page in a window: they must try again.
 */
#define _GNU_SOURCE
#include "window.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include "fault.h"
#include "kernel.h"
#include "run.h"

/* Of count_moved, beside numbers of pages. */
#define UNKNOWN UINT32_MAX     /* the kernel does not say */
#define STALE (UINT32_MAX - 1) /* scratch was not empty: mlockall */

/* After an error, of the first `pages`, how many are no longer in the run. A marker that a scan for written pages left in
 * the hole looks like a swapped page until it is taken away. */
static uint32_t count_gone(uint64_t from, uint32_t pages) {
    uint64_t entries[PF_WINDOW_PAGES];
    uint32_t gone = 0;
    for (int round = 0; round < 8; round++) {
        if (pf_pagemap_read(pf_kit.pagemap, from, pages, entries))
            return UNKNOWN;
        for (gone = 0; gone < pages && !(entries[gone] & (PF_PM_PRESENT | PF_PM_SWAP));)
            gone++;
        if (gone == pages || entries[gone] & PF_PM_PRESENT)
            return gone ? gone : STALE;
        pf_uffd_protect(pf_kit.track, from, (uint64_t)pages * PF_PAGE, false);
    }
    while (gone < pages && !(entries[gone] & PF_PM_PRESENT))
        gone++;
    return gone;
}

/* How many of the first pages have moved. */
static uint32_t count_moved(uint64_t to, uint64_t from, uint32_t pages, int error) {
    uint64_t entries[PF_WINDOW_PAGES];
    uint32_t done = 0;
    if (pf_pagemap_read(pf_kit.pagemap, to, pages, entries))
        return UNKNOWN;
    while (done < pages && entries[done] & (PF_PM_PRESENT | PF_PM_SWAP))
        done++;
    return error && done ? count_gone(from, done) : done;
}

/* Move the run's pages to scratch: state PF_MOVED, or why not. `final` false: the first page that is pinned or shared ends
 * it (PF_AGAIN from there on), because after a fork all will be. */
static void move_out(const struct pf_run *run, uint64_t scratch, bool final) {
    enum { PATIENCE = 32 };
    uint32_t page = 0, failures = 0, most = run->pages; /* pages of one MOVE */
    while (page < run->pages) {
        const uint64_t to = scratch + (uint64_t)page * PF_PAGE, from = pf_run_address(run, page);
        const uint32_t rest = run->pages - page < most ? run->pages - page : most;
        const int error = pf_uffd_move(pf_kit.track, to, from, (uint64_t)rest * PF_PAGE);
        const uint32_t done = count_moved(to, from, rest, error);
        if (done == STALE) {
            pf_kit.used = PF_SCRATCH_PAGES; /* the next window empties it first, or cannot and closes the kit */
            memset(run->status + page, PF_BUSY, run->pages - page);
            return;
        }
        if (done == UNKNOWN) {
            if (++failures < PATIENCE)
                continue;
            memset(run->status + page, PF_UNCLEAR, run->pages - page);
            return;
        }
        memset(run->status + page, PF_MOVED, done);
        page += done;
        most = done ? run->pages : most;
        if (page == run->pages)
            return;
        switch (error) {
        case -EBUSY:
            if (!final) {
                memset(run->status + page, PF_AGAIN, run->pages - page);
                return;
            }
            run->status[page++] = PF_PINNED;
            failures = 0;
            break;
        case -ENOENT: /* nothing there */
        case -EFAULT: /* a marker that nothing is there, or another entry that is no page */
            run->status[page++] = PF_ABSENT;
            failures = 0;
            break;
        case 0:
        case -EAGAIN:
        case -EEXIST:
        case -EINTR:
            if (++failures < PATIENCE)
                break;
            run->status[page++] = PF_BUSY;
            failures = 0;
            break;
        case -EINVAL: /* MOVE takes pages of one mapping only, and a run may have several: find the seam by halving */
            if (done)
                break;
            if (rest > 1)
                most = rest / 2;
            else
                run->status[page++] = PF_UNSUITABLE;
            break;
        default:
            memset(run->status + page, pf_run_refused(error), run->pages - page);
            return;
        }
    }
}

/* A run of zeros: equal pages simply stay away. The page of zeros that some of them map was never memory. */
static void leave_holes(const struct pf_run *run, uint64_t scratch) {
    uint8_t nothing[PF_WINDOW_PAGES];
    if (pf_pagemap_zeros(pf_kit.pagemap, scratch, run->pages, nothing))
        memset(nothing, 0, run->pages);
    for (uint32_t i = 0; i < run->pages; i++)
        if (run->status[i] == PF_EQUAL)
            run->status[i] = nothing[i] ? PF_ABSENT : PF_MERGED;
}

/* Empty scratch of this many pages, or 0. */
static uint64_t take_scratch(uint32_t pages) {
    if (pf_kit.used + pages > PF_SCRATCH_PAGES && !pf_kit_drop())
        return 0;
    return (uint64_t)(uintptr_t)pf_kit.scratch + (uint64_t)pf_kit.used * PF_PAGE;
}

static bool goes_back(const struct pf_run *run, const uint8_t *moved, uint32_t page) {
    return moved[page] && run->status[page] != PF_MERGED && run->status[page] != PF_ABSENT;
}

/* Put back what was moved and not merged, end the registration of all that is not mapped to slots, wake. */
static void finish(const struct pf_run *run, uint64_t scratch, const uint8_t *moved, bool mapped) {
    uint32_t end;
    bool kept = false;
    for (uint32_t i = 0; i < run->pages; i = end) {
        const bool back = goes_back(run, moved, i);
        for (end = i + 1; end < run->pages && goes_back(run, moved, end) == back;)
            end++;
        kept |= !back; /* or nothing was there */
        if (back && !pf_kit_put_back(pf_kit.track, pf_run_address(run, i), scratch + (uint64_t)i * PF_PAGE, end - i))
            memset(run->status + i, PF_UNMANAGED, end - i);
    }
    pf_run_change(run, PF_UNCLEAR, PF_BUSY);
    PF_FAULT(PF_FAULT_WINDOW, 7);
    for (uint32_t i = 0; i < run->pages; i = end) {
        const bool slot = mapped && run->status[i] == PF_MERGED;
        for (end = i + 1; end < run->pages && (mapped && run->status[end] == PF_MERGED) == slot;)
            end++;
        if (!slot)
            pf_kit_release(pf_kit.track, pf_run_address(run, i), end - i, run->region->tracked);
    }
    PF_FAULT(PF_FAULT_WINDOW, 8);
    if (mapped)
        pf_uffd_wake(pf_kit.track, run->start, (uint64_t)run->pages * PF_PAGE);
    if (kept && pf_kit.used < PF_SCRATCH_PAGES)
        pf_kit.used += run->pages;
    PF_FAULT(PF_FAULT_WINDOW, 9);
}

/* One pass over a run of private pages. */
static void swap_once(const struct pf_run *run, bool final) {
    const uint64_t bytes = (uint64_t)run->pages * PF_PAGE;
    uint8_t moved[PF_WINDOW_PAGES];
    bool mapped = false;
    const uint64_t scratch = take_scratch(run->pages);
    if (!scratch) {
        pf_run_set(run, PF_OFF);
        return;
    }
    pf_run_set(run, PF_WAITING);
    pf_run_warm(run);
    PF_FAULT(PF_FAULT_WINDOW, 1);
    int error = pf_uffd_register(pf_kit.track, run->start, bytes,
                                 PF_UFFD_MISSING | (run->region->tracked ? PF_UFFD_WP : 0));
    if (error) { /* some mappings of the run may be registered, if it has several */
        if (error != -EBUSY)
            pf_kit_release(pf_kit.track, run->start, run->pages, run->region->tracked);
        pf_run_set(run, pf_run_refused(error));
        return;
    }
    PF_FAULT(PF_FAULT_WINDOW, 2);
    move_out(run, scratch, final);
    for (uint32_t i = 0; i < run->pages; i++)
        moved[i] = run->status[i] == PF_MOVED || run->status[i] == PF_UNCLEAR;
    PF_FAULT(PF_FAULT_WINDOW, 3);
    pf_kit_barrier();
    PF_FAULT(PF_FAULT_WINDOW, 4);
    for (uint32_t i = 0; i < run->pages; i++)
        if (run->status[i] == PF_MOVED)
            run->status[i] = pf_run_compare(run, i, scratch + (uint64_t)i * PF_PAGE);
    PF_FAULT(PF_FAULT_WINDOW, 5);
    if (run->target->extent)
        mapped = pf_run_map(run, PF_FAULT_WINDOW, 6);
    else
        leave_holes(run, scratch);
    finish(run, scratch, moved, mapped);
    pf_counts_all.windows++;
}

/* Make the pages that were refused exclusive to this process, if it is only a fork that shared them: a write fault
 * does it, which changes no byte. Pages where nothing is stay so. False: no memory. */
static bool make_exclusive(const struct pf_run *run) {
    uint64_t entries[PF_WINDOW_PAGES];
    if (pf_pagemap_read(pf_kit.pagemap, run->start, run->pages, entries))
        return false;
    for (uint32_t i = 0, end; i < run->pages; i = end + 1) {
        for (end = i; end < run->pages && entries[end] & (PF_PM_PRESENT | PF_PM_SWAP);)
            end++;
        if (end > i && madvise((void *)(uintptr_t)pf_run_address(run, i), (size_t)(end - i) * PF_PAGE,
                               PF_MADV_POPULATE_WRITE))
            return false;
    }
    return true;
}

/* EBUSY has two reasons; after a write fault only a fork that came since can be the second. */
static void tell_pinned(const struct pf_run *run) {
    uint64_t entries[PF_WINDOW_PAGES];
    if (!memchr(run->status, PF_PINNED, run->pages) ||
        pf_pagemap_read(pf_kit.pagemap, run->start, run->pages, entries))
        return;
    for (uint32_t i = 0; i < run->pages; i++)
        if (run->status[i] == PF_PINNED && entries[i] & PF_PM_PRESENT && !(entries[i] & PF_PM_EXCLUSIVE))
            run->status[i] = PF_SHARED;
}

static void swap_private(const struct pf_run *run) {
    swap_once(run, false);
    const uint8_t *again = memchr(run->status, PF_AGAIN, run->pages);
    if (!again)
        return;
    const uint32_t from = (uint32_t)(again - run->status);
    const struct pf_run rest = pf_run_part(run, from, run->pages - from);
    if (!make_exclusive(&rest)) {
        pf_run_set(&rest, PF_SHARED);
        return;
    }
    swap_once(&rest, true);
    tell_pinned(&rest);
}

enum kind { PRIVATE, THERE, ELSEWHERE };

static enum kind kind_of(const struct pf_run *run, uint32_t page) {
    const uint64_t where = *pf_run_where(run, page);
    return !where ? PRIVATE : run->target->extent && where == pf_run_target(run, page) ? THERE : ELSEWHERE;
}

static void swap_run(const struct pf_run *run) {
    for (uint32_t i = 0, end; i < run->pages; i = end) {
        const enum kind kind = kind_of(run, i);
        for (end = i + 1; end < run->pages && kind_of(run, end) == kind;)
            end++;
        const struct pf_run inner = pf_run_part(run, i, end - i);
        if (!pf_kit.ready && !run->plain) { /* closed on the way: take_scratch */
            pf_run_set(&inner, PF_OFF);
        } else if (kind == PRIVATE && run->plain) {
            pf_run_plain(&inner);
        } else if (kind == PRIVATE) {
            swap_private(&inner);
        } else if (kind == ELSEWHERE && run->target->extent) {
            pf_run_remap(&inner);
        } else {
            pf_run_already(&inner);
            if (!run->target->extent) /* a merged page cannot become a hole: its mapping is not anonymous */
                pf_run_change(&inner, PF_ALREADY, PF_UNSUITABLE);
        }
    }
}

static bool inside(const struct pf_region *region, uint64_t start, uint32_t pages) {
    return pages <= region->pages && (start - region->start) / PF_PAGE <= region->pages - pages;
}

void pf_window(int64_t id, uint64_t start, uint32_t pages, const struct pf_target *target, int plain,
               uint8_t *status) {
    uint8_t refused = PF_STATUSES;
    pf_w_lock_window();
    struct pf_region *region = pf_region_find_at(start);
    if (!pages || pages > PF_WINDOW_PAGES || start % PF_PAGE || target->offset % PF_PAGE)
        refused = PF_BAD;
    else if (!region || region->id != id || region->closing || !inside(region, start, pages))
        refused = PF_UNMANAGED;
    else if (region->suits)
        refused = PF_UNSUITABLE;
    else if (!pf_kit.ready && (!plain || pf_kit.pagemap < 0))
        refused = PF_OFF;
    if (refused != PF_STATUSES) {
        memset(status, refused, pages);
    } else {
        const struct pf_run run = {region, start, pages, target, 0, status, !pf_kit.ready};
        swap_run(&run);
        for (uint32_t i = 0; i < pages; i++) {
            if (status[i] >= PF_STATUSES) /* a state never gets out */
                status[i] = PF_BUSY;
            pf_counts_all.by_status[status[i]]++;
        }
    }
    pf_w_unlock();
}
