/* Own the readers: they look at pages of all writers while these write, in all the ways bytes leave a process, and judge what
 * they saw. */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "arena.h"
#include "options.h"
#include "trades.h"
#include "uring.h"
#include "verdict.h"

struct reader_kind {
    const char *name;
    int (*open)(struct member *me);
    int (*read)(struct member *me, uint8_t *page, uint8_t *seen); /* copy a page to `seen`; 0 or a negative errno */
};

static int exact(ssize_t moved) { return moved == PF_PAGE ? 0 : moved < 0 ? -errno : -EPROTO; }

static int look_read(struct member *me, uint8_t *page, uint8_t *seen) {
    (void)me;
    memcpy(seen, page, PF_PAGE);
    return 0;
}

static int write_open(struct member *me) { return pipe2(((struct tools *)me->own)->pipe, O_CLOEXEC) ? -errno : 0; }

static int write_read(struct member *me, uint8_t *page, uint8_t *seen) {
    struct tools *tools = me->own;
    int error = exact(write(tools->pipe[1], page, PF_PAGE));
    return error ? error : exact(read(tools->pipe[0], seen, PF_PAGE));
}

static int vmread_read(struct member *me, uint8_t *page, uint8_t *seen) {
    struct iovec to = {seen, PF_PAGE}, from = {page, PF_PAGE};
    (void)me;
    return exact(process_vm_readv(getpid(), &to, 1, &from, 1, 0));
}

static int memread_open(struct member *me) {
    struct tools *tools = me->own;
    tools->file = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
    return tools->file < 0 ? -errno : 0;
}

/* A page in a window refuses this with EIO, as it may (window.md section 3). */
static int memread_read(struct member *me, uint8_t *page, uint8_t *seen) {
    ssize_t got;
    while ((got = pread(((struct tools *)me->own)->file, seen, PF_PAGE, (off_t)page)) < 0 && (errno == EIO || errno == EINTR)) {
        count(&me->again, 1);
        beat("reads again", page);
        sched_yield();
    }
    return exact(got);
}

static int own_file(struct tools *tools, int flags) {
    tools->file = open(options.directory, O_TMPFILE | O_RDWR | O_CLOEXEC | flags, 0600);
    return tools->file < 0 ? -errno : 0;
}

static int directwrite_open(struct member *me) { return own_file(me->own, O_DIRECT); }

static int directwrite_read(struct member *me, uint8_t *page, uint8_t *seen) {
    struct tools *tools = me->own;
    int error = exact(pwrite(tools->file, page, PF_PAGE, 0));
    return error ? error : exact(pread(tools->file, seen, PF_PAGE, 0));
}

static int uringwrite_open(struct member *me) {
    struct tools *tools = me->own;
    tools->ring = calloc(1, sizeof *tools->ring);
    int error = own_file(tools, 0);
    return error ? error : ring_open(tools->ring, 4);
}

/* Register the page, read it by WRITE_FIXED a few times, let it go: readers' pins come and go all over the arena. */
static int uringwrite_read(struct member *me, uint8_t *page, uint8_t *seen) {
    struct tools *tools = me->own;
    struct iovec buffer = {page, PF_PAGE};
    uint64_t tag;
    int32_t result = -EPROTO;
    int error = ring_register(tools->ring, &buffer, 1);
    if (error)
        return error;
    ring_queue(tools->ring, 1, tools->file, page, PF_PAGE, 0, 0, 0);
    error = ring_wait(tools->ring, 1);
    if (!error && (!ring_take(tools->ring, &tag, &result) || result != (int32_t)PF_PAGE))
        error = result < 0 ? result : -EPROTO;
    int undone = ring_unregister(tools->ring);
    return error ? error : undone ? undone : exact(pread(tools->file, seen, PF_PAGE, 0));
}

static const struct reader_kind kinds[] = {{"look", NULL, look_read},
                                           {"write", write_open, write_read},
                                           {"vmread", NULL, vmread_read},
                                           {"memread", memread_open, memread_read},
                                           {"directwrite", directwrite_open, directwrite_read},
                                           {"uringwrite", uringwrite_open, uringwrite_read}};

static void shadow_of_page(uint32_t page, uint64_t shadow[PER_PAGE]) {
    for (uint32_t sector = 0; sector < PER_PAGE; sector++)
        shadow[sector] = atomic_load(shadow_at(page, sector));
}

void reader_run(struct member *me) {
    struct tools *tools = me->own;
    const struct reader_kind *kind = tools->kind;
    uint64_t before[PER_PAGE], after[PER_PAGE], slice = 0;
    int error = kind->open ? kind->open(me) : 0;
    if (error)
        verdict_failed(me->name, "could not begin", -error);
    while (!error && !atomic_load_explicit(&crew_ending, memory_order_relaxed)) {
        uint32_t group = below(&me->chance, 2) ? atomic_load(&arena.hot) + below(&me->chance, HOT_SPAN)
                                               : below(&me->chance, arena.groups);
        uint32_t page = group % arena.groups + below(&me->chance, arena.copies) * arena.groups;
        shadow_of_page(page, before);
        beat("reads", page_at(page));
        int failed = kind->read(me, page_at(page), tools->staging);
        if (failed)
            verdict_failed(me->name, "its read", -failed);
        shadow_of_page(page, after);
        for (uint32_t sector = 0; !failed && sector < PER_PAGE; sector++) {
            const uint8_t *seen = tools->staging + sector * SECTOR;
            uint32_t bytes = judge(page, sector, before[sector], after[sector], seen);
            if (bytes)
                verdict_wrong(BY_READER, me->name, page, sector, before[sector], after[sector], seen, bytes);
        }
        count(&me->done, 1);
        crew_calm(&slice);
    }
}

void readers_begin(void) {
    for (uint32_t kind = 0, number = 0; kind < sizeof kinds / sizeof *kinds; kind++) {
        if (!options_kind(kinds[kind].name) || (kinds[kind].read == directwrite_read && !contents_direct()))
            continue;
        struct tools *tools = calloc(1, sizeof *tools);
        tools->kind = kinds + kind;
        tools->staging = mmap(NULL, 16 * PF_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        crew_begin(kinds[kind].name, reader_run, tools, number++);
    }
}
