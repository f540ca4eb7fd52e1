/* Own the arena: contents, their judge, and the words for what was found. See arena.h for the rules. */
#include "arena.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "chance.h"
#include "verdict.h"

#define MAGIC 0x5ec7u

struct arena arena;

static void *shared_memory(uint64_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

int arena_open(uint32_t pages, uint32_t copies, uint32_t owners, int huge) {
    uint64_t huge_page = 2u << 20, bytes = (uint64_t)pages * PF_PAGE;
    /* Neighbours of the arena must not be touched either: an anonymous page that may be written lies before and after it. */
    uint8_t *room = mmap(NULL, bytes + 2 * huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return -1;
    arena.bytes = (uint8_t *)(((uint64_t)room + huge_page - 1) / huge_page * huge_page);
    arena.pages = pages;
    arena.copies = copies;
    arena.groups = pages / copies;
    arena.owners = owners;
    arena.shadow = shared_memory((uint64_t)pages * PER_PAGE * sizeof *arena.shadow);
    arena.windowed = shared_memory((uint64_t)pages * sizeof *arena.windowed);
    madvise(arena.bytes, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    return arena.shadow && arena.windowed ? 0 : -1;
}

void arena_fill(void) {
    for (uint32_t page = 0; page < arena.pages; page++) {
        uint32_t group = page % arena.groups;
        for (uint32_t sector = 0; sector < PER_PAGE; sector++) {
            if (zero_group(group))
                continue;
            write_begins(page, sector, 1);
            content_fill(group, sector, 1, sector_at(page, sector));
            write_ends(page, sector);
        }
    }
}

void content_fill(uint32_t group, uint32_t sector, uint32_t content, uint8_t out[SECTOR]) {
    uint64_t words[WORDS];
    if (content == ZEROS) {
        memset(out, 0, SECTOR);
        return;
    }
    words[0] = (uint64_t)MAGIC << 48 | (uint64_t)owner_of(group, sector) << 32 | content;
    words[1] = (uint64_t)group << 32 | sector << 16 | MAGIC;
    words[2] = mixed(words[0] ^ mixed(words[1])); /* the checksum: everything after it follows from it */
    for (uint32_t word = 3; word < WORDS; word++)
        words[word] = words[2] + word * 0x9e3779b97f4a7c15u;
    memcpy(out, words, SECTOR);
}

uint32_t content_next(uint64_t *stream, uint32_t group, uint32_t now, uint32_t limit) {
    uint32_t most = most_content(group) < limit ? most_content(group) : limit;
    uint32_t first = zero_group(group) ? 0 : 1, next;
    do
        next = first + below(stream, most - first + 1);
    while (next == now);
    return next;
}

/* The contents that may have been there between two looks at the shadow; 0 if too much happened to know. */
static uint32_t possible(uint64_t before, uint64_t after, uint32_t contents[4]) {
    uint32_t number = 0;
    if (version_of(after) - version_of(before) > 2)
        return 0;
    if (under_way(before))
        contents[number++] = before_of(before);
    contents[number++] = content_of(before);
    if (before != after) {
        if (under_way(after) && before_of(after) != content_of(before))
            contents[number++] = before_of(after);
        contents[number++] = content_of(after);
    }
    return number;
}

/* Bytes that every content of this sector has; in groups of zeros there are none. */
static uint32_t judge_fixed(uint32_t page, uint32_t sector, const uint8_t *seen) {
    uint8_t fill[SECTOR];
    uint32_t group = page % arena.groups, wrong = 0;
    if (zero_group(group))
        return 0;
    content_fill(group, sector, 1, fill);
    for (uint32_t byte = 2; byte < 16; byte++)
        wrong += seen[byte] != fill[byte];
    return wrong;
}

uint32_t judge(uint32_t page, uint32_t sector, uint64_t before, uint64_t after, const uint8_t seen[SECTOR]) {
    uint8_t fill[4][SECTOR];
    uint32_t contents[4], group = page % arena.groups, wrong = 0;
    uint32_t number = possible(before, after, contents);
    if (!number) {
        atomic_fetch_add_explicit(&verdict->raced, 1, memory_order_relaxed);
        return judge_fixed(page, sector, seen);
    }
    for (uint32_t which = 0; which < number; which++) {
        content_fill(group, sector, contents[which], fill[which]);
        if (!memcmp(fill[which], seen, SECTOR))
            return 0;
    }
    for (uint32_t byte = 0; byte < SECTOR; byte++) {
        int right = 0;
        for (uint32_t which = 0; which < number && !right; which++)
            right = fill[which][byte] == seen[byte];
        wrong += !right;
    }
    return wrong;
}

static void describe_seen(const uint8_t *seen, char *text, uint32_t room) {
    uint64_t words[WORDS], sum;
    uint32_t zeros = 0, followed = 0;
    memcpy(words, seen, SECTOR);
    for (uint32_t byte = 0; byte < SECTOR; byte++)
        zeros += !seen[byte];
    if (zeros == SECTOR) {
        snprintf(text, room, "zeros");
        return;
    }
    sum = mixed(words[0] ^ mixed(words[1]));
    for (uint32_t word = 3; word < WORDS; word++)
        followed += words[word] == sum + word * 0x9e3779b97f4a7c15u;
    if (words[0] >> 48 == MAGIC && (words[1] & 0xffff) == MAGIC)
        snprintf(text, room, "content %u of writer %u for group %u sector %u, checksum %s, %u of %d words its own",
                 (uint32_t)words[0] & 0xffff, (uint32_t)(words[0] >> 32) & 0xffff, (uint32_t)(words[1] >> 32),
                 (uint32_t)(words[1] >> 16) & 0xffff, words[2] == sum ? "right" : "wrong", followed, WORDS - 3);
    else
        snprintf(text, room, "no sector of ours: %016llx %016llx %016llx ...", (unsigned long long)words[0],
                 (unsigned long long)words[1], (unsigned long long)words[2]);
}

void describe(uint32_t page, uint32_t sector, uint64_t before, uint64_t after, const uint8_t seen[SECTOR], char *text,
              uint32_t room) {
    uint8_t fill[SECTOR];
    char found[200];
    uint32_t first = SECTOR, last = 0, group = page % arena.groups;
    content_fill(group, sector, content_of(before), fill);
    for (uint32_t byte = 0; byte < SECTOR; byte++)
        if (fill[byte] != seen[byte]) {
            first = byte < first ? byte : first;
            last = byte;
        }
    describe_seen(seen, found, sizeof found);
    snprintf(text, room,
             "expected content %u (before it %u, version %u%s) of writer %u for group %u sector %u; found %s; bytes %u to %u "
             "are not as expected; shadow then version %u content %u",
             content_of(before), before_of(before), version_of(before), under_way(before) ? ", under way" : "",
             owner_of(group, sector), group, sector, found, first, last, version_of(after), content_of(after));
}

void shadow_copy(uint64_t *copy) {
    uint64_t slots = (uint64_t)arena.pages * PER_PAGE;
    for (uint64_t slot = 0; slot < slots; slot++)
        copy[slot] = atomic_load_explicit(&arena.shadow[slot], memory_order_acquire);
}

uint32_t arena_verify(const char *finder, const uint64_t *before, const uint64_t *after) {
    uint64_t slots = (uint64_t)arena.pages * PER_PAGE;
    uint32_t wrong = 0;
    for (uint64_t slot = 0; slot < slots; slot++) {
        uint32_t page = (uint32_t)(slot / PER_PAGE), sector = slot % PER_PAGE;
        uint64_t late = after ? after[slot] : atomic_load(&arena.shadow[slot]);
        uint64_t early = before ? before[slot] : late;
        uint32_t bytes = judge(page, sector, early, late, sector_at(page, sector));
        if (!bytes)
            continue;
        wrong++;
        verdict_wrong(before ? BY_CHILD : BY_WRITER, finder, page, sector, early, late, sector_at(page, sector), bytes);
    }
    return wrong;
}

uint64_t arena_sum(void) {
    const uint64_t *words = (const uint64_t *)(const void *)arena.bytes;
    uint64_t sum = 1;
    for (uint64_t word = 0; word < (uint64_t)arena.pages * PF_PAGE / 8; word++)
        sum = (sum ^ words[word]) * 0x9e3779b97f4a7c15u + (sum >> 29);
    return sum;
}
