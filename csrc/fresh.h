/* Own memory without any page in it: what takes the place of runs that are given back, and what copies are made in. For
 * restore.c. Must not know regions or slots.
 */
#ifndef PF_FRESH_H
#define PF_FRESH_H

#include <stdbool.h>
#include <stdint.h>

struct pf_fresh {
    uint64_t start; /* of what is not used yet */
    uint64_t pages; /* of that; 0: none */
};

/* Map so many pages, readable and writable, with further flags of mmap. NULL: not possible. */
uint8_t *pf_empty_map(uint64_t pages, int flags);
/* The same with the marks PF_VMA_*, and, if asked, registered with the hold userfaultfd so that whoever touches it waits.
 * False: not possible, there are none then. */
bool pf_fresh_map(struct pf_fresh *fresh, uint64_t pages, uint32_t vma, bool waiting);
void pf_fresh_unmap(struct pf_fresh *fresh, bool waiting);

#endif
