/* Own the writers' round: verify what one's own sectors hold, choose what they hold next, write it, look again. How the bytes
 * get there is the kinds' business (stores.c, transfers.c, pinned.c). */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "arena.h"
#include "options.h"
#include "trades.h"
#include "verdict.h"

enum { MOST_JOBS = 32 };

const struct writer_kind *const writer_kinds[] = {&writer_store, &writer_read, &writer_pipe, &writer_direct, &writer_uring,
                                                  &writer_mem,   &writer_vm,   &writer_remote, NULL};

static void verify_own(struct member *me, uint32_t page, uint32_t sector) {
    uint8_t seen[SECTOR];
    uint64_t shadow = atomic_load(shadow_at(page, sector));
    beat("verifies its sector", sector_at(page, sector));
    memcpy(seen, sector_at(page, sector), SECTOR);
    uint32_t bytes = judge(page, sector, shadow, shadow, seen);
    if (bytes)
        verdict_wrong(BY_WRITER, me->name, page, sector, shadow, shadow, seen, bytes);
}

static uint32_t any_group(struct member *me) {
    uint32_t where = percent(&me->chance, options.spread) ? below(&me->chance, arena.groups)
                                                          : atomic_load(&arena.hot) + below(&me->chance, HOT_SPAN);
    return where % arena.groups;
}

/* Choose a group of which this writer owns something; returns -1 if none turned up. */
static int64_t own_group(struct member *me, uint32_t *sector) {
    const struct writer_kind *kind = ((struct tools *)me->own)->kind;
    for (int attempt = 0; attempt < 64; attempt++) {
        int64_t group = kind->pick ? kind->pick(me) : any_group(me);
        *sector = below(&me->chance, PER_PAGE);
        for (uint32_t turn = 0; turn < PER_PAGE; turn++, *sector = (*sector + 1) % PER_PAGE)
            if (owner_of((uint32_t)group, *sector) == me->index)
                return group;
    }
    return -1;
}

/* Add the jobs for one content: a sector, or a whole page, in one copy or in all. */
static uint32_t plan(struct member *me, struct job *jobs, uint32_t room, uint32_t limit) {
    uint32_t sector, number = 0;
    int64_t group = own_group(me, &sector);
    if (group < 0)
        return 0;
    int whole = one_owner((uint32_t)group) && percent(&me->chance, 30);
    uint32_t first = whole ? 0 : sector, last = whole ? PER_PAGE : sector + 1;
    uint32_t copies = percent(&me->chance, 85) ? arena.copies : 1, from = below(&me->chance, arena.copies);
    uint32_t now = content_of(atomic_load(shadow_at((uint32_t)group + from * arena.groups, sector)));
    uint32_t next = content_next(&me->chance, (uint32_t)group, now, limit);
    if (whole && zero_group((uint32_t)group) && percent(&me->chance, 50))
        next = ZEROS;
    for (uint32_t copy = 0; copy < copies; copy++)
        for (sector = first; sector < last && number < room; sector++)
            jobs[number++] = (struct job){(uint32_t)group + (from + copy) % arena.copies * arena.groups, sector, next};
    return number;
}

static int planned(const struct job *jobs, uint32_t number, const struct job *other) {
    for (uint32_t index = 0; index < number; index++)
        if (jobs[index].page == other->page && jobs[index].sector == other->sector)
            return 1;
    return 0;
}

static void write_round(struct member *me, const struct writer_kind *kind) {
    struct job jobs[MOST_JOBS], more[2 * PER_PAGE * 4];
    uint32_t number = 0, most = kind->most_jobs, chunk;
    do {
        uint32_t found = plan(me, more, 2 * PER_PAGE * 4, kind->limit);
        for (uint32_t index = 0; index < found && number < MOST_JOBS; index++)
            if (!planned(jobs, number, more + index))
                jobs[number++] = more[index];
    } while (number < most && percent(&me->chance, 80));
    for (uint32_t from = 0; from < number; from += chunk) {
        chunk = number - from < most ? number - from : most;
        for (uint32_t index = from; index < from + chunk; index++) {
            verify_own(me, jobs[index].page, jobs[index].sector);
            write_begins(jobs[index].page, jobs[index].sector, jobs[index].content);
        }
        beat("writes", sector_at(jobs[from].page, jobs[from].sector));
        int error = kind->write(me, jobs + from, chunk);
        if (error)
            verdict_failed(me->name, "its write", -error);
        for (uint32_t index = from; index < from + chunk; index++)
            write_ends(jobs[index].page, jobs[index].sector);
        count(&me->done, chunk);
        for (uint32_t index = from; index < from + chunk && percent(&me->chance, 50); index++)
            verify_own(me, jobs[index].page, jobs[index].sector);
    }
}

void writer_run(struct member *me) {
    struct tools *tools = me->own;
    const struct writer_kind *kind = tools->kind;
    int error = kind->open ? kind->open(me) : 0;
    if (error)
        verdict_failed(me->name, "could not begin", -error);
    uint64_t slice = 0;
    for (uint32_t rounds = 0; !error && !atomic_load_explicit(&crew_ending, memory_order_relaxed); rounds++) {
        int failed = kind->between ? kind->between(me) : 0;
        if (failed)
            verdict_failed(me->name, "between its writes", -failed);
        write_round(me, kind);
        if (rounds % 16 == 0)
            crew_calm(&slice);
    }
    if (kind->close && !error)
        kind->close(me);
}

static struct tools *tools_for(const struct writer_kind *kind) {
    struct tools *tools = calloc(1, sizeof *tools);
    tools->kind = kind;
    tools->staging = mmap(NULL, 16 * PF_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return tools;
}

static int wanted(const struct writer_kind *kind) {
    return options_kind(kind->name) && (kind != &writer_direct || contents_direct());
}

/* The writers in turn: store, store again, then one of each other kind, round and round. */
static const struct writer_kind *in_turn(uint32_t number) {
    const struct writer_kind *turn[16];
    uint32_t length = 0;
    for (uint32_t kind = 0; writer_kinds[kind]; kind++)
        if (wanted(writer_kinds[kind])) {
            turn[length++] = writer_kinds[kind];
            if (writer_kinds[kind] == &writer_store)
                turn[length++] = writer_kinds[kind];
        }
    if (!options.threads && number >= length)
        return NULL;
    return length ? turn[number % length] : NULL;
}

uint32_t writers_number(void) {
    uint32_t number = 0;
    while (in_turn(number) && (!options.threads || number < options.threads))
        number++;
    return number;
}

void writers_begin(void) {
    for (uint32_t number = 0; number < arena.owners && in_turn(number); number++)
        crew_begin(in_turn(number)->name, writer_run, tools_for(in_turn(number)), number);
}
