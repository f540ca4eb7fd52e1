/* Own the threads that merge, un-advise and advise again while everybody else writes. */
#ifndef TORTURE_MERGER_H
#define TORTURE_MERGER_H

#include <stdatomic.h>
#include <stdint.h>

#include "../../csrc/agent.h"
#include "crew.h"

struct merging {
    _Atomic uint64_t windows;                 /* calls of the window, or windows that the agent says it ran */
    _Atomic uint64_t by_status[PF_STATUSES];  /* pages */
    _Atomic uint64_t restores;                /* calls */
    _Atomic uint64_t restored;                /* pages asked to be given back */
    _Atomic uint64_t not_restored;            /* of those: refused */
    _Atomic uint64_t advised_again;           /* regions */
    _Atomic uint64_t extents;                 /* freed, with proof */
    _Atomic uint64_t saved_bytes;             /* most at once, as the daemon or the embedded store says */
};

extern struct merging merging;

/* In this process: windows are called directly. */
void merger_begin(void);
/* Through pf_start, with a daemon or with the embedded store. */
void client_begin(void);
/* Both: when everyone else is home, give everything back and check that nothing is left of us. */
void merger_run(struct member *me);
void client_run(struct member *me);
/* In a forked child: merge here, give all back, and leave nothing; tells the verdict what fails. */
void merger_in_child(struct member *me);
void client_in_child(struct member *me);
extern _Atomic int merger_finish;
/* 0; or why no window is possible here. */
extern char merger_why[PF_TEXT];
extern _Atomic int merger_open; /* 0 not yet, 1 open, -1 impossible */
/* Look into /proc/self/maps: pages of the arena that are not in a private anonymous mapping that may be read and written. */
uint64_t foreign_pages(uint32_t page, uint32_t pages);

#endif
