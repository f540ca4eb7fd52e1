/* Write to random pages of a buffer and note how long each write took; called by live_merge.py through ctypes. */
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Write until *stop is set or `most` times were noted (ns each, in `times`); between two writes the thread computes for about `gap_ns`. */
uint64_t write_randomly(uint8_t *base, uint64_t pages, uint64_t seed, uint64_t gap_ns, volatile int *stop, uint32_t *times, uint64_t most)
{
    uint64_t count = 0, random = seed * 2 + 1;
    while (count < most && !*stop) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        volatile uint8_t *byte = base + (random >> 33) % pages * 4096 + (random >> 20) % 4096;
        uint64_t began = now();
        *byte = (uint8_t)(*byte + 1);
        uint64_t took = now() - began;
        times[count++] = took > UINT32_MAX ? UINT32_MAX : (uint32_t)took;
        for (uint64_t end = now() + gap_ns; now() < end;)
            ;
    }
    return count;
}
