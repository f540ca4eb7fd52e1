/* Own the registry of regions: which memory is managed, and which slot each of its pages maps; and W, the window mutex.
 * Must not know userfaultfd, the daemon, or Python.
 *
 * W is one mutex for the whole process. Whoever holds it may count on this: no window is under way, no region comes or
 * goes, and no thread forks through the C library (the atfork handlers registered here take W; in the child they forget
 * the kit). W is the innermost lock of the library: holding it, take no other lock, call no malloc and no stdio, and
 * touch no managed page. Handlers of pthread_atfork that agent.c registers later run their prepare *before* ours, so the
 * order "own lock, then W" holds there too.
 *
 * All memory of the registry comes from mmap, never from malloc: it must not share a page with a buffer that is managed.
 */
#ifndef PF_REGIONS_H
#define PF_REGIONS_H

#include <stdbool.h>
#include <stdint.h>
#include "agent.h"

/* where[page]: 0 = private (or absent), else the slot that the page maps. */
#define PF_WHERE(extent, slot) ((uint64_t)(extent) << 32 | ((uint64_t)(slot) + 1))
#define PF_WHERE_EXTENT(where) ((uint32_t)((where) >> 32))
#define PF_WHERE_SLOT(where) ((uint32_t)(where)-1)

struct pf_region {
    int64_t id;      /* > 0, never used again in this process */
    uint64_t start;  /* address */
    uint64_t pages;
    uint32_t quiet;   /* 1: only pf_merge touches it */
    uint32_t tracked; /* 1: its anonymous pages are registered for write tracking now; kept by pf_track and by fork */
    uint32_t closing; /* 1: no window may start in it any more (pf_region_close) */
    uint32_t abandoned; /* 1: closing, and its memory may be another's: nothing is given back in it (pf_region_abandon) */
    uint32_t vma;     /* PF_VMA_*: what its mapping is like beside the ordinary, given back by pf_restore */
    int32_t suits;    /* 0: its mapping can be merged; else nothing touches it: PF_UNSEEN, or the negative errno of pf_suitable */
    uint64_t *where;  /* per page; read and written under W only */
};

/* Kinds of mapping that are merged although they carry a mark; the mark is set again on restored memory. */
#define PF_VMA_HUGEPAGE 1u   /* MADV_HUGEPAGE (NumPy does that) */
#define PF_VMA_NOHUGEPAGE 2u /* MADV_NOHUGEPAGE */
#define PF_VMA_NORESERVE 4u  /* MAP_NORESERVE (arenas of malloc) */
#define PF_VMA_MERGEABLE 8u  /* MADV_MERGEABLE: the kernel's own merging is asked for too */

#define PF_UNSEEN 1 /* as `suits`: nobody looked yet (look.h) */
#define PF_VMA_UNSEEN UINT32_MAX /* as `vma` of pf_region_add: the same */

#define PF_UNJUDGED INT32_MAX /* as the answer for a range: nothing was found out */

/* Some memory, and the answer of pf_suitable_all. */
struct pf_range {
    int64_t region; /* not looked at */
    uint64_t start, end;
    int32_t suits;  /* PF_VMA_* (0 or more), -EOPNOTSUPP, -ENOMEM; or PF_UNJUDGED */
};

/* Say whether [start, start+bytes) can be merged: only plain private anonymous read-write memory, not locked, without
 * DONTFORK, DONTDUMP, WIPEONFORK, protection key, memory policy or foreign userfaultfd, mapped without a gap. Returns
 * PF_VMA_* (0 or more), or -EOPNOTSUPP, -ENOMEM (a gap), or why /proc/self/smaps could not be read now, which says nothing
 * of the mapping (-ENOBUFS: no memory for that); then `why`, if not NULL, holds PF_TEXT bytes of reason. Reads /proc/self/smaps up to that memory (some 15 ms per GiB in use, 2.5 us per mapping):
 * not for memory that the library itself mapped. Takes no lock. What another region has merged is a file mapping: not
 * suitable. */
int pf_suitable(uint64_t start, uint64_t bytes, char *why);
/* The same for many, ascending and without overlap, in one reading; `why` is of the last that was refused. 0, or why it could
 * not be read (to its end): then what is left is PF_UNJUDGED. */
int pf_suitable_all(struct pf_range *ranges, uint32_t count, char *why);

/* Add a region; no test of the mapping. Returns its id, or -EINVAL (not whole pages, empty, wraps), -EEXIST, -ENOMEM. */
int64_t pf_region_add(uint64_t start, uint64_t bytes, uint32_t quiet, uint32_t vma);
/* Note what pf_suitable says of a region that was added unseen. -ENOENT; -EALREADY: it was seen meanwhile. */
int pf_region_seen(int64_t id, int32_t suits);
/* The regions that nobody looked at, ascending by address, the first `room` of them; returns how many. */
uint32_t pf_region_unseen(struct pf_range *ranges, uint32_t room);
/* From the moment this returns no window or remap is in the region, and none will start; pf_restore still works. -ENOENT,
 * also if that was so before. */
int pf_region_close(int64_t id);
/* The same, and pf_restore does not work in it any more either, also one that is under way: what it has not reached stays.
 * With -ENOENT too, if somebody else closed the region: the caller's memory is his again in any case. */
int pf_region_abandon(int64_t id);
/* Forget the region (and its where); its pages stay as they are. Returns when no window is in it. -ENOENT. */
int pf_region_remove(int64_t id);
/* Copy the region's record (`where` is then of no use to the caller: NULL). False: no such region. */
bool pf_region_get(int64_t id, struct pf_region *copy);
/* The region with the smallest id above `after`, the same way: to walk all regions while they come and go, begin with 0. */
bool pf_region_next(int64_t after, struct pf_region *copy);
/* The region that holds `address`, the same way. */
bool pf_region_at(uint64_t address, struct pf_region *copy);
/* Copy where[first, first+pages) of a region; `out` is not managed memory. -ENOENT, -EINVAL. */
int pf_region_where(int64_t id, uint64_t first, uint64_t pages, uint64_t *out);
/* Regions and their pages, without those whose mapping does not suit. */
void pf_region_totals(uint32_t *regions, uint64_t *pages);
/* Whether a region, closing or not, has memory of this. */
bool pf_region_overlaps(uint64_t start, uint64_t bytes);

/* Take and release W. pf_w_lock is for everybody but the window loop: it asks the windows to give way. The loop itself
 * takes pf_w_lock_window, which first lets those that wait go ahead (glibc's mutexes are not fair). */
void pf_w_lock(void);
void pf_w_lock_window(void);
void pf_w_unlock(void);

/* Below: only with W held, for window.c, restore.c. The record itself, NULL if there is none. */
struct pf_region *pf_region_find_at(uint64_t address);
struct pf_region *pf_region_index(uint32_t index); /* by start address, from 0; NULL at the end */

#endif
