/* Own merging through the agent's public face: pf_start, pf_advise, pf_unadvise, pf_merge, with a daemon or the embedded store. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "adverse.h"
#include "arena.h"
#include "merger.h"
#include "options.h"
#include "verdict.h"

enum { REGIONS = 16, MERGE_WAIT = 20000 };

static int64_t ids[REGIONS]; /* 0: not advised just now */
static uint64_t left_behind; /* pages that were refused when their region was un-advised */

static uint32_t region_first(uint32_t region) { return (uint32_t)((uint64_t)arena.pages * region / REGIONS); }
static uint32_t region_pages(uint32_t region) { return region_first(region + 1) - region_first(region) - 1; }

static void advise(uint32_t region) {
    beat("advises", page_at(region_first(region)));
    int64_t id = pf_advise((uint64_t)page_at(region_first(region)), (uint64_t)region_pages(region) * PF_PAGE, 0);
    if (id < 0 && !(id == -EOPNOTSUPP && left_behind))
        verdict_failed("client", "pf_advise", -id);
    ids[region] = id > 0 ? id : 0;
}

static void unadvise(uint32_t region) {
    int64_t id = ids[region], refused;
    if (!id)
        return;
    ids[region] = 0; /* at once: a child that is forked meanwhile must not think that it has the region */
    beat("un-advises", page_at(region_first(region)));
    refused = pf_unadvise(id);
    if (refused < 0)
        verdict_failed("client", "pf_unadvise", -refused);
    else
        left_behind += (uint64_t)refused;
    atomic_fetch_add(&merging.not_restored, refused > 0 ? (uint64_t)refused : 0);
    atomic_fetch_add(&merging.restores, 1);
}

static void merge(uint32_t region) {
    struct pf_report report = {.size = sizeof report};
    beat("merges", page_at(region_first(region)));
    int error = ids[region] ? pf_merge(ids[region], MERGE_WAIT, &report) : 0;
    /* Late, told not to merge (run = 0 or 2), or gone: a daemon may be all that. */
    int excused = options.daemon && (error == -ETIMEDOUT || error == -EAGAIN || error == -ECONNRESET || error == -ENOTCONN);
    if (error < 0 && !excused)
        verdict_failed("client", "pf_merge", -error);
    if (report.saved_bytes > atomic_load(&merging.saved_bytes))
        atomic_store(&merging.saved_bytes, report.saved_bytes);
}

static void look(struct member *me) {
    struct pf_state state = {.size = sizeof state};
    int error = pf_get_state(&state);
    if (error < 0)
        verdict_failed("client", "pf_get_state", -error);
    for (uint32_t status = 0; status < PF_STATUSES; status++)
        atomic_store(&merging.by_status[status], state.by_status[status]);
    atomic_store(&merging.windows, state.windows);
    atomic_store(&merging.restored, state.restored);
    atomic_store(&me->done, state.windows);
    if (options.windows && state.windows >= options.windows)
        atomic_store(&crew_ending, 1);
}

static int begin(void) {
    struct pf_state state = {.size = sizeof state};
    int error = pf_start(options.daemon);
    if (!error)
        error = pf_get_state(&state);
    memcpy(merger_why, state.why, PF_TEXT);
    if (!error && !state.windows_safe)
        error = state.why_errno ? -state.why_errno : -ENOSYS;
    if (error && !merger_why[0])
        snprintf(merger_why, sizeof merger_why, "errno %d", -error);
    return error;
}

void client_run(struct member *me) {
    int error = begin();
    atomic_store(&merger_open, error ? -1 : 1);
    if (error)
        return;
    for (uint32_t region = 0; region < REGIONS; region++)
        advise(region);
    adverse_begin(me->chance);
    for (uint32_t steps = 0; !atomic_load(&crew_ending); steps++) {
        if (steps % (options.embedded ? 1 : 20) == 0)
            atomic_store(&arena.hot, below(&me->chance, arena.groups));
        uint32_t region = below(&me->chance, REGIONS);
        if (options.embedded || percent(&me->chance, 5))
            merge(region);
        if (percent(&me->chance, options.embedded ? 10 : 3)) {
            unadvise(region);
            atomic_fetch_add(&merging.advised_again, 1);
            advise(region);
        }
        look(me);
        beat("rests", NULL);
        usleep(options.embedded ? 200 : 20000);
    }
    while (!atomic_load(&merger_finish))
        usleep(5000), beat("waits for the others", NULL);
    adverse_end();
    uint64_t before = left_behind;
    for (uint32_t region = 0; region < REGIONS; region++)
        unadvise(region);
    look(me);
    if (left_behind != before)
        verdict_failed("the end", "pages could not be given back although nothing is pinned", (int64_t)(left_behind - before));
    uint64_t foreign = foreign_pages(0, arena.pages);
    if (foreign > before)
        verdict_failed("the end", "pages are not plain anonymous memory", (int64_t)foreign);
    error = pf_stop();
    if (error < 0)
        verdict_failed("the end", "pf_stop", -error);
}

void client_in_child(struct member *me) {
    int error = pf_start(options.daemon);
    if (error < 0) {
        verdict_failed(me->name, "pf_start in a child", -error);
        return;
    }
    for (uint32_t region = 0; region < REGIONS; region += 1 + below(&me->chance, REGIONS))
        merge(region);
    uint64_t before = left_behind;
    for (uint32_t region = 0; region < REGIONS; region++)
        unadvise(region);
    if (left_behind != before)
        verdict_failed(me->name, "a child could not give its pages back", (int64_t)(left_behind - before));
    error = pf_stop();
    if (error < 0)
        verdict_failed(me->name, "pf_stop in a child", -error);
}

void client_begin(void) { crew_begin("client", client_run, NULL, 0); }
