/* Own the move of merged pages from one slot to another, under writers. Must not know the daemon or Python.
 *
 * Why no byte is lost
 *
 *  1. An unbroken merged page is a page of the file: it cannot be written, only replaced by a private copy. The run is
 *     write-protected with a userfaultfd that does not answer by itself, so from then on nobody makes a writable copy.
 *  2. After that pagemap shows a file page present: nobody wrote. The bytes are those of the slot, which never change;
 *     they are compared with the new slot, and the mapping is replaced in one step. A writer that came meanwhile has not
 *     written yet; it waits, is woken, and faults again on the new mapping.
 *  3. All other pages are left alone: broken (written before), or not clearly seen as file pages (busy).
 *  4. A long-term pin for reading (RDMA, VFIO) breaks a merged page without a write. If it is taken between 2's look and
 *     the replacement, the device keeps the old copy: equal bytes, but later writes do not reach it.
 */
#define _GNU_SOURCE
#include <sys/mman.h>
#include "fault.h"
#include "kernel.h"
#include "run.h"

void pf_run_already(const struct pf_run *run) {
    uint64_t entries[PF_WINDOW_PAGES];
    if (pf_pagemap_read(pf_kit.pagemap, run->start, run->pages, entries)) {
        pf_run_set(run, PF_BUSY);
        return;
    }
    for (uint32_t i = 0; i < run->pages; i++)
        run->status[i] = pf_run_broken(entries[i]) ? PF_BROKEN : PF_ALREADY;
}

/* Make all who want to write to the run wait. False: the statuses say why not. */
static bool hold(const struct pf_run *run) {
    const uint64_t bytes = (uint64_t)run->pages * PF_PAGE;
    int error = pf_uffd_register(pf_kit.hold, run->start, bytes, PF_UFFD_WP);
    if (error) {
        pf_uffd_unregister(pf_kit.hold, run->start, bytes); /* it may have begun, if the run has several mappings */
        pf_run_set(run, pf_run_refused(error));
        return false;
    }
    PF_FAULT(PF_FAULT_REMAP, 2);
    if (pf_uffd_protect(pf_kit.hold, run->start, bytes, true))
        pf_run_change(run, PF_WAITING, PF_BUSY);
    PF_FAULT(PF_FAULT_REMAP, 3);
    return true;
}

static void compare(const struct pf_run *run) {
    uint64_t entries[PF_WINDOW_PAGES];
    if (pf_pagemap_read(pf_kit.pagemap, run->start, run->pages, entries))
        pf_run_change(run, PF_WAITING, PF_BUSY);
    for (uint32_t i = 0; i < run->pages; i++) {
        if (run->status[i] != PF_WAITING)
            continue;
        if (pf_run_broken(entries[i]))
            run->status[i] = PF_BROKEN;
        else if (entries[i] & PF_PM_PRESENT && entries[i] & PF_PM_FILE)
            run->status[i] = pf_run_compare(run, i, pf_run_address(run, i));
        else
            run->status[i] = PF_BUSY;
    }
}

void pf_run_remap(const struct pf_run *run) {
    const uint64_t bytes = (uint64_t)run->pages * PF_PAGE;
    pf_run_set(run, PF_WAITING);
    pf_run_warm(run);
    /* A page that is not mapped would get a marker when it is held, which looks like a swapped private page. */
    madvise((void *)(uintptr_t)run->start, bytes, PF_MADV_POPULATE_READ);
    PF_FAULT(PF_FAULT_REMAP, 1);
    if (!run->plain && !hold(run))
        return;
    compare(run);
    PF_FAULT(PF_FAULT_REMAP, 4);
    pf_run_map(run, PF_FAULT_REMAP, 5);
    if (!run->plain) {
        pf_uffd_unregister(pf_kit.hold, run->start, bytes); /* of what is not mapped anew; and wake all */
        PF_FAULT(PF_FAULT_REMAP, 6);
    }
    for (uint32_t i = 0; i < run->pages; i++)
        pf_counts_all.remapped += run->status[i] == PF_MERGED;
    pf_counts_all.windows++;
}
