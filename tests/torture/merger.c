/* Own merging in this process: what a daemon would do (copy pages into slots, choose runs) and what the agent's two threads do:
 * one runs windows, the other gives back, un-advises and advises again. Both live in a file table of their own. */
#include "merger.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../csrc/regions.h"
#include "adverse.h"
#include "arena.h"
#include "door.h"
#include "extents.h"
#include "options.h"
#include "verdict.h"

enum {
    REGIONS = 8,
    LIVE = 6, /* extents that windows map */
    MOST_EXTENTS = 64,
    USES = 500, /* windows onto an extent until it is retired */
    DRAINED_AT_ONCE = 4,
    DRAINED_PAGES = 128,
    CHILD_WINDOWS = 64,
    CHILD_EXTENTS = 1 << 30 /* number of a child's extent: not one of the parent's */
};

struct merging merging;
_Atomic int merger_finish, merger_open;
char merger_why[PF_TEXT];

static const struct door *door;
static _Atomic int64_t region_ids[REGIONS];
static struct extent extents[MOST_EXTENTS]; /* number 0: unused */
static uint32_t uses[MOST_EXTENTS];
static uint32_t next_number = 1;
static uint32_t *where; /* per page: number of the extent it was last merged onto; 0: given back since */

/* Region r: its share of the arena but for the last page, which is never advised: its neighbours' windows must not touch it. */
static uint32_t region_first(uint32_t region) { return (uint32_t)((uint64_t)arena.pages * region / REGIONS); }
static uint32_t region_pages(uint32_t region) { return region_first(region + 1) - region_first(region) - 1; }

static uint32_t region_of(uint32_t page) {
    uint32_t region = REGIONS - 1;
    while (page < region_first(region))
        region--;
    return region;
}

static void note(uint32_t first, uint32_t pages, char what, const uint8_t *status) {
    uint64_t number = atomic_load(&merging.windows) + atomic_load(&merging.restores);
    for (uint32_t page = 0; page < pages; page++) {
        uint64_t word = number << 16 | (uint64_t)(uint8_t)what << 8 | (status ? status[page] : 0);
        atomic_store_explicit(&arena.windowed[first + page], word, memory_order_relaxed);
    }
}

static uint32_t run_length(struct member *me) {
    static const uint32_t lengths[] = {1, 1, 2, 4, 8, 16, 32, 64};
    uint32_t length = lengths[below(&me->chance, 8)];
    length = length < options.run ? length : options.run;
    return below(&me->chance, 2) ? length : 1 + below(&me->chance, length);
}

/* A run inside a region and inside one copy of the groups, near the hot place or anywhere. */
static uint32_t choose_run(struct member *me, uint32_t *region, uint32_t *first) {
    uint32_t group = below(&me->chance, 10) < 6 ? (atomic_load(&arena.hot) + below(&me->chance, HOT_SPAN)) % arena.groups
                                                : below(&me->chance, arena.groups);
    uint32_t page = group + below(&me->chance, arena.copies) * arena.groups, pages = run_length(me);
    *region = region_of(page);
    uint32_t end = region_first(*region) + region_pages(*region);
    uint32_t copy_end = (page / arena.groups + 1) * arena.groups;
    end = end < copy_end ? end : copy_end;
    *first = page;
    return page >= end ? 0 : pages < end - page ? pages : end - page;
}

static struct extent *live(uint32_t index) { return extents[index].number && extents[index].bytes ? extents + index : NULL; }

static struct extent *new_extent(void) {
    for (uint32_t index = 0; index < MOST_EXTENTS; index++) {
        if (extents[index].number)
            continue;
        int error = extent_open(extents + index, next_number++, arena.groups);
        if (error && !(error == -ENOMEM && options_memory_may_fail()))
            verdict_failed("merger", "no extent", -error);
        uses[index] = 0;
        return error ? NULL : extents + index;
    }
    return NULL;
}

/* One whose slots equal the run just now, if one turns up; else any. */
static struct extent *choose_extent(struct member *me, uint32_t page, uint32_t *index) {
    struct extent *chosen = NULL;
    uint32_t slot = page % arena.groups;
    for (int attempt = 0; attempt < 12; attempt++) {
        uint32_t which = below(&me->chance, LIVE + 2);
        struct extent *extent = live(which);
        if (!extent)
            continue;
        chosen = extent;
        *index = which;
        if (!extent->sums[slot] || !memcmp(extent->bytes + (uint64_t)slot * PF_PAGE, page_at(page), PF_PAGE))
            break;
    }
    return chosen;
}

static void retire(struct extent *extent) {
    if (extent_retire(extent, arena.groups))
        verdict_failed("merger", "a slot's bytes changed after they were filled", 0);
}

static void run_window(struct member *me, uint32_t region, uint32_t first, uint32_t pages, struct extent *extent) {
    uint8_t status[PF_RUN_PAGES];
    struct pf_target target = {0};
    uint32_t slot = first % arena.groups;
    if (extent) {
        for (uint32_t page = 0; page < pages; page++)
            if (!extent->sums[slot + page])
                extent_fill(extent, slot + page, page_at(first + page));
        target = (struct pf_target){extent->number, slot, extent->shared, extent->bytes + (uint64_t)slot * PF_PAGE,
                                    (uint64_t)slot * PF_PAGE};
    }
    memset(status, 0xff, sizeof status);
    beat("runs a window", page_at(first));
    door->window(atomic_load(&region_ids[region]), (uint64_t)page_at(first), pages, &target, status);
    atomic_fetch_add(&merging.windows, door->windows ? door->windows() - atomic_load(&merging.windows) : 1);
    for (uint32_t page = 0; page < pages; page++) {
        if (status[page] >= PF_STATUSES) {
            verdict_failed(me->name, "a window left a page without a status", status[page]);
            continue;
        }
        atomic_fetch_add(&merging.by_status[status[page]], 1);
        if (status[page] == PF_MERGED && extent)
            where[first + page] = extent->number;
    }
    note(first, pages, extent ? 'w' : 'z', status);
    count(&me->done, 1);
}

static int64_t give_back(uint32_t first, uint32_t pages) {
    beat("gives back", page_at(first));
    int64_t refused = door->restore((uint64_t)page_at(first), pages);
    atomic_fetch_add(&merging.restores, 1);
    atomic_fetch_add(&merging.restored, pages);
    if (refused < 0 || refused > (int64_t)pages)
        verdict_failed("restore", "a number of refused pages that cannot be", refused);
    else
        atomic_fetch_add(&merging.not_restored, (uint64_t)refused);
    note(first, pages, 'r', NULL);
    return refused;
}

/* Move or give back some pages that are still on a retired extent; when nothing maps it any more, it goes. */
static void drain(struct member *me, struct extent *extent) {
    uint32_t handled = 0, from = below(&me->chance, arena.pages), other;
    for (uint32_t step = 0, pages = 1; step < arena.pages && handled < DRAINED_AT_ONCE; step += pages) {
        uint32_t page = (from + step) % arena.pages, region = region_of(page), end = region_first(region) + region_pages(region);
        pages = 1;
        if (where[page] != extent->number)
            continue;
        while (page + pages < end && where[page + pages] == extent->number && pages < PF_RUN_PAGES)
            pages++;
        handled++;
        struct extent *onto = page / arena.groups == (page + pages - 1) / arena.groups ? choose_extent(me, page, &other) : NULL;
        if (onto && below(&me->chance, 4))
            run_window(me, region, page, pages, onto);
        if (where[page] == extent->number && !give_back(page, pages = end - page < DRAINED_PAGES ? end - page : DRAINED_PAGES))
            memset(where + page, 0, pages * sizeof *where);
    }
    if (!handled && extent_free(extent, arena.groups))
        atomic_fetch_add(&merging.extents, 1);
}

static void keep_store(struct member *me) {
    uint32_t alive = 0, used = 0;
    for (uint32_t index = 0; index < MOST_EXTENTS; index++) {
        alive += live(index) != NULL;
        used += extents[index].number != 0;
        if (live(index) && uses[index] > USES) {
            retire(extents + index);
            alive--;
        } else if (extents[index].number && !live(index))
            drain(me, extents + index);
    }
    if (alive < LIVE && used < LIVE + 2)
        new_extent();
}

static void merge_step(struct member *me) {
    uint32_t region, first, index, pages = choose_run(me, &region, &first);
    if (!pages)
        return;
    if (percent(&me->chance, 6)) {
        uint32_t group = first % arena.groups; /* most zero runs where zeros are */
        while (percent(&me->chance, 90) && !zero_group(group % arena.groups) && pages > 1)
            pages--, first++, group++;
        run_window(me, region, first, pages, NULL);
        return;
    }
    struct extent *extent = choose_extent(me, first, &index);
    if (!extent)
        return;
    uses[index]++;
    run_window(me, region, first, pages, extent);
}

/* Be like the agent's threads, deaf to signals. */
static void be_agent(sigset_t *before) {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, before);
}

/* Run before all others (where that is permitted), so that many windows happen; or take turns with them, so that they come in
 * between: the processor is then taken away in the middle of a window. */
static void hurry(int before_others) {
    struct sched_param order = {.sched_priority = before_others ? 1 : 0};
    pthread_setschedparam(pthread_self(), before_others ? SCHED_RR : SCHED_OTHER, &order);
}

static int64_t advise(uint32_t region) {
    int64_t id;
    do /* memory may be refused on purpose */
        id = door->advise((uint64_t)page_at(region_first(region)), (uint64_t)region_pages(region) * PF_PAGE);
    while (id == -ENOMEM && options_memory_may_fail() && !usleep(1000));
    if (id <= 0)
        verdict_failed("merger", "advise", -id);
    atomic_store(&region_ids[region], id);
    return id;
}

static int64_t unadvise(uint32_t region) {
    uint32_t first = region_first(region), pages = region_pages(region);
    beat("un-advises", page_at(first));
    int64_t refused = door->unadvise(atomic_load(&region_ids[region]), (uint64_t)page_at(first), pages);
    if (refused < 0)
        verdict_failed("merger", "unadvise", -refused);
    note(first, pages, 'u', NULL);
    return refused;
}

/* The agent's second thread: gives back, un-advises and advises again. */
static void restorer_run(struct member *me) {
    be_agent(NULL);
    int closed = -1; /* a region that is closed but has pages that were refused */
    while (!atomic_load(&crew_ending)) {
        uint32_t region, first, pages = choose_run(me, &region, &first);
        if (pages && region != (uint32_t)closed)
            give_back(first, pages);
        if (closed < 0 && percent(&me->chance, 1))
            closed = (int)below(&me->chance, REGIONS);
        if (closed >= 0 && !unadvise((uint32_t)closed)) {
            atomic_fetch_add(&merging.advised_again, 1);
            advise((uint32_t)closed);
            closed = -1;
        }
        count(&me->done, 1);
        beat("rests", NULL);
        usleep(below(&me->chance, 1000));
    }
}

static void end_regions(void) {
    for (uint32_t region = 0; region < REGIONS; region++) {
        int64_t refused = unadvise(region);
        if (refused)
            verdict_failed("the end", "pages of a region could not be given back although nothing is pinned", refused);
    }
    uint64_t foreign = foreign_pages(0, arena.pages);
    if (foreign)
        verdict_failed("the end", "pages are not plain anonymous memory", (int64_t)foreign);
}

static void end_store(void) {
    for (uint32_t index = 0; index < MOST_EXTENTS; index++) {
        if (live(index))
            retire(extents + index);
        if (extents[index].number && !extent_free(extents + index, arena.groups))
            verdict_failed("the end", "an extent is still mapped or open", extents[index].number);
    }
}

void merger_run(struct member *me) {
    int error = unshare(CLONE_FILES) ? -errno : 0;
    be_agent(NULL);
    where = calloc(arena.pages, sizeof *where);
    error = error ? error : door->open(merger_why);
    if (error && !merger_why[0])
        snprintf(merger_why, sizeof merger_why, "errno %d", -error);
    atomic_store(&merger_open, error ? -1 : 1);
    for (uint32_t region = 0; !error && region < REGIONS; region++)
        error = advise(region) > 0 ? 0 : -1;
    if (error)
        return;
    adverse_begin(me->chance);
    crew_begin("restorer", restorer_run, NULL, 0);
    for (uint32_t steps = 0; !atomic_load(&crew_ending); steps++) {
        if (steps % 64 == 0) {
            keep_store(me);
            atomic_store(&arena.hot, below(&me->chance, arena.groups));
        }
        if (steps % 1024 == 0)
            hurry(steps / 1024 % 4 != 3);
        merge_step(me);
        if (options.windows && atomic_load(&merging.windows) >= options.windows)
            atomic_store(&crew_ending, 1);
    }
    while (!atomic_load(&merger_finish))
        usleep(5000), beat("waits for the others", NULL);
    crew_join(restorer_run);
    adverse_end();
    end_regions();
    end_store();
    door->close();
}

/* The parent's extents are not open here, but their pages are mapped: a child has a store of its own and moves pages to it. */
static void merge_in_child(struct member *me) {
    static struct extent own;
    uint32_t region, first;
    int error = door->open(merger_why);
    error = error ? error : extent_open(&own, CHILD_EXTENTS, arena.groups);
    if (error == -ENOMEM && options_memory_may_fail())
        return;
    if (error) {
        verdict_failed(me->name, "its windows", -error);
        return;
    }
    for (uint32_t step = 0; step < CHILD_WINDOWS; step++) {
        uint32_t pages = choose_run(me, &region, &first);
        if (pages)
            run_window(me, region, first, pages, below(&me->chance, 8) ? &own : NULL);
    }
    adverse_end();
    for (region = 0; region < REGIONS; region++) {
        struct pf_region about;
        first = region_first(region);
        const uint32_t pages = region_pages(region);
        if (!pf_region_get(atomic_load(&region_ids[region]), &about))
            continue; /* it was ending when the child was made, and nobody ends it here: its pages stay as they are */
        if (give_back(first, pages) && !options_kind("limit"))
            verdict_failed(me->name, "a child could not give its pages back", region);
        if (foreign_pages(first, pages) && !options_kind("limit"))
            verdict_failed(me->name, "a child's pages are not plain anonymous memory", (int64_t)foreign_pages(first, pages));
    }
    retire(&own);
    if (!extent_free(&own, arena.groups) && !options_kind("limit"))
        verdict_failed(me->name, "a child's extent is still mapped", 0);
    door->close();
}

void merger_in_child(struct member *me) {
    sigset_t before;
    if (!door) {
        client_in_child(me);
        return;
    }
    if (door != &door_agent)
        return;
    be_agent(&before);
    merge_in_child(me);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void merger_begin(void) {
    door = !strcmp(options.windows_by, "agent") ? &door_agent : !strcmp(options.windows_by, "none") ? &door_none : &door_specimen;
    crew_begin("merger", merger_run, NULL, 0);
}
