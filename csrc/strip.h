/* Own a strip of a region on its way through an embedded merge: what is known and planned of each of its pages; and how the
 * process's own memory is looked at. Must not know the index or the store. Command thread only.
 */
#ifndef PF_STRIP_H
#define PF_STRIP_H

#include <stdbool.h>
#include <stdint.h>
#include "regions.h"

#define PF_STRIP PF_RUN_PAGES

enum pf_plan { PF_PLAN_NOTHING, PF_PLAN_ZERO, PF_PLAN_SLOT, PF_PLAN_TWIN, PF_PLAN_FOREIGN };

struct pf_page {
    enum pf_plan plan;
    uint8_t status;
    bool alone;          /* mapped by this process only: merging it frees it */
    uint64_t hash;       /* of those whose status is PF_UNKNOWN */
    uint32_t chunk, slot; /* PF_PLAN_SLOT */
    int64_t twin;        /* PF_PLAN_TWIN: region ... */
    uint64_t twin_page;  /* ... and page of it */
    bool twin_fits;      /* its bytes were equal a moment ago */
};

/* Copy memory of this process that may vanish at any moment; false: it is not there. */
bool pf_strip_copy(uint64_t start, uint8_t *to, uint32_t pages);
/* Say of `count` pages from page `first` of a region what they are, copy those that may be merged (to `bytes`, each to its
 * place) and hash them: status PF_UNKNOWN, and the plan PF_PLAN_ZERO for zeros. */
void pf_strip_look(const struct pf_region *region, uint64_t first, uint32_t count, struct pf_page *pages, uint8_t *bytes);
/* Which pages from `start` are mapped by this process only; none if the kernel does not say. */
void pf_strip_alone(uint64_t start, uint32_t count, bool *alone);
/* How many windows may make new mappings. */
uint64_t pf_strip_budget(void);
void pf_strip_close(void);
void pf_strip_child(void);

#endif
