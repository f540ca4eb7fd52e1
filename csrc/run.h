/* Own what one swap works on, a run: pages of one region that are neighbours, their target and their statuses. For
 * window.c, remap.c and plain.c. Must not know the daemon or Python.
 */
#ifndef PF_RUN_H
#define PF_RUN_H

#include <stdbool.h>
#include <stdint.h>
#include "kit.h"

/* States of a page while it is swapped, beside the statuses. */
enum {
    PF_WAITING = 200, /* nothing known yet */
    PF_MOVED,         /* in scratch */
    PF_UNCLEAR,       /* the kernel did not say whether it is in scratch */
    PF_EQUAL,         /* to be mapped */
    PF_AGAIN          /* pinned or shared; not tried yet as one of its own */
};

struct pf_run {
    struct pf_region *region;
    uint64_t start;
    uint32_t pages;
    const struct pf_target *target;
    uint32_t first; /* page of the target that the run begins with */
    uint8_t *status;
    bool plain; /* no userfaultfd, by the caller's leave: nobody writes meanwhile */
};

static inline uint64_t pf_run_address(const struct pf_run *run, uint32_t page) {
    return run->start + (uint64_t)page * PF_PAGE;
}

/* The registry's word about a page, and what it will be. */
uint64_t *pf_run_where(const struct pf_run *run, uint32_t page);
uint64_t pf_run_target(const struct pf_run *run, uint32_t page);
/* The run's pages [from, from+pages) as a run. */
struct pf_run pf_run_part(const struct pf_run *run, uint32_t from, uint32_t pages);
void pf_run_set(const struct pf_run *run, uint8_t status);
void pf_run_change(const struct pf_run *run, uint8_t from, uint8_t to);
/* PF_EQUAL or PF_DIFFERS: these bytes, and those of the slot for `page`. */
uint8_t pf_run_compare(const struct pf_run *run, uint32_t page, uint64_t bytes);
/* Read a byte of each slot, so that the view's page faults do not happen while writers wait. */
void pf_run_warm(const struct pf_run *run);
/* Map each stretch of PF_EQUAL pages to its slots, in one step, and enter that in the registry: PF_MERGED. What cannot be
 * mapped stays as it is: PF_NO_VMA, PF_BAD. True if anything was mapped. Passes fault point (kind, point) per stretch. */
bool pf_run_map(const struct pf_run *run, int kind, int point);
/* What an error of registering a run means. */
uint8_t pf_run_refused(int error);
/* A pagemap entry of a page that was merged: it is a private page now. */
bool pf_run_broken(uint64_t entry);

/* remap.c: pages that map the target already: PF_ALREADY, PF_BROKEN; and pages that map another slot. */
void pf_run_already(const struct pf_run *run);
void pf_run_remap(const struct pf_run *run);
/* plain.c: private pages, without userfaultfd. */
void pf_run_plain(const struct pf_run *run);

#endif
