/* Own the writers whose pages are pinned while they write: O_DIRECT for the time of a read, io_uring's fixed buffers for long.
 * A device then writes to the page itself, not to the address: whoever swaps a pinned page loses the write. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "arena.h"
#include "trades.h"
#include "uring.h"
#include "verdict.h"

enum { RING_ENTRIES = 32, ROUNDS_OF_A_PIN = 24, MOST_SPAN = 4 };

static int direct_open(struct member *me) {
    struct tools *tools = me->own;
    tools->direct = contents_file(O_RDONLY | O_DIRECT);
    return tools->direct < 0 ? -errno : 0;
}

static int direct_write(struct member *me, const struct job *jobs, uint32_t number) {
    struct tools *tools = me->own;
    for (uint32_t index = 0; index < number; index++) {
        const struct job *job = jobs + index;
        uint64_t offset = file_offset(job->page % arena.groups, job->sector, job->content);
        ssize_t got;
        do
            got = pread(tools->direct, sector_at(job->page, job->sector), SECTOR, (off_t)offset);
        while (got < 0 && errno == EINTR);
        if (got != SECTOR)
            return got < 0 ? -errno : -EPROTO;
    }
    return 0;
}

static void direct_close(struct member *me) { close(((struct tools *)me->own)->direct); }

/* Register short runs of groups, each with all its copies, so that the copies can be written alike. */
static int pin_somewhere(struct member *me) {
    struct tools *tools = me->own;
    struct iovec buffers[8];
    uint32_t number = 0;
    tools->uses = 0;
    tools->spans = 1 + below(&me->chance, 8 / arena.copies);
    for (uint32_t span = 0; span < tools->spans; span++) {
        uint32_t pages = 1 + below(&me->chance, MOST_SPAN);
        uint32_t base = below(&me->chance, 2) ? atomic_load(&arena.hot) + below(&me->chance, HOT_SPAN)
                                              : below(&me->chance, arena.groups);
        base = base % arena.groups;
        tools->base[span] = base;
        tools->pages[span] = base + pages <= arena.groups ? pages : arena.groups - base;
        for (uint32_t copy = 0; copy < arena.copies; copy++)
            buffers[number++] = (struct iovec){page_at(base + copy * arena.groups), (size_t)tools->pages[span] * PF_PAGE};
    }
    beat("registers buffers", buffers[0].iov_base);
    return ring_register(tools->ring, buffers, number);
}

static int unpin(struct member *me) {
    beat("unregisters buffers", NULL);
    return ring_unregister(((struct tools *)me->own)->ring);
}

static int uring_open(struct member *me) {
    struct tools *tools = me->own;
    tools->file = contents_file(O_RDONLY);
    tools->direct = contents_direct() ? contents_file(O_RDONLY | O_DIRECT) : -1;
    tools->ring = calloc(1, sizeof *tools->ring);
    if (tools->file < 0)
        return -errno;
    int error = ring_open(tools->ring, RING_ENTRIES);
    return error ? error : pin_somewhere(me);
}

static int64_t uring_pick(struct member *me) {
    struct tools *tools = me->own;
    uint32_t span = below(&me->chance, tools->spans);
    return tools->base[span] + below(&me->chance, tools->pages[span]);
}

/* The registered buffer that holds this page. */
static int buffer_of(const struct tools *tools, uint32_t page) {
    uint32_t group = page % arena.groups, copy = page / arena.groups;
    for (uint32_t span = 0; span < tools->spans; span++)
        if (group >= tools->base[span] && group < tools->base[span] + tools->pages[span])
            return (int)(span * arena.copies + copy);
    return -1;
}

static int uring_write(struct member *me, const struct job *jobs, uint32_t number) {
    struct tools *tools = me->own;
    uint64_t tag;
    int32_t result, error;
    for (uint32_t index = 0; index < number; index++) {
        const struct job *job = jobs + index;
        int buffer = buffer_of(tools, job->page), file = tools->direct >= 0 && below(&me->chance, 2) ? tools->direct : tools->file;
        if (buffer < 0)
            return -EPROTO;
        ring_queue(tools->ring, 0, file, sector_at(job->page, job->sector), SECTOR,
                   file_offset(job->page % arena.groups, job->sector, job->content), (uint32_t)buffer, index);
    }
    error = ring_wait(tools->ring, number);
    for (uint32_t taken = 0; !error && taken < number; taken++) {
        if (!ring_take(tools->ring, &tag, &result))
            return -EPROTO;
        if (result != SECTOR)
            return result < 0 ? result : -EPROTO;
    }
    return error;
}

static int uring_between(struct member *me) {
    struct tools *tools = me->own;
    if (++tools->uses < ROUNDS_OF_A_PIN)
        return 0;
    int error = unpin(me);
    return error ? error : pin_somewhere(me);
}

static void uring_close(struct member *me) {
    struct tools *tools = me->own;
    unpin(me);
    ring_close(tools->ring);
    close(tools->file);
    if (tools->direct >= 0)
        close(tools->direct);
}

const struct writer_kind writer_direct = {.name = "direct",
                                          .most_jobs = 2,
                                          .limit = FILE_CONTENTS - 1,
                                          .open = direct_open,
                                          .write = direct_write,
                                          .close = direct_close};
const struct writer_kind writer_uring = {.name = "uring",
                                         .most_jobs = 16,
                                         .limit = FILE_CONTENTS - 1,
                                         .open = uring_open,
                                         .write = uring_write,
                                         .between = uring_between,
                                         .pick = uring_pick,
                                         .close = uring_close};
