/* Own merging without a daemon: between a process and those forked from it, and inside one. Must not know the link.
 *
 * index.h holds what the family shares: hashes of pages, and where an equal page is. chunks.h holds the store itself.
 */
#ifndef PF_EMBEDDED_H
#define PF_EMBEDDED_H

#include <stdint.h>
#include "agent.h"

/* All from the command thread. */
/* Merge a region with what is known; swaps plainly where windows are not safe (the caller of pf_merge promised). */
int pf_embedded_merge(int64_t region, struct pf_report *report);
/* Regions went: close chunks that no page here maps any more. */
void pf_embedded_collect(void);
/* The thread and its file table end. */
void pf_embedded_close(void);
/* In a forked child. */
void pf_embedded_child(void);

#endif
