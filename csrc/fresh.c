/* Own memory without any page in it: see fresh.h. Must not know regions or slots.
 */
#define _GNU_SOURCE
#include "fresh.h"

#include <stddef.h>
#include <sys/mman.h>
#include "kernel.h"
#include "kit.h"

/* After mlockall new memory is locked and full: without access it is not filled, and then it is unlocked. It begins
 * between two pages without access, or it would join its neighbours there, take over their anon_vma, and not be able to
 * join those at its final place. */
uint8_t *pf_empty_map(uint64_t pages, int flags) {
    const size_t bytes = pages * PF_PAGE;
    uint8_t *memory = mmap(NULL, bytes + 2 * PF_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    const bool right = !munlock(memory, bytes + 2 * PF_PAGE) &&
                       !mprotect(memory + PF_PAGE, bytes, PROT_READ | PROT_WRITE);
    munmap(memory, PF_PAGE);
    munmap(memory + PF_PAGE + bytes, PF_PAGE);
    if (right)
        return memory + PF_PAGE;
    munmap(memory + PF_PAGE, bytes);
    return NULL;
}

static bool is_empty(uint64_t start, uint64_t pages) {
    uint64_t entries[PF_WINDOW_PAGES];
    for (uint64_t done = 0; done < pages; done += PF_WINDOW_PAGES) {
        uint32_t part = pages - done < PF_WINDOW_PAGES ? (uint32_t)(pages - done) : PF_WINDOW_PAGES;
        if (pf_pagemap_read(pf_kit.pagemap, start + done * PF_PAGE, part, entries))
            return false;
        for (uint32_t i = 0; i < part; i++)
            if (entries[i] & (PF_PM_PRESENT | PF_PM_SWAP))
                return false;
    }
    return true;
}

bool pf_fresh_map(struct pf_fresh *fresh, uint64_t pages, uint32_t vma, bool waiting) {
    const uint64_t bytes = pages * PF_PAGE;
    uint8_t *memory = pf_empty_map(pages, vma & PF_VMA_NORESERVE ? MAP_NORESERVE : 0);
    *fresh = (struct pf_fresh){.start = (uint64_t)(uintptr_t)memory, .pages = memory ? pages : 0};
    if (!memory)
        return false;
    if (vma & PF_VMA_HUGEPAGE)
        madvise(memory, bytes, MADV_HUGEPAGE);
    if (vma & PF_VMA_NOHUGEPAGE)
        madvise(memory, bytes, MADV_NOHUGEPAGE);
    if (vma & PF_VMA_MERGEABLE)
        madvise(memory, bytes, MADV_MERGEABLE);
    if (!waiting || (!pf_uffd_register(pf_kit.hold, fresh->start, bytes, PF_UFFD_MISSING | PF_UFFD_WP) &&
                     is_empty(fresh->start, pages))) /* no mlockall came between */
        return true;
    pf_fresh_unmap(fresh, waiting);
    return false;
}

void pf_fresh_unmap(struct pf_fresh *fresh, bool waiting) {
    const uint64_t bytes = fresh->pages * PF_PAGE;
    if (!bytes)
        return;
    munmap((void *)(uintptr_t)fresh->start, bytes);
    if (waiting) /* mlockall may wait there */
        pf_uffd_wake(pf_kit.hold, fresh->start, bytes);
    fresh->pages = 0;
}
