/* Own the swap of private pages without userfaultfd, under the caller's promise: nobody writes to them meanwhile, and no
 * device has them registered. Must not know the daemon or Python.
 */
#define _GNU_SOURCE
#include <string.h>
#include <sys/mman.h>
#include "fault.h"
#include "kernel.h"
#include "run.h"

void pf_run_plain(const struct pf_run *run) {
    uint64_t entries[PF_WINDOW_PAGES];
    uint8_t nothing[PF_WINDOW_PAGES];
    if (pf_pagemap_read(pf_kit.pagemap, run->start, run->pages, entries)) {
        pf_run_set(run, PF_OFF);
        return;
    }
    if (pf_pagemap_zeros(pf_kit.pagemap, run->start, run->pages, nothing))
        memset(nothing, 0, run->pages);
    for (uint32_t i = 0; i < run->pages; i++) {
        const bool zero_run = !run->target->extent;
        if (!(entries[i] & (PF_PM_PRESENT | PF_PM_SWAP)) || (zero_run && nothing[i]))
            run->status[i] = PF_ABSENT;
        else if (entries[i] & PF_PM_FILE)
            run->status[i] = PF_UNSUITABLE;
        else
            run->status[i] = pf_run_compare(run, i, pf_run_address(run, i));
    }
    pf_counts_all.windows++;
    if (run->target->extent) {
        pf_run_map(run, PF_FAULT_WINDOW, 6);
        return;
    }
    for (uint32_t i = 0; i < run->pages; i++)
        if (run->status[i] == PF_EQUAL) {
            const bool done = !madvise((void *)(uintptr_t)pf_run_address(run, i), PF_PAGE, MADV_DONTNEED);
            run->status[i] = done ? PF_MERGED : PF_UNSUITABLE;
        }
}
