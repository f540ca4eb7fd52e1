/* Own the doors to the agent's windows, called as the agent's own threads do, and to none. */
#include <errno.h>
#include <string.h>

#include "../../csrc/regions.h"
#include "door.h"
#include "verdict.h"

static int64_t agent_advise(uint64_t start, uint64_t bytes) {
    char why[PF_TEXT] = "";
    int kind = pf_suitable(start, bytes, why);
    if (kind < 0) {
        tell("torture: not suitable: %s", why);
        return kind;
    }
    int64_t region = pf_region_add(start, bytes, 0, (uint32_t)kind);
    if (region > 0)
        pf_track(start, bytes);
    return region;
}

static int64_t agent_unadvise(int64_t region, uint64_t start, uint64_t pages) {
    struct pf_region about;
    if (pf_region_close(region) && !pf_region_get(region, &about))
        return -ENOENT; /* else it is closed since the last call */
    int64_t refused = pf_restore(start, pages, 0);
    if (refused)
        return refused;
    pf_untrack(start, pages * PF_PAGE);
    return pf_region_remove(region);
}

static void agent_window(int64_t region, uint64_t start, uint32_t pages, const struct pf_target *target, uint8_t *status) {
    static uint32_t windows;
    pf_window(region, start, pages, target, 0, status);
    if (++windows % 128 == 0)
        pf_window_drop();
}

static int64_t agent_restore(uint64_t start, uint64_t pages) { return pf_restore(start, pages, 0); }

static uint64_t agent_windows(void) {
    struct pf_counts counts;
    pf_window_counts(&counts);
    return counts.windows;
}

static int agent_open(char why[PF_TEXT]) { return pf_kit_open(-1, why); }

const struct door door_agent = {"agent",      agent_open,   pf_kit_close, agent_advise, agent_unadvise,
                                agent_window, agent_restore, agent_windows};

static int none_open(char why[PF_TEXT]) {
    why[0] = 0;
    return 0;
}
static void none_close(void) {}
static int64_t none_advise(uint64_t start, uint64_t bytes) { return start && bytes ? 1 : 0; }
static int64_t none_unadvise(int64_t region, uint64_t start, uint64_t pages) {
    (void)region, (void)start, (void)pages;
    return 0;
}
static void none_window(int64_t region, uint64_t start, uint32_t pages, const struct pf_target *target, uint8_t *status) {
    (void)region, (void)start, (void)target;
    memset(status, PF_OFF, pages);
}
static int64_t none_restore(uint64_t start, uint64_t pages) {
    (void)start, (void)pages;
    return 0;
}

const struct door door_none = {"none", none_open, none_close, none_advise, none_unadvise, none_window, none_restore, NULL};
