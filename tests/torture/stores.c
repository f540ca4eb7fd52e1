/* Own the writer that stores plainly, in all the ways a processor has: forward, backward, byte by byte, string instructions,
 * locked exchanges, around the cache. */
#include <string.h>

#include "arena.h"
#include "trades.h"

#if defined(__x86_64__)
#include <emmintrin.h>
static void store_string(uint8_t *to, const uint8_t *from) {
    uint64_t bytes = SECTOR;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
}
static void store_around_cache(uint8_t *to, const uint8_t *from) {
    for (int word = 0; word < WORDS; word++) {
        long long value;
        memcpy(&value, from + 8 * word, 8);
        _mm_stream_si64((long long *)(void *)to + word, value);
    }
    _mm_sfence();
}
#else
#define store_string store_bytes
#define store_around_cache store_locked
#endif

static void store_backward(uint8_t *to, const uint8_t *from) {
    volatile uint64_t *words = (volatile uint64_t *)(void *)to;
    for (int word = WORDS - 1; word >= 0; word--) {
        uint64_t value;
        memcpy(&value, from + 8 * word, 8);
        words[word] = value;
    }
}

static void store_bytes(uint8_t *to, const uint8_t *from) {
    volatile uint8_t *bytes = to;
    for (int byte = 0; byte < SECTOR; byte++)
        bytes[byte] = from[byte];
}

static void store_locked(uint8_t *to, const uint8_t *from) {
    _Atomic uint64_t *words = (_Atomic uint64_t *)(void *)to;
    for (int word = 0; word < WORDS; word++) {
        uint64_t value;
        memcpy(&value, from + 8 * word, 8);
        atomic_exchange(words + word, value);
    }
}

static int store_write(struct member *me, const struct job *jobs, uint32_t number) {
    uint8_t fill[SECTOR];
    for (uint32_t index = 0; index < number; index++) {
        uint8_t *to = sector_at(jobs[index].page, jobs[index].sector);
        content_fill(jobs[index].page % arena.groups, jobs[index].sector, jobs[index].content, fill);
        switch (below(&me->chance, 6)) {
        case 0: store_backward(to, fill); break;
        case 1: store_bytes(to, fill); break;
        case 2: store_locked(to, fill); break;
        case 3: store_string(to, fill); break;
        case 4: store_around_cache(to, fill); break;
        default: memcpy(to, fill, SECTOR);
        }
    }
    return 0;
}

const struct writer_kind writer_store = {.name = "store", .most_jobs = 4, .limit = UINT16_MAX, .write = store_write};
