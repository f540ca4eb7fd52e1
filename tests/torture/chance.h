/* Own chance: one number stream per thread, from one seed, so that threads do not wait for each other to draw. */
#ifndef TORTURE_CHANCE_H
#define TORTURE_CHANCE_H

#include <stdint.h>

static inline uint64_t mixed(uint64_t value) {
    value ^= value >> 30;
    value *= 0xbf58476d1ce4e5b9u;
    value ^= value >> 27;
    value *= 0x94d049bb133111ebu;
    return value ^ value >> 31;
}

static inline uint64_t draw(uint64_t *stream) {
    *stream += 0x9e3779b97f4a7c15u;
    return mixed(*stream);
}

/* A number from 0 to limit-1. */
static inline uint32_t below(uint64_t *stream, uint32_t limit) {
    return (uint32_t)((draw(stream) >> 32) * limit >> 32);
}

static inline int percent(uint64_t *stream, double part) {
    return (double)(draw(stream) >> 11) * 0x1p-53 * 100.0 < part;
}

#endif
