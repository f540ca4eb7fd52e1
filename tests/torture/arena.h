/* Own the memory under torture: what each sector of 512 bytes may hold, who writes it, and what is known of it.
 *
 * Page p holds the content of group p % groups: pages of one group are copies that merge. A sector belongs to one writer,
 * so it is always known what must be in it. What is known stands in the shadow, one word per sector, in memory that is not
 * under torture and that forked children share: version (odd while a write is under way), content before, content now.
 *
 * Who looks at a sector reads its shadow before and after. Equal and even: exactly one content is right. Else every byte must
 * come from a content that was there between the two looks. After more than two versions only those bytes are judged that all
 * contents of the sector have in common.
 */
#ifndef TORTURE_ARENA_H
#define TORTURE_ARENA_H

#include <stdatomic.h>
#include <stdint.h>

#include "../../csrc/agent.h"

enum {
    SECTOR = 512,
    WORDS = SECTOR / 8,
    PER_PAGE = PF_PAGE / SECTOR,
    ZEROS = 0,         /* content 0 is all zeros, only in groups of zeros */
    FILE_CONTENTS = 4, /* contents 0 to 3 of every sector stand in the file that read(2), O_DIRECT and io_uring read from */
    INTRUDER = 0xffff  /* what a forked child writes into its own copy: never right in the parent */
};

struct arena {
    uint8_t *bytes;
    _Atomic uint64_t *shadow;   /* of page p, sector s: [p * PER_PAGE + s] */
    _Atomic uint64_t *windowed; /* per page, for reports: number << 16 | what << 8 | status of the last window; 0: none */
    uint32_t pages, groups, copies, owners;
    _Atomic uint32_t hot; /* group around which most is written just now */
};

extern struct arena arena;

enum { HOT_SPAN = 24 };

static inline uint32_t version_of(uint64_t shadow) { return (uint32_t)(shadow >> 32); }
static inline uint32_t before_of(uint64_t shadow) { return shadow >> 16 & 0xffff; }
static inline uint32_t content_of(uint64_t shadow) { return shadow & 0xffff; }
static inline int under_way(uint64_t shadow) { return version_of(shadow) & 1; }

static inline uint8_t *page_at(uint32_t page) { return arena.bytes + (uint64_t)page * PF_PAGE; }
static inline uint8_t *sector_at(uint32_t page, uint32_t sector) { return page_at(page) + sector * SECTOR; }
static inline _Atomic uint64_t *shadow_at(uint32_t page, uint32_t sector) {
    return arena.shadow + (uint64_t)page * PER_PAGE + sector;
}
static inline uint64_t file_offset(uint32_t group, uint32_t sector, uint32_t content) {
    return (((uint64_t)group * PER_PAGE + sector) * FILE_CONTENTS + content) * SECTOR;
}

/* Every eighth sixteen of groups can be zeros, and every eighth group. */
static inline int zero_band(uint32_t group) { return group / 16 % 8 == 5; }
static inline int zero_group(uint32_t group) { return group % 8 == 1 || zero_band(group); }
/* Odd groups and bands have one writer for the whole page, the others a writer per sector: so windows meet both. */
static inline int one_owner(uint32_t group) { return (group & 1) || zero_band(group); }
static inline uint32_t owner_of(uint32_t group, uint32_t sector) {
    return (one_owner(group) ? group / 2 : group + sector) % arena.owners;
}
/* Contents of a group are 1 to this; few in some groups, so that old contents come back, many in others, so that none does. */
static inline uint32_t most_content(uint32_t group) {
    return zero_group(group) || group % 8 == 2 ? 3 : group % 8 == 3 ? 2 : 0xfff0;
}

int arena_open(uint32_t pages, uint32_t copies, uint32_t owners, int huge);
/* Write every page for the first time; groups of zeros stay untouched. */
void arena_fill(void);
void content_fill(uint32_t group, uint32_t sector, uint32_t content, uint8_t out[SECTOR]);
/* A next content for a sector that holds `now`, never the same; not above `limit`. */
uint32_t content_next(uint64_t *stream, uint32_t group, uint32_t now, uint32_t limit);
/* How many bytes of `seen` no content explains that was there between the two looks. */
uint32_t judge(uint32_t page, uint32_t sector, uint64_t before, uint64_t after, const uint8_t seen[SECTOR]);
/* Tell in words what is in a sector that was found wrong. */
void describe(uint32_t page, uint32_t sector, uint64_t before, uint64_t after, const uint8_t seen[SECTOR], char *text,
              uint32_t room);
/* Look at every sector of the arena now and report what is wrong; `before` and `after` are copies of the shadow, for a child
 * that must know what it may hold; NULL: nobody writes. Returns the number of wrong sectors. */
uint32_t arena_verify(const char *finder, const uint64_t *before, const uint64_t *after);
void shadow_copy(uint64_t *copy);
/* A checksum of all bytes. */
uint64_t arena_sum(void);

/* Mark a sector as being written, and as written. Only its owner may. */
static inline void write_begins(uint32_t page, uint32_t sector, uint32_t content) {
    _Atomic uint64_t *shadow = shadow_at(page, sector);
    uint64_t now = atomic_load_explicit(shadow, memory_order_relaxed);
    atomic_store(shadow, (uint64_t)(version_of(now) + 1) << 32 | (uint64_t)content_of(now) << 16 | content);
}
static inline void write_ends(uint32_t page, uint32_t sector) {
    _Atomic uint64_t *shadow = shadow_at(page, sector);
    atomic_fetch_add(shadow, (uint64_t)1 << 32);
}

#endif
