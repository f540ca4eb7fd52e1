/* Own the hash of a page for the embedded store. A hint only: bytes are compared before anything is swapped. */
#ifndef PF_HASH_H
#define PF_HASH_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include "agent.h"

static inline uint64_t pf_rotate(uint64_t value, int by) {
    return value << by | value >> (64 - by);
}

/* Four lanes, so that multiplications overlap; each step is a bijection of its lane, so no single change is lost. */
static inline uint64_t pf_page_hash(const uint8_t *page, bool *all_zero) {
    uint64_t lane[4] = {0x9e3779b97f4a7c15u, 0xc2b2ae3d27d4eb4fu, 0x165667b19e3779f9u, 0xd6e8feb86659fd93u};
    uint64_t any = 0;
    for (uint32_t at = 0; at < PF_PAGE; at += 32)
        for (int i = 0; i < 4; i++) {
            uint64_t word;
            memcpy(&word, page + at + 8 * i, 8);
            any |= word;
            lane[i] = pf_rotate((lane[i] ^ word) * 0x9fb21c651e98df25u, 29);
        }
    uint64_t hash = 0;
    for (int i = 0; i < 4; i++) {
        hash = (pf_rotate(hash, 17) ^ lane[i]) * 0xff51afd7ed558ccdu;
        hash ^= hash >> 32;
    }
    *all_zero = any == 0;
    return hash;
}

#endif
