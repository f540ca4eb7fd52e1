/* Own memory for NumPy's arrays (NEP 49): arrays of PF_ARRAY bytes and more get whole pages of their own.
 *
 * A block is young at first: most arrays are temporary and never become a region. One that has lived for a second or two is
 * adopted: it becomes a region. Freed blocks that were never adopted are kept for a moment, as a temporary's successor
 * has the same size. `lock` is held for a few instructions, never over a system call, never together with W.
 *
 * Freeing never waits longer than for one window: a block that is just being adopted is only marked, and whoever adopts
 * it unmaps it. A forked child may find a block in the middle of that, with nobody to end it: it is unsure then, and the
 * registry is asked whether it became a region.
 */
#define _GNU_SOURCE
#include "array.h"

#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "agent.h"
#include "blocks.h"
#include "command.h"
#include "regions.h"

#define HUGE_BYTES (4u << 20)        /* from here on NumPy asks for huge pages; so do we */
#define CACHED 16u                   /* blocks */
#define CACHE_BYTES (64u << 20)      /* in all */
#define CACHE_BLOCK (32u << 20)      /* the largest; the C library's malloc does not keep larger ones either */
#define OLD_ENOUGH 2u                /* ticks */
#define FEW 16u                      /* adoptions at a stretch */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of everything here */
static struct pf_block *adopting;            /* by the command thread, right now */
static struct pf_block *unsure;              /* it was that when we were forked; PF_BLOCK_UNSURE, or PF_BLOCK_DOOMED */
static struct cached {
    uint64_t start, bytes;
    uint32_t since; /* tick */
} cache[CACHED];
static uint32_t cached_count;
static uint64_t cached_bytes;
static uint32_t ticks;
static bool ticking; /* the command thread looks after us */

static void *map(size_t bytes) {
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

static void *pointer_to(uint64_t start) {
    return (void *)(uintptr_t)start;
}

static uint64_t whole_pages(size_t size) {
    return ((uint64_t)size + PF_PAGE - 1) & ~(uint64_t)(PF_PAGE - 1);
}

/* Whether someone must be woken to look after us; asked with the lock, done without. */
static bool begin_ticking(void) {
    bool begin = !ticking;
    ticking = true;
    return begin;
}

/* --- blocks ---------------------------------------------------------------------------------------------------------- */

/* Make mapped memory a block; false: there is no memory for its record. */
static bool own(uint64_t start, uint64_t bytes) {
    pthread_mutex_lock(&lock);
    struct pf_block *block = pf_blocks_enter(start, bytes, ticks);
    bool wake = block && begin_ticking();
    pthread_mutex_unlock(&lock);
    if (wake)
        pf_command_ring(PF_BELL_ARRAYS);
    return block != NULL;
}

static uint64_t take_cached(uint64_t bytes) {
    uint64_t start = 0;
    pthread_mutex_lock(&lock);
    for (uint32_t i = cached_count; i-- > 0;)
        if (cache[i].bytes == bytes) {
            start = cache[i].start;
            cached_bytes -= bytes;
            memmove(&cache[i], &cache[i + 1], (--cached_count - i) * sizeof *cache);
            break;
        }
    pthread_mutex_unlock(&lock);
    return start;
}

/* Keep memory for a successor, or unmap it; the oldest makes room. */
static void keep_or_unmap(uint64_t start, uint64_t bytes) {
    struct cached out[CACHED + 1];
    uint32_t outs = 0;
    bool wake = false;
    if (bytes > CACHE_BLOCK) {
        munmap(pointer_to(start), bytes);
        return;
    }
    pthread_mutex_lock(&lock);
    while (cached_count == CACHED || (cached_count && cached_bytes + bytes > CACHE_BYTES)) {
        out[outs++] = cache[0];
        cached_bytes -= cache[0].bytes;
        memmove(&cache[0], &cache[1], --cached_count * sizeof *cache);
    }
    cache[cached_count++] = (struct cached){start, bytes, ticks};
    cached_bytes += bytes;
    wake = begin_ticking();
    pthread_mutex_unlock(&lock);
    for (uint32_t i = 0; i < outs; i++)
        munmap(pointer_to(out[i].start), out[i].bytes);
    if (wake)
        pf_command_ring(PF_BELL_ARRAYS);
}

static void *make(size_t size, bool zeroed) {
    uint64_t bytes = whole_pages(size);
    uint64_t start = zeroed ? 0 : take_cached(bytes);
    if (start) {
        /* Behind the array nothing may differ, or equal arrays would not merge to their last page. */
        memset((char *)pointer_to(start) + size, 0, bytes - size);
    } else {
        void *at = map(bytes);
        if (at == NULL)
            return NULL;
        start = (uint64_t)(uintptr_t)at;
        if (bytes >= HUGE_BYTES)
            madvise(at, bytes, MADV_HUGEPAGE);
    }
    if (own(start, bytes))
        return pointer_to(start);
    munmap(pointer_to(start), bytes);
    return NULL;
}

static bool too_large(size_t size) {
    return size > PTRDIFF_MAX - PF_PAGE;
}

void *pf_array_malloc(void *ctx, size_t size) {
    (void)ctx;
    if (size < PF_ARRAY || too_large(size))
        return malloc(size);
    return make(size, false);
}

void *pf_array_calloc(void *ctx, size_t count, size_t size) {
    (void)ctx;
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes) || bytes < PF_ARRAY || too_large(bytes))
        return calloc(count, size);
    return make(bytes, true);
}

void pf_array_free(void *ctx, void *pointer, size_t size) {
    (void)ctx;
    (void)size; /* NumPy's idea of it; ours is in the table */
    uint64_t start = (uint64_t)(uintptr_t)pointer;
    struct pf_block *block = NULL, copy;
    if (start % PF_PAGE == 0 && start) {
        pthread_mutex_lock(&lock);
        block = pf_blocks_find(start);
        if (block) {
            copy = *block;
            pf_blocks_leave(block);
            if (block->state == PF_BLOCK_YOUNG)
                pf_blocks_grow_up(block);
            if (block == unsure)
                unsure = NULL;
            if (block->state == PF_BLOCK_ADOPTING)
                block->state = PF_BLOCK_DOOMED;
            else
                pf_blocks_throw_away(block);
        }
        pthread_mutex_unlock(&lock);
    }
    if (block == NULL) {
        free(pointer);
        return;
    }
    struct pf_region region;
    switch (copy.state) {
    case PF_BLOCK_ADOPTING:
        return; /* who adopts it unmaps it */
    case PF_BLOCK_YOUNG:
        keep_or_unmap(copy.start, copy.bytes);
        return;
    case PF_BLOCK_UNSURE:
        if (pf_region_at(start, &region))
            pf_forget(region.id);
        break;
    case PF_BLOCK_REGION:
        pf_forget(copy.region);
        break;
    default:
        break;
    }
    munmap(pointer_to(copy.start), copy.bytes);
}

/* Resize a young block where the kernel can do it without copying. NULL: it cannot be; the block is as it was. */
static void *move_young(uint64_t start, size_t size) {
    uint64_t bytes = whole_pages(size ? size : 1);
    pthread_mutex_lock(&lock);
    struct pf_block *block = pf_blocks_find(start);
    bool young = block && block->state == PF_BLOCK_YOUNG;
    if (young) {
        pf_blocks_grow_up(block);
        block->state = PF_BLOCK_MOVING; /* nobody adopts it now */
    }
    pthread_mutex_unlock(&lock);
    if (!young)
        return NULL;
    void *moved = mremap(pointer_to(start), block->bytes, bytes, MREMAP_MAYMOVE);
    if (moved != MAP_FAILED && bytes > size && bytes <= block->bytes)
        memset((char *)moved + size, 0, bytes - size);
    pthread_mutex_lock(&lock);
    if (moved != MAP_FAILED) {
        pf_blocks_move(block, (uint64_t)(uintptr_t)moved, bytes);
    }
    pf_blocks_be_young(block, ticks);
    bool wake = begin_ticking();
    pthread_mutex_unlock(&lock);
    if (wake)
        pf_command_ring(PF_BELL_ARRAYS);
    return moved == MAP_FAILED ? NULL : moved;
}

void *pf_array_realloc(void *ctx, void *pointer, size_t size) {
    uint64_t start = (uint64_t)(uintptr_t)pointer;
    if (pointer == NULL)
        return pf_array_malloc(ctx, size);
    uint64_t bytes = 0;
    bool ours = false;
    if (start % PF_PAGE == 0) {
        pthread_mutex_lock(&lock);
        struct pf_block *block = pf_blocks_find(start);
        ours = block != NULL;
        bytes = ours ? block->bytes : 0;
        pthread_mutex_unlock(&lock);
    }
    if (!ours && (size < PF_ARRAY || too_large(size)))
        return realloc(pointer, size);
    if (ours && !too_large(size)) {
        void *moved = move_young(start, size);
        if (moved)
            return moved;
    }
    if (!ours)
        bytes = malloc_usable_size(pointer);
    /* A region is copied: to move or grow its pages would show slots of others behind them. */
    void *made = pf_array_malloc(ctx, size);
    if (made == NULL)
        return NULL;
    memcpy(made, pointer, bytes < size ? bytes : size);
    pf_array_free(ctx, pointer, bytes);
    return made;
}

/* --- growing up --------------------------------------------------------------------------------------------------------- */

static void adopt(struct pf_block *block, uint32_t vma) {
    uint64_t start = block->start, bytes = block->bytes; /* nobody changes them while it is PF_BLOCK_ADOPTING */
    int64_t region = pf_agent_advise(start, bytes, 0, vma);
    pthread_mutex_lock(&lock);
    bool doomed = block->state == PF_BLOCK_DOOMED;
    adopting = NULL;
    if (doomed) {
        pf_blocks_throw_away(block);
    } else {
        block->region = region;
        block->state = region > 0 ? PF_BLOCK_REGION : PF_BLOCK_LEFT;
    }
    pthread_mutex_unlock(&lock);
    if (!doomed)
        return;
    if (region > 0)
        pf_forget(region);
    munmap(pointer_to(start), bytes);
}

void pf_array_grow_up(uint64_t address) {
    pthread_mutex_lock(&lock);
    struct pf_block *block = pf_blocks_young_at(address);
    if (block) {
        pf_blocks_grow_up(block);
        block->state = PF_BLOCK_ADOPTING;
        adopting = block;
    }
    pthread_mutex_unlock(&lock);
    if (block)
        adopt(block, PF_VMA_UNSEEN);
}

static void settle_unsure(void) {
    struct pf_region region;
    pthread_mutex_lock(&lock);
    uint64_t start = unsure ? unsure->start : 0, bytes = unsure ? unsure->bytes : 0;
    pthread_mutex_unlock(&lock);
    if (start == 0)
        return;
    bool is_region = pf_region_at(start, &region), doomed = false;
    pthread_mutex_lock(&lock);
    if (unsure && unsure->start == start) { /* not freed meanwhile */
        doomed = unsure->state == PF_BLOCK_DOOMED;
        if (doomed) {
            pf_blocks_throw_away(unsure);
        } else if (is_region) {
            unsure->state = PF_BLOCK_REGION;
            unsure->region = region.id;
        } else {
            pf_blocks_be_young(unsure, ticks);
        }
        unsure = NULL;
    }
    pthread_mutex_unlock(&lock);
    if (doomed) {
        if (is_region)
            pf_forget(region.id);
        munmap(pointer_to(start), bytes);
    }
}

static void drop_cache(void) {
    struct cached out[CACHED];
    uint32_t outs = 0;
    pthread_mutex_lock(&lock);
    while (cached_count && ticks - cache[0].since >= OLD_ENOUGH) {
        out[outs++] = cache[0];
        cached_bytes -= cache[0].bytes;
        memmove(&cache[0], &cache[1], --cached_count * sizeof *cache);
    }
    pthread_mutex_unlock(&lock);
    for (uint32_t i = 0; i < outs; i++)
        munmap(pointer_to(out[i].start), out[i].bytes);
}

bool pf_array_tick(void) {
    settle_unsure();
    pthread_mutex_lock(&lock);
    ticks++;
    pthread_mutex_unlock(&lock);
    drop_cache();
    for (uint32_t adopted = 0;; adopted++) {
        pthread_mutex_lock(&lock);
        struct pf_block *block = pf_blocks_oldest();
        if (block && ticks - block->born >= OLD_ENOUGH) {
            pf_blocks_grow_up(block);
            block->state = PF_BLOCK_ADOPTING;
            adopting = block;
        } else {
            bool again = ticking = block != NULL || cached_count > 0;
            pthread_mutex_unlock(&lock);
            return again;
        }
        pthread_mutex_unlock(&lock);
        adopt(block, block->bytes >= HUGE_BYTES ? PF_VMA_HUGEPAGE : 0);
        if (adopted % FEW == FEW - 1 && !pf_command_breathe())
            return true;
    }
}

bool pf_array_any(void) {
    pthread_mutex_lock(&lock);
    bool any = pf_blocks_oldest() || cached_count || unsure;
    ticking = any;
    pthread_mutex_unlock(&lock);
    return any;
}

void pf_array_before_fork(void) {
    pthread_mutex_lock(&lock);
}

void pf_array_after_fork(bool child) {
    if (child) {
        ticking = false;
        unsure = adopting ? adopting : unsure;
        if (adopting && adopting->state == PF_BLOCK_ADOPTING)
            adopting->state = PF_BLOCK_UNSURE;
        adopting = NULL;
    }
    pthread_mutex_unlock(&lock);
}
