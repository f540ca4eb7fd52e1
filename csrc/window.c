/* Own the swap of pages for slots of the store: windows, remap windows, plain swaps. Must not know the daemon or Python.
 *
 * Why no byte is lost in a window (swap_private)
 *
 *  1. A page is in exactly one of {run, scratch}. UFFDIO_MOVE takes it out of the run under the page-table lock; whoever
 *     touches the run then finds it missing and, because the run is registered MISSING, waits: threads and system calls
 *     alike, since the userfaultfd serves faults in kernel mode too.
 *  2. Nobody else can reach a page in scratch. Programs do not know the address. A device or system call that pinned it
 *     (FOLL_PIN) before makes MOVE refuse: MOVE clears the entry, then looks at the pins, and a pin taken without lock
 *     looks at the entry after it counted itself: one of them sees the other. A page that a forked process shares is
 *     refused too. Who found the page by address and writes under mmap_lock (ptrace, /proc/PID/mem) has ended when the
 *     barrier returns, because the barrier needs that lock for writing.
 *  3. So equality of a page in scratch with its slot, found after the barrier, is final: the slot never changes either.
 *  4. Only then the run is mapped to the slots, in one step per stretch. Before it an access waits, after it an access
 *     sees the same bytes; the waiters that the old mapping had are woken at the end and look again.
 *  5. An error of MOVE does not say what was moved: Linux 6.18 reports EEXIST after it had moved all. Moved is what
 *     pagemap shows in scratch and, after an error, no longer in the run. Scratch is empty before, or the kit is closed.
 *     (mlockall may fill it meanwhile, with zeros; a hole of the run that is taken for such a page had those bytes too.)
 *  6. Every other page goes back with MOVE before the registration ends (pf_kit_put_back). No path leaves the function
 *     without release and wake.
 *  7. W keeps fork (through the C library) and the end of the region out. The owner promised not to unmap, remap or
 *     protect the memory meanwhile; a raw clone(2) without CLONE_VM in a window would show its child zeros.
 *  8. No lock but W, no malloc, no stdio from the first step to the last: their owner may wait for a page of the run.
 *  9. Not seen by 2 are references without a pin (FOLL_GET) and without mmap_lock: direct I/O *into* such a page on NFS or
 *     9p, /dev/fuse read by a FUSE server into it. Such buffers must not be advised. vmsplice'd pages keep their old bytes
 *     in the pipe, as they do across a fork. ptrace and /proc/PID/mem get EIO for a page in a window: they must try again.
 *
 * Why no byte is lost when a merged page changes slots (swap_merged)
 *
 *  1. An unbroken merged page is a page of the file: it cannot be written, only replaced by a private copy. The run is
 *     write-protected with a userfaultfd that does not answer by itself, so from then on nobody makes a writable copy.
 *  2. After that pagemap shows a file page present: nobody wrote. The bytes are those of the slot, which never change;
 *     they are compared with the new slot, and the mapping is replaced in one step. A writer that came meanwhile has not
 *     written yet; it waits, is woken, and faults again on the new mapping.
 *  3. All other pages are left alone: broken (written before), or not clearly seen as file pages (busy).
 *  4. A long-term pin for reading (RDMA, VFIO) breaks a merged page without a write. If it is taken between 2's look and
 *     the replacement, the device reads the old copy: equal bytes, but later writes do not reach it.
 */
#define _GNU_SOURCE
#include "window.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include "fault.h"
#include "kernel.h"
#include "kit.h"

/* States of a page during a window, beside the statuses. */
enum { WAITING = 200, MOVED, EQUAL, AGAIN };

static const uint8_t zeros[PF_PAGE];

struct run {
    struct pf_region *region;
    uint64_t start;
    uint32_t pages;
    const struct pf_target *target;
    uint32_t first; /* page of the target that the run begins with */
    uint8_t *status;
};

static uint64_t *where_of(const struct run *run, uint32_t page) {
    return run->region->where + (run->start - run->region->start) / PF_PAGE + page;
}

static uint64_t target_where(const struct run *run, uint32_t page) {
    return PF_WHERE(run->target->extent, run->target->slot + run->first + page);
}

static const uint8_t *slot_bytes(const struct run *run, uint32_t page) {
    return run->target->extent ? run->target->bytes + (size_t)(run->first + page) * PF_PAGE : zeros;
}

static void *at(uint64_t start, uint32_t page) {
    return (void *)(uintptr_t)(start + (uint64_t)page * PF_PAGE);
}

static struct run part(const struct run *run, uint32_t from, uint32_t pages) {
    struct run inner = *run;
    inner.start += (uint64_t)from * PF_PAGE;
    inner.pages = pages;
    inner.first += from;
    inner.status += from;
    return inner;
}

/* Length of the stretch of pages from `from` on that have this status. */
static uint32_t stretch(const struct run *run, uint32_t from, uint8_t status) {
    uint32_t end = from;
    while (end < run->pages && run->status[end] == status)
        end++;
    return end - from;
}

static void change(const struct run *run, uint8_t from, uint8_t to) {
    for (uint32_t i = 0; i < run->pages; i++)
        if (run->status[i] == from)
            run->status[i] = to;
}

/* Read a byte of each slot, so that the view's page faults do not happen while writers wait. */
static void warm(const struct run *run) {
    for (uint32_t i = 0; i < run->pages; i++)
        (void)*(const volatile uint8_t *)slot_bytes(run, i);
}

/* Map the stretches of EQUAL pages to their slots. Never MAP_POPULATE: it would give each page a private copy again. */
static bool map_equal(const struct run *run, int kind, int point) {
    bool any = false;
    (void)kind, (void)point; /* of fault points only */
    for (uint32_t i = 0, n; i < run->pages; i += n) {
        n = stretch(run, i, EQUAL);
        if (!n) {
            n = 1;
            continue;
        }
        void *got = mmap(at(run->start, i), (size_t)n * PF_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED,
                         run->target->fd, (off_t)(run->target->offset + (uint64_t)(run->first + i) * PF_PAGE));
        uint8_t status = got != MAP_FAILED ? PF_MERGED : errno == ENOMEM || errno == EAGAIN ? PF_NO_VMA : PF_BAD;
        memset(run->status + i, status, n);
        for (uint32_t page = i; status == PF_MERGED && page < i + n; page++)
            *where_of(run, page) = target_where(run, page);
        any |= status == PF_MERGED;
        PF_FAULT(kind, point);
    }
    return any;
}

static uint8_t register_status(int error) {
    return error == -ENOMEM ? PF_NO_VMA : PF_UNSUITABLE;
}

/* How many of the first pages have moved; UINT32_MAX: the kernel does not say. */
static uint32_t count_moved(uint64_t to, uint64_t from, uint32_t pages, int error) {
    uint64_t entries[PF_WINDOW_PAGES];
    uint32_t done = 0;
    if (pf_pagemap_read(pf_kit.pagemap, to, pages, entries))
        return UINT32_MAX;
    while (done < pages && entries[done] & (PF_PM_PRESENT | PF_PM_SWAP))
        done++;
    if (!error || !done)
        return done;
    if (pf_pagemap_read(pf_kit.pagemap, from, done, entries))
        return UINT32_MAX;
    pages = done;
    for (done = 0; done < pages && !(entries[done] & PF_PM_PRESENT);)
        done++;
    return done;
}

/* Move the run's pages to scratch: status MOVED, or why not. `final` false: the first page that is pinned or shared ends
 * it (AGAIN from there on), because after a fork all will be. */
static void move_out(const struct run *run, uint64_t scratch, bool final) {
    enum { PATIENCE = 32 };
    uint32_t page = 0, failures = 0, most = run->pages; /* pages of one MOVE */
    while (page < run->pages) {
        const uint64_t to = scratch + (uint64_t)page * PF_PAGE, from = run->start + (uint64_t)page * PF_PAGE;
        const uint32_t rest = run->pages - page < most ? run->pages - page : most;
        const int error = pf_uffd_move(pf_kit.track, to, from, (uint64_t)rest * PF_PAGE);
        const uint32_t done = count_moved(to, from, rest, error);
        if (done == UINT32_MAX) {
            if (++failures < PATIENCE)
                continue;
            memset(run->status + page, PF_BUSY, run->pages - page);
            return;
        }
        memset(run->status + page, MOVED, done);
        page += done;
        most = done ? run->pages : most;
        if (page == run->pages)
            return;
        switch (error) {
        case -EBUSY:
            if (!final) {
                memset(run->status + page, AGAIN, run->pages - page);
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
            if (most > 1 && run->pages - page > 1)
                most = (run->pages - page < most ? run->pages - page : most) / 2;
            else
                run->status[page++] = PF_UNSUITABLE;
            break;
        default:
            memset(run->status + page, error == -ENOMEM ? PF_NO_VMA : PF_UNSUITABLE, run->pages - page);
            return;
        }
    }
}

static void compare(const struct run *run, uint64_t scratch) {
    for (uint32_t i = 0; i < run->pages; i++)
        if (run->status[i] == MOVED)
            run->status[i] = memcmp(at(scratch, i), slot_bytes(run, i), PF_PAGE) ? PF_DIFFERS : EQUAL;
}

/* A run of zeros: equal pages simply stay away. The page of zeros that some of them map was never memory. */
static void leave_holes(const struct run *run, uint64_t scratch) {
    uint8_t nothing[PF_WINDOW_PAGES];
    if (pf_pagemap_zeros(pf_kit.pagemap, scratch, run->pages, nothing))
        memset(nothing, 0, run->pages);
    for (uint32_t i = 0; i < run->pages; i++)
        if (run->status[i] == EQUAL)
            run->status[i] = nothing[i] ? PF_ABSENT : PF_MERGED;
}

/* Empty scratch of this many pages, or 0. */
static uint64_t take_scratch(uint32_t pages) {
    if (pf_kit.used + pages > PF_SCRATCH_PAGES && !pf_kit_drop())
        return 0;
    return (uint64_t)(uintptr_t)pf_kit.scratch + (uint64_t)pf_kit.used * PF_PAGE;
}

static bool goes_back(const struct run *run, const uint8_t *moved, uint32_t page) {
    return moved[page] && run->status[page] != PF_MERGED && run->status[page] != PF_ABSENT;
}

/* Put back what was moved and not merged, end the registration of all that is not mapped to slots, wake. */
static void finish(const struct run *run, uint64_t scratch, const uint8_t *moved, bool mapped) {
    uint32_t end;
    bool kept = false;
    for (uint32_t i = 0; i < run->pages; i = end) {
        const bool back = goes_back(run, moved, i);
        for (end = i + 1; end < run->pages && goes_back(run, moved, end) == back;)
            end++;
        kept |= !back; /* or nothing was there */
        if (back && !pf_kit_put_back(pf_kit.track, run->start + (uint64_t)i * PF_PAGE,
                                     scratch + (uint64_t)i * PF_PAGE, end - i))
            memset(run->status + i, PF_UNMANAGED, end - i);
    }
    PF_FAULT(PF_FAULT_WINDOW, 7);
    for (uint32_t i = 0; i < run->pages; i = end) {
        const bool slot = mapped && run->status[i] == PF_MERGED;
        for (end = i + 1; end < run->pages && (mapped && run->status[end] == PF_MERGED) == slot;)
            end++;
        if (!slot)
            pf_kit_release(pf_kit.track, run->start + (uint64_t)i * PF_PAGE, end - i, run->region->tracked);
    }
    PF_FAULT(PF_FAULT_WINDOW, 8);
    if (mapped)
        pf_uffd_wake(pf_kit.track, run->start, (uint64_t)run->pages * PF_PAGE);
    if (kept)
        pf_kit.used += run->pages;
    PF_FAULT(PF_FAULT_WINDOW, 9);
}

/* One pass over a run of private pages; the numbers are those of docs/window.md and of the fault points. */
static void swap_once(const struct run *run, bool final) {
    const uint64_t bytes = (uint64_t)run->pages * PF_PAGE;
    uint8_t moved[PF_WINDOW_PAGES];
    bool mapped = false;
    memset(run->status, WAITING, run->pages);
    warm(run);
    const uint64_t scratch = take_scratch(run->pages);
    if (!scratch) {
        memset(run->status, PF_OFF, run->pages);
        return;
    }
    PF_FAULT(PF_FAULT_WINDOW, 1);
    int error = pf_uffd_register(pf_kit.track, run->start, bytes,
                                 PF_UFFD_MISSING | (run->region->tracked ? PF_UFFD_WP : 0));
    if (error) { /* some mappings of the run may be registered, if it has several */
        if (error != -EBUSY)
            pf_kit_release(pf_kit.track, run->start, run->pages, run->region->tracked);
        memset(run->status, register_status(error), run->pages);
        return;
    }
    PF_FAULT(PF_FAULT_WINDOW, 2);
    move_out(run, scratch, final);
    for (uint32_t i = 0; i < run->pages; i++)
        moved[i] = run->status[i] == MOVED || run->status[i] == PF_BUSY;
    PF_FAULT(PF_FAULT_WINDOW, 3);
    pf_kit_barrier();
    PF_FAULT(PF_FAULT_WINDOW, 4);
    compare(run, scratch);
    PF_FAULT(PF_FAULT_WINDOW, 5);
    if (run->target->extent)
        mapped = map_equal(run, PF_FAULT_WINDOW, 6);
    else
        leave_holes(run, scratch);
    finish(run, scratch, moved, mapped);
    pf_counts_all.windows++;
}

/* Make the pages that were refused exclusive to this process, if it is only a fork that shared them: a write fault
 * does it, which changes no byte. Pages where nothing is stay so. False: no memory. */
static bool make_exclusive(const struct run *run) {
    uint64_t entries[PF_WINDOW_PAGES];
    if (pf_pagemap_read(pf_kit.pagemap, run->start, run->pages, entries))
        return false;
    for (uint32_t i = 0, end; i < run->pages; i = end + 1) {
        for (end = i; end < run->pages && entries[end] & (PF_PM_PRESENT | PF_PM_SWAP);)
            end++;
        if (end > i && madvise(at(run->start, i), (size_t)(end - i) * PF_PAGE, PF_MADV_POPULATE_WRITE))
            return false;
    }
    return true;
}

/* EBUSY has two reasons; after a write fault only a fork that came since can be the second. */
static void tell_pinned(const struct run *run) {
    uint64_t entries[PF_WINDOW_PAGES];
    if (!memchr(run->status, PF_PINNED, run->pages) ||
        pf_pagemap_read(pf_kit.pagemap, run->start, run->pages, entries))
        return;
    for (uint32_t i = 0; i < run->pages; i++)
        if (run->status[i] == PF_PINNED && entries[i] & PF_PM_PRESENT && !(entries[i] & PF_PM_EXCLUSIVE))
            run->status[i] = PF_SHARED;
}

static void swap_private(const struct run *run) {
    swap_once(run, false);
    const uint8_t *again = memchr(run->status, AGAIN, run->pages);
    if (!again)
        return;
    const uint32_t from = (uint32_t)(again - run->status);
    const struct run rest = part(run, from, run->pages - from);
    if (!make_exclusive(&rest)) {
        memset(rest.status, PF_SHARED, rest.pages);
        return;
    }
    swap_once(&rest, true);
    tell_pinned(&rest);
}

static bool broken(uint64_t entry) {
    return entry & (PF_PM_PRESENT | PF_PM_SWAP) && !(entry & PF_PM_FILE);
}

/* Pages that map a slot already: another one than the target's, in `run` the WAITING ones. */
static void swap_merged(const struct run *run) {
    const uint64_t bytes = (uint64_t)run->pages * PF_PAGE;
    const bool held = pf_kit.ready;
    uint64_t entries[PF_WINDOW_PAGES];
    warm(run);
    /* A page that is not mapped would get a marker below, which looks like a swapped private page. */
    madvise(at(run->start, 0), bytes, PF_MADV_POPULATE_READ);
    PF_FAULT(PF_FAULT_REMAP, 1);
    if (held) {
        int error = pf_uffd_register(pf_kit.hold, run->start, bytes, PF_UFFD_WP);
        if (error) {
            pf_uffd_unregister(pf_kit.hold, run->start, bytes);
            memset(run->status, register_status(error), run->pages);
            return;
        }
        PF_FAULT(PF_FAULT_REMAP, 2);
        error = pf_uffd_protect(pf_kit.hold, run->start, bytes, true);
        PF_FAULT(PF_FAULT_REMAP, 3);
        if (error)
            change(run, WAITING, PF_BUSY);
    }
    if (pf_pagemap_read(pf_kit.pagemap, run->start, run->pages, entries))
        change(run, WAITING, PF_BUSY);
    for (uint32_t i = 0; i < run->pages; i++) {
        if (run->status[i] != WAITING)
            continue;
        const bool clear = entries[i] & PF_PM_PRESENT && entries[i] & PF_PM_FILE;
        run->status[i] = broken(entries[i]) ? PF_BROKEN
                         : !clear           ? PF_BUSY
                         : memcmp(at(run->start, i), slot_bytes(run, i), PF_PAGE) ? PF_DIFFERS
                                                                                  : EQUAL;
    }
    PF_FAULT(PF_FAULT_REMAP, 4);
    map_equal(run, PF_FAULT_REMAP, 5);
    if (held) {
        pf_uffd_unregister(pf_kit.hold, run->start, bytes); /* of what is not mapped anew */
        PF_FAULT(PF_FAULT_REMAP, 6);
        pf_uffd_wake(pf_kit.hold, run->start, bytes);
    }
    for (uint32_t i = 0; i < run->pages; i++)
        pf_counts_all.remapped += run->status[i] == PF_MERGED;
    pf_counts_all.windows++;
}

/* No userfaultfd: the caller promised that nobody writes. */
static void swap_plainly(const struct run *run) {
    uint64_t entries[PF_WINDOW_PAGES];
    uint8_t nothing[PF_WINDOW_PAGES];
    if (pf_pagemap_read(pf_kit.pagemap, run->start, run->pages, entries)) {
        memset(run->status, PF_OFF, run->pages);
        return;
    }
    if (pf_pagemap_zeros(pf_kit.pagemap, run->start, run->pages, nothing))
        memset(nothing, 0, run->pages);
    for (uint32_t i = 0; i < run->pages; i++) {
        const bool there = entries[i] & (PF_PM_PRESENT | PF_PM_SWAP) && !(nothing[i] && !run->target->extent);
        run->status[i] = !there                   ? PF_ABSENT
                         : entries[i] & PF_PM_FILE ? PF_UNSUITABLE
                         : memcmp(at(run->start, i), slot_bytes(run, i), PF_PAGE) ? PF_DIFFERS
                                                                                  : EQUAL;
    }
    if (run->target->extent) {
        map_equal(run, PF_FAULT_WINDOW, 6);
        return;
    }
    for (uint32_t i = 0; i < run->pages; i++)
        if (run->status[i] == EQUAL)
            run->status[i] = madvise(at(run->start, i), PF_PAGE, MADV_DONTNEED) ? PF_UNSUITABLE : PF_MERGED;
}

/* Pages of one kind: 0 private, 1 at the target's slot, 2 at another slot. */
static int kind_of(const struct run *run, uint32_t page) {
    const uint64_t where = *where_of(run, page);
    return !where ? 0 : run->target->extent && where == target_where(run, page) ? 1 : 2;
}

static void already(const struct run *run) {
    uint64_t entries[PF_WINDOW_PAGES];
    if (pf_pagemap_read(pf_kit.pagemap, run->start, run->pages, entries)) {
        memset(run->status, PF_BUSY, run->pages);
        return;
    }
    for (uint32_t i = 0; i < run->pages; i++)
        run->status[i] = broken(entries[i]) ? PF_BROKEN : PF_ALREADY;
}

static void swap_run(const struct run *run) {
    for (uint32_t i = 0, end; i < run->pages; i = end) {
        const int kind = kind_of(run, i);
        for (end = i + 1; end < run->pages && kind_of(run, end) == kind;)
            end++;
        const struct run inner = part(run, i, end - i);
        if (kind == 1) {
            already(&inner);
        } else if (kind == 2 && run->target->extent) {
            memset(inner.status, WAITING, inner.pages);
            swap_merged(&inner);
        } else if (kind == 2) { /* a merged page cannot become a hole: the mapping is not anonymous */
            memset(inner.status, PF_UNSUITABLE, inner.pages);
        } else if (pf_kit.ready) {
            swap_private(&inner);
        } else {
            swap_plainly(&inner);
        }
    }
}

static bool inside(const struct pf_region *region, uint64_t start, uint32_t pages) {
    return start >= region->start && (start - region->start) / PF_PAGE <= region->pages - pages &&
           pages <= region->pages;
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
    else if (!pf_kit.ready && (!plain || pf_kit.pagemap < 0))
        refused = PF_OFF;
    if (refused != PF_STATUSES) {
        memset(status, refused, pages);
    } else {
        const struct run run = {region, start, pages, target, 0, status};
        swap_run(&run);
        for (uint32_t i = 0; i < pages; i++)
            pf_counts_all.by_status[status[i]]++;
    }
    pf_w_unlock();
}
