/* Own what the daemon's packets mean. */
#define _GNU_SOURCE
#include "packets.h"

#include <string.h>
#include <unistd.h>

#include "extents.h"
#include "fault.h"
#include "regions.h"
#include "waiting.h"
#include "window.h"

static bool on_extent(const struct pf_extent *extent, int fd, bool lost) {
    if (extent->zero || (fd < 0 && !lost)) {
        if (fd >= 0)
            close(fd);
        return false;
    }
    bool fine = pf_extent_take(extent->extent, extent->slots, fd) == 0;
    PF_FAULT(PF_FAULT_LINK, 7);
    return fine;
}

/* How many of these runs are neighbours of one region that shall all be given back: one restore does them, which may have to clone
 * the process, and that once. */
static uint32_t neighbours(const struct pf_run *runs, uint32_t count) {
    uint32_t n = 1;
    while (n < count && runs[0].extent == PF_PRIVATE && runs[n].extent == PF_PRIVATE &&
           runs[n].region == runs[0].region && runs[n].start == runs[n - 1].start + (uint64_t)runs[n - 1].pages * PF_PAGE)
        n++;
    return n;
}

/* `run` = 2 at the daemon: everything private again. */
static void give_back(int64_t id, uint64_t start, uint32_t pages, bool plain, uint8_t *status) {
    static uint64_t where[PF_BATCH_PAGES]; /* of the one thread that is here */
    struct pf_region region;
    if (!pf_region_get(id, &region) || region.closing || start % PF_PAGE || start < region.start ||
        pages > region.pages || start - region.start > (region.pages - pages) * PF_PAGE) {
        memset(status, PF_UNMANAGED, pages);
        return;
    }
    pf_restore(start, pages, plain);
    if (pf_region_where(id, (start - region.start) / PF_PAGE, pages, where))
        memset(status, PF_UNMANAGED, pages);
    else
        for (uint32_t i = 0; i < pages; i++)
            status[i] = where[i] ? PF_PINNED : PF_MERGED;
}

static void do_run(const struct pf_run *run, bool plain, uint8_t *status) {
    struct pf_target target = {.extent = 0};
    if (run->extent) {
        struct pf_extent_view *extent = pf_extent_find(run->extent);
        if (extent == NULL || run->slot >= extent->slots || run->pages > extent->slots - run->slot) {
            memset(status, PF_BAD, run->pages);
            return;
        }
        if (extent->fd < 0) {
            memset(status, PF_NO_VMA, run->pages);
            return;
        }
        if (!pf_extent_look(extent, run->slot, run->pages)) {
            memset(status, PF_BAD, run->pages);
            return;
        }
        target = (struct pf_target){.extent = extent->ours,
                                    .slot = run->slot,
                                    .fd = extent->fd,
                                    .bytes = extent->bytes + (size_t)run->slot * PF_PAGE,
                                    .offset = (uint64_t)run->slot * PF_PAGE};
    }
    pf_window(run->region, run->start, run->pages, &target, plain, status);
}

static bool on_windows(const struct pf_windows *windows) {
    static struct pf_outcome outcome;
    uint32_t pages = 0;
    if (windows->count == 0 || windows->count > PF_BATCH_RUNS || windows->plain > 1)
        return false;
    for (uint32_t i = 0; i < windows->count; i++) {
        const struct pf_run *run = &windows->runs[i];
        if (run->pages == 0 || run->pages > PF_RUN_PAGES || run->zero)
            return false;
        pages += run->pages;
    }
    memset(&outcome, 0, sizeof outcome);
    outcome.batch = windows->batch;
    outcome.pages = pages;
    PF_FAULT(PF_FAULT_LINK, 8);
    pages = 0;
    for (uint32_t i = 0, n; i < windows->count; i += n) {
        const struct pf_run *run = &windows->runs[i];
        const bool plain = windows->plain && pf_waiting_begin_plain(run->region);
        uint32_t length = 0;
        n = neighbours(run, windows->count - i);
        for (uint32_t k = 0; k < n; k++)
            length += run[k].pages;
        if (run->extent == PF_PRIVATE)
            give_back(run->region, run->start, length, plain, outcome.status + pages);
        else
            do_run(run, plain, outcome.status + pages);
        if (plain)
            pf_waiting_end_plain();
        pages += length;
        PF_FAULT(PF_FAULT_LINK, 9);
    }
    pf_window_drop();
    pf_extents_drop();
    PF_FAULT(PF_FAULT_LINK, 10);
    bool said = pf_link_say(&outcome, PF_OUTCOME, sizeof outcome);
    PF_FAULT(PF_FAULT_LINK, 11);
    return said;
}

static bool on_release(const struct pf_release *release) {
    bool known = release->zero == 0 && pf_extent_release(release->extent);
    PF_FAULT(PF_FAULT_LINK, 12);
    return known;
}

static bool on_synced(const struct pf_synced *synced) {
    if (synced->zero || synced->error > 0)
        return false;
    pf_waiting_answer(synced);
    return pf_link_say_syncs(); /* one that waited for its turn */
}

bool pf_packet_fits(const union pf_packet *packet, size_t bytes) {
    static const struct {
        uint16_t type;
        size_t bytes;
    } sizes[] = {{PF_WELCOME, sizeof packet->welcome}, {PF_EXTENT, sizeof packet->extent},
                 {PF_WINDOWS, sizeof packet->windows}, {PF_RELEASE, sizeof packet->release},
                 {PF_SYNCED, sizeof packet->synced}};
    const struct pf_header *header = &packet->header;
    if (bytes < sizeof *header || header->magic != PF_MAGIC || header->version != PF_VERSION ||
        header->length != bytes || header->zero)
        return false;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].type == header->type)
            return sizes[i].bytes == bytes;
    return false;
}

bool pf_packet_do(const union pf_packet *packet, int fd, bool lost) {
    if (packet->header.type == PF_EXTENT)
        return on_extent(&packet->extent, fd, lost);
    if (fd >= 0) {
        close(fd);
        return false;
    }
    switch (packet->header.type) {
    case PF_WINDOWS:
        return on_windows(&packet->windows);
    case PF_RELEASE:
        return on_release(&packet->release);
    case PF_SYNCED:
        return on_synced(&packet->synced);
    default:
        return false; /* WELCOME, a second time */
    }
}
