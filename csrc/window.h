/* Own the swap of pages under a running program: merge (window), move to another slot (remap), give back (restore).
 * Must not know the daemon, messages, the embedded store or Python.
 *
 * Call these from the agent's own threads only: threads that share one private file table (unshare(CLONE_FILES) before
 * pf_kit_open), have all signals blocked, and whose stacks lie outside every region. W is taken inside; call with W not
 * held. window.c begins with the argument why no byte is lost, restore.c with its own.
 */
#ifndef PF_WINDOW_H
#define PF_WINDOW_H

#include <stdbool.h>
#include <stdint.h>
#include "agent.h"

#define PF_WINDOW_PAGES 256u   /* most pages of one pf_window; PF_RUN_PAGES is what the daemon sends */
#define PF_SCRATCH_PAGES 1024u /* 4 MiB: where pages wait for the verdict, and then for being dropped in one go */

/* Open what windows need: two userfaultfds (tracking and hold), pagemap, scratch; and run the self-test (once per family
 * of processes: it forks). Tries userfaultfd(2), then /dev/userfaultfd, then `device`, an open /dev/userfaultfd or -1 (it
 * stays the caller's). 0, or a negative errno and in `why` one line: what is missing and what would permit it. After a
 * failure everything with plain = 1 still works (if /proc is there), and it may be tried again, e.g. with a device.
 * In a forked child call it again; regions are there, none is tracked. -EALREADY: it is open. */
int pf_kit_open(int device, char why[PF_TEXT]);
/* Close all that. Memory stays as it is; tracking ends. */
void pf_kit_close(void);
bool pf_kit_ready(void);

/* Register the anonymous pages of [start, start+bytes) for write tracking (WP_ASYNC), merged pages left out; marks the
 * regions inside as tracked. 1, or 0 if not possible (then nothing is registered). Add the region first. */
int pf_track(uint64_t start, uint64_t bytes);
/* End that, e.g. after pf_restore at the end of an unadvise. */
void pf_untrack(uint64_t start, uint64_t bytes);

/* The slots a run shall map. `extent` must be unique in this process for all daemons it ever talked to and for the
 * embedded store (a number of a dead daemon must not come again: PF_ALREADY would lie); translate if need be. The bytes
 * are immutable (sealed) and can never be truncated, or a window ends in SIGBUS: check the seals before. */
struct pf_target {
    uint32_t extent;      /* 0: zeros; the run becomes a hole, the other fields are unused */
    uint32_t slot;        /* of the first page; slots of a run are neighbours */
    int fd;               /* what to map, readable */
    const uint8_t *bytes; /* the run's slots, mapped read-only in this process */
    uint64_t offset;      /* of the first slot in fd: whole pages */
};

/* Swap one run: status[i] = enum pf_status of page i, always all of them. Up to PF_WINDOW_PAGES pages, all inside `region`
 * (else PF_UNMANAGED / PF_BAD). With plain = 1 and no kit the pages are swapped plainly: the caller promises that nothing
 * writes to them meanwhile, and that no device has them registered (io_uring fixed buffers, RDMA). */
void pf_window(int64_t region, uint64_t start, uint32_t pages, const struct pf_target *target, int plain,
               uint8_t *status);
/* Really free what windows took out of use. pf_window does it by itself every PF_SCRATCH_PAGES; call it after a batch,
 * before saved bytes are reported. */
void pf_window_drop(void);

/* Make merged pages in [start, start+pages*4096) private and anonymous again; threads may write meanwhile (with plain = 1
 * and no kit: they must not). Returns the pages that could not: these are private too and correct, but stay in a file
 * mapping. Without kit and without plain that is all of them. The range lies in one region; call pf_region_close first.
 * It ends early, and the rest stays as it is, when the region is abandoned meanwhile (pf_region_abandon). */
int64_t pf_restore(uint64_t start, uint64_t pages, int plain);

/* Counters since the library was loaded, or since the fork. */
struct pf_counts {
    uint64_t windows;
    uint64_t by_status[PF_STATUSES];
    uint64_t restored; /* pages */
    uint64_t remapped; /* pages */
    uint64_t forks;    /* by the program, noticed by the atfork handler; not the children of the pin test */
};
void pf_window_counts(struct pf_counts *counts);

#endif
