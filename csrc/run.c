/* Own what windows, remaps and plain swaps do alike with a run: see run.h. Must not know userfaultfd.
 */
#define _GNU_SOURCE
#include "run.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include "fault.h"
#include "kernel.h"

static const uint8_t zeros[PF_PAGE];

uint64_t *pf_run_where(const struct pf_run *run, uint32_t page) {
    return run->region->where + (run->start - run->region->start) / PF_PAGE + page;
}

uint64_t pf_run_target(const struct pf_run *run, uint32_t page) {
    return PF_WHERE(run->target->extent, run->target->slot + run->first + page);
}

struct pf_run pf_run_part(const struct pf_run *run, uint32_t from, uint32_t pages) {
    struct pf_run inner = *run;
    inner.start += (uint64_t)from * PF_PAGE;
    inner.pages = pages;
    inner.first += from;
    inner.status += from;
    return inner;
}

void pf_run_set(const struct pf_run *run, uint8_t status) {
    memset(run->status, status, run->pages);
}

void pf_run_change(const struct pf_run *run, uint8_t from, uint8_t to) {
    for (uint32_t i = 0; i < run->pages; i++)
        if (run->status[i] == from)
            run->status[i] = to;
}

static const uint8_t *slot_bytes(const struct pf_run *run, uint32_t page) {
    return run->target->extent ? run->target->bytes + (size_t)(run->first + page) * PF_PAGE : zeros;
}

uint8_t pf_run_compare(const struct pf_run *run, uint32_t page, uint64_t bytes) {
    return memcmp((const void *)(uintptr_t)bytes, slot_bytes(run, page), PF_PAGE) ? PF_DIFFERS : PF_EQUAL;
}

void pf_run_warm(const struct pf_run *run) {
    for (uint32_t i = 0; i < run->pages; i++)
        (void)*(const volatile uint8_t *)slot_bytes(run, i);
}

/* Map slots over equal pages; returns 0 or errno. */
static int map_slots(uint64_t start, uint32_t pages, int fd, uint64_t offset) {
    const int access = PROT_READ | PROT_WRITE;
    uint32_t tries = 1000;
    int how = MAP_PRIVATE | MAP_FIXED;
    while (mmap((void *)(uintptr_t)start, (size_t)pages * PF_PAGE, access, how, fd, (off_t)offset) == MAP_FAILED) {
        const int error = errno;
        if (!pf_hole(start, pages, &tries))
            return error;
        how = MAP_PRIVATE | MAP_FIXED_NOREPLACE; /* the bytes that were there are the slots', and the place is free for all */
    }
    return 0;
}

/* Never MAP_POPULATE: it would give each page a private copy again. */
bool pf_run_map(const struct pf_run *run, int kind, int point) {
    bool any = false;
    (void)kind, (void)point; /* of builds with fault points only */
    for (uint32_t i = 0, end; i < run->pages; i = end) {
        for (end = i; end < run->pages && run->status[end] == PF_EQUAL;)
            end++;
        if (end == i) {
            end++;
            continue;
        }
        const uint64_t offset = run->target->offset + (uint64_t)(run->first + i) * PF_PAGE;
        const int error = map_slots(pf_run_address(run, i), end - i, run->target->fd, offset);
        const uint8_t status = !error ? PF_MERGED : error == ENOMEM || error == EAGAIN ? PF_NO_VMA : PF_BAD;
        memset(run->status + i, status, end - i);
        for (uint32_t page = i; status == PF_MERGED && page < end; page++)
            *pf_run_where(run, page) = pf_run_target(run, page);
        any |= status == PF_MERGED;
        PF_FAULT(kind, point);
    }
    return any;
}

uint8_t pf_run_refused(int error) {
    return error == -ENOMEM ? PF_NO_VMA : PF_UNSUITABLE;
}

bool pf_run_broken(uint64_t entry) {
    return entry & (PF_PM_PRESENT | PF_PM_SWAP) && !(entry & PF_PM_FILE);
}
