/* Own the store of the in-process mode: sealed memfds as the daemon makes them, filled from pages of the arena. */
#ifndef TORTURE_EXTENTS_H
#define TORTURE_EXTENTS_H

#include <stdint.h>

/* Slot g of an extent holds a content of group g, so a run of pages maps a run of slots in any extent. A slot is written once. */
struct extent {
    uint32_t number; /* never 0, never used again */
    int memory;      /* the writable descriptor: only to ask by flock whether anybody else has the extent */
    int shared;      /* read-only; its description holds a shared lock as long as any mapping of it lives; -1: retired */
    uint8_t *fill;   /* the only writable mapping, older than the seal */
    uint8_t *bytes;  /* the read-only mapping; NULL: retired */
    uint64_t *sums;  /* per slot: checksum at filling; 0: not filled */
    uint32_t filled;
};

/* To be called from a thread that has left the program's file table. 0 or a negative errno. */
int extent_open(struct extent *extent, uint32_t number, uint32_t slots);
void extent_fill(struct extent *extent, uint32_t slot, const uint8_t *page);
/* No more windows onto it: its descriptor and read-only mapping go. Returns how many slots have changed since they were filled. */
uint32_t extent_retire(struct extent *extent, uint32_t slots);
/* Whether nobody has it open or mapped; then it is gone. */
int extent_free(struct extent *extent, uint32_t slots);

#endif
