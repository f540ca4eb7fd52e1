/* Own extents: made, sealed, filled, retired, and freed when their lock says that no mapping is left. */
#include "extents.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../../csrc/agent.h"
#include "chance.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8u
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 16
#endif

static uint64_t sum_of(const uint8_t *page) {
    uint64_t words[PF_PAGE / 8], sum = 1;
    memcpy(words, page, PF_PAGE);
    for (uint32_t word = 0; word < PF_PAGE / 8; word++)
        sum = (sum ^ words[word]) * 0x9e3779b97f4a7c15u + (sum >> 29);
    return sum | 1;
}

static int open_all(struct extent *extent, uint32_t number, uint32_t slots) {
    char path[64];
    uint64_t bytes = (uint64_t)slots * PF_PAGE;
    *extent = (struct extent){.memory = -1, .shared = -1, .fill = MAP_FAILED, .bytes = MAP_FAILED};
    extent->memory = memfd_create("torture", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    if (extent->memory < 0 || ftruncate(extent->memory, (off_t)bytes))
        return -errno;
    extent->fill = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, extent->memory, 0);
    if (extent->fill == MAP_FAILED || madvise(extent->fill, bytes, MADV_DONTFORK))
        return -errno;
    if (fcntl(extent->memory, F_ADD_SEALS, F_SEAL_FUTURE_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) ||
        fchmod(extent->memory, 0400))
        return -errno;
    snprintf(path, sizeof path, "/proc/thread-self/fd/%d", extent->memory); /* this thread has a file table of its own */
    extent->shared = open(path, O_RDONLY | O_CLOEXEC);
    if (extent->shared < 0 || flock(extent->shared, LOCK_SH))
        return -errno;
    extent->bytes = mmap(NULL, bytes, PROT_READ, MAP_SHARED, extent->shared, 0);
    extent->sums = calloc(slots, sizeof *extent->sums);
    extent->number = number;
    return extent->bytes == MAP_FAILED || !extent->sums ? -ENOMEM : 0;
}

int extent_open(struct extent *extent, uint32_t number, uint32_t slots) {
    int error = open_all(extent, number, slots);
    if (!error)
        return 0;
    if (extent->fill != MAP_FAILED)
        munmap(extent->fill, (uint64_t)slots * PF_PAGE);
    if (extent->bytes != MAP_FAILED)
        munmap(extent->bytes, (uint64_t)slots * PF_PAGE);
    if (extent->memory >= 0)
        close(extent->memory);
    if (extent->shared >= 0)
        close(extent->shared);
    memset(extent, 0, sizeof *extent);
    return error;
}

void extent_fill(struct extent *extent, uint32_t slot, const uint8_t *page) {
    uint8_t *to = extent->fill + (uint64_t)slot * PF_PAGE;
    memcpy(to, page, PF_PAGE); /* of a page that changes meanwhile any mixture: the window compares */
    extent->sums[slot] = sum_of(to);
    extent->filled++;
}

uint32_t extent_retire(struct extent *extent, uint32_t slots) {
    uint32_t changed = 0;
    for (uint32_t slot = 0; slot < slots; slot++)
        changed += extent->sums[slot] && extent->sums[slot] != sum_of(extent->bytes + (uint64_t)slot * PF_PAGE);
    munmap(extent->bytes, (uint64_t)slots * PF_PAGE);
    close(extent->shared);
    extent->bytes = NULL;
    extent->shared = -1;
    return changed;
}

int extent_free(struct extent *extent, uint32_t slots) {
    if (flock(extent->memory, LOCK_EX | LOCK_NB))
        return 0;
    munmap(extent->fill, (uint64_t)slots * PF_PAGE);
    close(extent->memory);
    free(extent->sums);
    extent->number = 0;
    return 1;
}
