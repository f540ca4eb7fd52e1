/* Own how an embedded merge looks at the process's own memory. */
#define _GNU_SOURCE
#include "strip.h"

#include <fcntl.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "hash.h"
#include "kernel.h"

static int pagemap = -1, memory = -1;

/* Not by process_vm_readv if it can be helped: that pins, and a page shared by fork is copied for being pinned. */
bool pf_strip_copy(uint64_t start, uint8_t *to, uint32_t pages) {
    size_t size = (size_t)pages * PF_PAGE;
    if (memory < 0)
        memory = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
    if (memory >= 0)
        return pread(memory, to, size, (off_t)start) == (ssize_t)size;
    struct iovec here = {to, size}, there = {(void *)start, size};
    return process_vm_readv(getpid(), &here, 1, &there, 1, 0) == (ssize_t)size;
}

void pf_strip_look(const struct pf_region *region, uint64_t first, uint32_t count, struct pf_page *pages, uint8_t *bytes) {
    uint64_t start = region->start + first * PF_PAGE;
    uint64_t where[PF_STRIP], entries[PF_STRIP];
    uint8_t zeros[PF_STRIP] = {0};
    bool wanted = false, gone = pf_region_where(region->id, first, count, where) != 0;
    if (pagemap < 0)
        pagemap = pf_pagemap_open();
    bool seen = pagemap >= 0 && pf_pagemap_read(pagemap, start, count, entries) >= 0;
    if (seen && pf_pagemap_zeros(pagemap, start, count, zeros) < 0)
        memset(zeros, 0, sizeof zeros);
    for (uint32_t i = 0; i < count; i++) {
        struct pf_page *page = &pages[i];
        *page = (struct pf_page){.plan = PF_PLAN_NOTHING};
        bool private = seen && (entries[i] & PF_PM_PRESENT) && !(entries[i] & PF_PM_FILE);
        page->alone = seen && (entries[i] & PF_PM_EXCLUSIVE);
        if (gone)
            page->status = PF_UNMANAGED;
        else if (!seen)
            page->status = PF_OFF;
        else if (where[i])
            page->status = private ? PF_BROKEN : PF_ALREADY;
        else if (!(entries[i] & PF_PM_PRESENT) || zeros[i])
            page->status = PF_ABSENT;
        else if (!private)
            page->status = PF_UNSUITABLE;
        else
            page->status = PF_UNKNOWN;
        wanted |= page->status == PF_UNKNOWN;
    }
    if (!wanted)
        return;
    bool whole = pf_strip_copy(start, bytes, count);
    for (uint32_t i = 0; i < count; i++) {
        struct pf_page *page = &pages[i];
        bool zero;
        if (page->status != PF_UNKNOWN)
            continue;
        if (!whole && !pf_strip_copy(start + (uint64_t)i * PF_PAGE, bytes + i * PF_PAGE, 1)) {
            page->status = PF_UNMANAGED;
            continue;
        }
        page->hash = pf_page_hash(bytes + i * PF_PAGE, &zero);
        if (zero)
            page->plan = PF_PLAN_ZERO;
    }
}

void pf_strip_alone(uint64_t start, uint32_t count, bool *alone) {
    uint64_t entries[PF_STRIP];
    bool seen = pagemap >= 0 && pf_pagemap_read(pagemap, start, count, entries) >= 0;
    for (uint32_t i = 0; i < count; i++)
        alone[i] = seen && (entries[i] & PF_PM_EXCLUSIVE);
}

/* A window may cost two mappings more. Half of what the kernel allows is for the program. */
uint64_t pf_strip_budget(void) {
    static char text[65536];
    uint64_t most = 0, used = 0;
    int fd = open("/proc/sys/vm/max_map_count", O_RDONLY | O_CLOEXEC);
    ssize_t got = fd >= 0 ? read(fd, text, sizeof text) : 0;
    for (ssize_t i = 0; i < got && text[i] >= '0' && text[i] <= '9'; i++)
        most = most * 10 + (uint64_t)(text[i] - '0');
    if (fd >= 0)
        close(fd);
    if (most == 0)
        most = 65530;
    fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    while (fd >= 0 && (got = read(fd, text, sizeof text)) > 0)
        for (ssize_t i = 0; i < got; i++)
            used += text[i] == '\n';
    if (fd >= 0)
        close(fd);
    return used < most / 2 ? (most / 2 - used) / 2 : 0;
}

void pf_strip_close(void) {
    if (memory >= 0)
        close(memory);
    if (pagemap >= 0)
        close(pagemap);
    memory = pagemap = -1;
}

void pf_strip_child(void) {
    memory = pagemap = -1; /* of the parent's private table */
}
