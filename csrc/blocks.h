/* Own the table of blocks: which memory is a block of ours, by its address, and which of them are young. Of array.c, which
 * locks it. Must not know what becomes of blocks. All its memory comes from mmap.
 */
#ifndef PF_BLOCKS_H
#define PF_BLOCKS_H

#include <stdbool.h>
#include <stdint.h>

enum pf_block_state {
    PF_BLOCK_YOUNG,    /* in the list of young ones */
    PF_BLOCK_MOVING,   /* young, and just being resized */
    PF_BLOCK_ADOPTING, /* just being made a region */
    PF_BLOCK_DOOMED,   /* freed while that was so: who adopts it unmaps it; not in the table any more */
    PF_BLOCK_UNSURE,   /* it was ADOPTING when we were forked */
    PF_BLOCK_REGION,   /* `region` is valid */
    PF_BLOCK_LEFT      /* it could not be made a region, and will not be */
};

struct pf_block {
    uint64_t start, bytes;
    enum pf_block_state state;
    uint32_t born; /* tick */
    int64_t region;
    struct pf_block *next;             /* in the chain of its bucket, or of unused records */
    struct pf_block *younger, *older;  /* PF_BLOCK_YOUNG */
};

struct pf_block *pf_blocks_find(uint64_t start);
/* The young block that holds `address`; quick if it begins there. */
struct pf_block *pf_blocks_young_at(uint64_t address);
/* A new record in the table, young; NULL: no memory for it. */
struct pf_block *pf_blocks_enter(uint64_t start, uint64_t bytes, uint32_t tick);
/* Take a block out of the table; it keeps its record. */
void pf_blocks_leave(struct pf_block *block);
/* Its memory is elsewhere now. */
void pf_blocks_move(struct pf_block *block, uint64_t start, uint64_t bytes);
void pf_blocks_throw_away(struct pf_block *record);
void pf_blocks_be_young(struct pf_block *block, uint32_t tick);
void pf_blocks_grow_up(struct pf_block *block); /* leaves the list of young ones */
struct pf_block *pf_blocks_oldest(void);        /* of the young */

#endif
