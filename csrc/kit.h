/* Own the kit: what window.c, restore.c and selftest.c work with, in one process. For these files only.
 * Must not know slots, the daemon or Python.
 */
#ifndef PF_KIT_H
#define PF_KIT_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include "regions.h"
#include "window.h"

/* Everything under W. */
struct pf_kit {
    bool ready;       /* opened and passed the self-test */
    uint32_t number;  /* of this kit: they count up */
    int track;        /* userfaultfd: write tracking (WP_ASYNC) and windows; -1: none */
    int hold;         /* userfaultfd: holds writers of merged pages, for remap and restore; -1: none */
    int pagemap;      /* open even if the rest is not permitted; -1: none */
    uint8_t *scratch; /* PF_SCRATCH_PAGES; registered with `track`; pages moved here are nobody else's */
    uint32_t used;    /* scratch pages from the start that may hold something */
    uint8_t *barrier; /* one page without access, behind scratch */
};
extern struct pf_kit pf_kit;
extern struct pf_counts pf_counts_all;

/* In a forked child: nothing of the kit is there (private file table, MADV_DONTFORK), forget it; counters begin anew. */
void pf_kit_forget(void);
/* The tests of selftest.c; 0 or a negative errno and why. The kit is complete except `ready`. */
int pf_selftest(char why[PF_TEXT]);

/* Free what scratch holds. False: it could not be, and the kit is closed now. */
bool pf_kit_drop(void);
/* Wait until no system call is left that found a page by address before now and still holds mmap_lock (ptrace and
 * /proc/PID/mem write that way): any write section of mmap_lock does. 0.4 us. */
void pf_kit_barrier(void);
/* Put every page that is in [scratch, +pages) back to [run, +pages), which is registered MISSING with uffd: ends with
 * scratch empty. False: some of the run was unmapped or replaced by its owner (who promised not to), page by page tried; then
 * nobody wants these pages, and only these are dropped. */
bool pf_kit_put_back(int uffd, uint64_t run, uint64_t scratch, uint32_t pages);
/* End the registration of a run with `uffd`, which also wakes all who wait in it, and track its writes again if asked. */
void pf_kit_release(int uffd, uint64_t run, uint32_t pages, bool track);

/* listener.c: the thread that reads events of `hold` during a pf_restore. Start and stop without W. */
struct pf_listener {
    bool runs;
    uint32_t kit; /* number of the kit that it serves */
    pthread_t thread;
    int uffd, stop[2];
};
void pf_listener_start(struct pf_listener *listener); /* sets `runs` if it could */
void pf_listener_stop(struct pf_listener *listener);
bool pf_listener_serves(const struct pf_listener *listener); /* the kit as it is now; under W */

#endif
