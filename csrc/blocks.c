/* Own the table of blocks. */
#define _GNU_SOURCE
#include "blocks.h"

#include <stddef.h>
#include <sys/mman.h>

#include "agent.h"

#define SLAB_BLOCKS 512u

static struct pf_block **buckets;
static uint32_t bucket_count, block_count;
static struct pf_block *unused;            /* records */
static struct pf_block *youngest, *oldest; /* of the young */

static void *map(size_t bytes) {
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

static struct pf_block **bucket(uint64_t start) {
    return &buckets[(start / PF_PAGE * 0x9e3779b97f4a7c15u) >> 32 & (bucket_count - 1)];
}

struct pf_block *pf_blocks_find(uint64_t start) {
    if (bucket_count == 0)
        return NULL;
    struct pf_block *at = *bucket(start);
    while (at && at->start != start)
        at = at->next;
    return at;
}

struct pf_block *pf_blocks_young_at(uint64_t address) {
    struct pf_block *at = pf_blocks_find(address);
    if (at)
        return at->state == PF_BLOCK_YOUNG ? at : NULL;
    for (at = oldest; at && address - at->start >= at->bytes;)
        at = at->younger;
    return at;
}

static bool more_buckets(void) {
    uint32_t more = bucket_count ? bucket_count * 2 : PF_PAGE / sizeof *buckets;
    struct pf_block **old = buckets, **made = map(more * sizeof *buckets);
    uint32_t old_count = bucket_count;
    if (made == NULL)
        return false;
    buckets = made;
    bucket_count = more;
    for (uint32_t i = 0; i < old_count; i++)
        for (struct pf_block *at = old[i], *next; at; at = next) {
            next = at->next;
            at->next = *bucket(at->start);
            *bucket(at->start) = at;
        }
    if (old)
        munmap(old, old_count * sizeof *old);
    return true;
}

static struct pf_block *new_record(void) {
    if (unused == NULL) {
        struct pf_block *slab = map(SLAB_BLOCKS * sizeof *slab);
        if (slab == NULL)
            return NULL;
        for (uint32_t i = 0; i < SLAB_BLOCKS; i++) {
            slab[i].next = unused;
            unused = &slab[i];
        }
    }
    struct pf_block *block = unused;
    unused = block->next;
    return block;
}

void pf_blocks_grow_up(struct pf_block *block) {
    *(block->younger ? &block->younger->older : &youngest) = block->older;
    *(block->older ? &block->older->younger : &oldest) = block->younger;
    block->younger = block->older = NULL;
}

void pf_blocks_be_young(struct pf_block *block, uint32_t tick) {
    block->state = PF_BLOCK_YOUNG;
    block->born = tick;
    block->younger = NULL;
    block->older = youngest;
    *(youngest ? &youngest->younger : &oldest) = block;
    youngest = block;
}

static void enter(struct pf_block *block, uint64_t start, uint64_t bytes) {
    block->start = start;
    block->bytes = bytes;
    block->next = *bucket(start);
    *bucket(start) = block;
    block_count++;
}

struct pf_block *pf_blocks_enter(uint64_t start, uint64_t bytes, uint32_t tick) {
    if (block_count >= bucket_count && !more_buckets() && bucket_count == 0)
        return NULL;
    struct pf_block *block = new_record();
    if (block) {
        enter(block, start, bytes);
        pf_blocks_be_young(block, tick);
    }
    return block;
}

void pf_blocks_move(struct pf_block *block, uint64_t start, uint64_t bytes) {
    pf_blocks_leave(block);
    enter(block, start, bytes);
}

struct pf_block *pf_blocks_oldest(void) {
    return oldest;
}

void pf_blocks_leave(struct pf_block *block) {
    struct pf_block **at = bucket(block->start);
    while (*at != block)
        at = &(*at)->next;
    *at = block->next;
    block_count--;
}

void pf_blocks_throw_away(struct pf_block *record) {
    record->next = unused;
    unused = record;
}
