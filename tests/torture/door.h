/* Own the door to the windows under torture: the agent's own, none at all, or a specimen that is broken on purpose. */
#ifndef TORTURE_DOOR_H
#define TORTURE_DOOR_H

#include <stdint.h>

#include "../../csrc/agent.h"
#include "../../csrc/window.h"

struct door {
    const char *name;
    int (*open)(char why[PF_TEXT]); /* from the thread that runs windows; 0 or a negative errno and why */
    void (*close)(void);
    int64_t (*advise)(uint64_t start, uint64_t bytes); /* a region's number, or a negative errno */
    /* Give its pages back and forget it; while some are refused it stays, closed: call again. Returns how many are refused. */
    int64_t (*unadvise)(int64_t region, uint64_t start, uint64_t pages);
    void (*window)(int64_t region, uint64_t start, uint32_t pages, const struct pf_target *target, uint8_t *status);
    int64_t (*restore)(uint64_t start, uint64_t pages);
    uint64_t (*windows)(void); /* run so far; calls are counted if it is NULL */
};

extern const struct door door_agent, door_none, door_specimen;
/* The faults that the specimen may have; ends with NULL. */
extern const char *const specimen_faults[];
int specimen_choose(const char *fault);

#endif
