/* Own when the mappings of regions are looked at: see look.h. Must not know the daemon or Python. */
#define _GNU_SOURCE
#include "look.h"

#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>

#include "regions.h"
#include "window.h"

#define AT_ONCE 4096u /* regions of one reading */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* one reading at a time: who waits finds his region seen */

int pf_look(void) {
    const size_t bytes = AT_ONCE * sizeof(struct pf_range);
    pthread_mutex_lock(&lock);
    struct pf_range one, *ranges = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const bool room = ranges != MAP_FAILED;
    ranges = room ? ranges : &one;
    const uint32_t count = pf_region_unseen(ranges, room ? AT_ONCE : 1);
    const int error = count ? pf_suitable_all(ranges, count, NULL) : 0;
    for (uint32_t i = 0; i < count; i++)
        if (ranges[i].suits != PF_UNJUDGED && !pf_region_seen(ranges[i].region, ranges[i].suits) && ranges[i].suits >= 0)
            pf_track(ranges[i].start, ranges[i].end - ranges[i].start);
    if (room)
        munmap(ranges, bytes);
    pthread_mutex_unlock(&lock);
    return error;
}

int pf_look_at(int64_t id) {
    struct pf_region region;
    while (pf_region_get(id, &region)) {
        if (region.suits != PF_UNSEEN)
            return region.suits;
        const int error = pf_look();
        if (error)
            return error;
    }
    return -ENOENT;
}

void pf_look_child(void) {
    pthread_mutex_init(&lock, NULL);
}
