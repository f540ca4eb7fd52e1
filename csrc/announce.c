/* Own which regions the daemon knows of. */
#define _GNU_SOURCE
#include "announce.h"

#include <pthread.h>
#include <stddef.h>
#include <sys/mman.h>

#include "command.h"
#include "link.h"
#include "look.h"

#define RING 1024u
#define FIRST_ROOM 4096u /* numbers */
#define AGAIN_MS 1000u

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of the ring */
static int64_t ring[RING];
static uint32_t ringed;
static bool overflow; /* more went than the ring holds: all that were announced are looked up */

/* Numbers the daemon knows, ascending; 0 in `alive` where it was told that the region went. Of the link's thread. */
static struct known {
    int64_t region;
    bool alive;
} *known;
static size_t count, room, dead;
static int64_t seen; /* the highest number that the registry had when we last looked */
static uint64_t again; /* when to look once more, after a look that failed for the time being; 0: not */

void pf_announce_gone(int64_t region) {
    pthread_mutex_lock(&lock);
    if (ringed < RING)
        ring[ringed++] = region;
    else
        overflow = true;
    pthread_mutex_unlock(&lock);
}

static struct known *find(int64_t region) {
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (known[middle].region < region)
            low = middle + 1;
        else
            high = middle;
    }
    return low < count && known[low].region == region && known[low].alive ? &known[low] : NULL;
}

static bool add(int64_t region) {
    if (dead > count / 2) {
        size_t kept = 0;
        for (size_t i = 0; i < count; i++)
            if (known[i].alive)
                known[kept++] = known[i];
        count = kept;
        dead = 0;
    }
    if (count == room) {
        size_t more = room ? room * 2 : FIRST_ROOM;
        void *at = room ? mremap(known, room * sizeof *known, more * sizeof *known, MREMAP_MAYMOVE)
                        : mmap(NULL, more * sizeof *known, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED)
            return false;
        known = at;
        room = more;
    }
    known[count++] = (struct known){region, true};
    return true;
}

static bool say_gone(int64_t region) {
    struct known *at = find(region);
    if (at == NULL)
        return true;
    at->alive = false;
    dead++;
    return pf_announce_unadvise(region);
}

static bool say_all_gone(void) {
    int64_t gone[RING];
    pthread_mutex_lock(&lock);
    uint32_t number = ringed;
    bool all = overflow;
    for (uint32_t i = 0; i < number; i++)
        gone[i] = ring[i];
    ringed = 0;
    overflow = false;
    pthread_mutex_unlock(&lock);
    for (uint32_t i = 0; i < number; i++)
        if (!say_gone(gone[i]))
            return false;
    for (size_t i = 0; all && i < count; i++) {
        struct pf_region region;
        bool there = pf_region_get(known[i].region, &region) && !region.closing;
        if (known[i].alive && !there && !say_gone(known[i].region))
            return false;
    }
    return true;
}

bool pf_announce(void) {
    struct pf_region region;
    int64_t upto = seen;
    /* 0. A region that nobody looked at is not announced, and none above it: numbers are told ascending. */
    again = pf_look() ? pf_now_ms() + AGAIN_MS : 0;
    /* 1. What is there now? Only the highest number need be kept: numbers grow, and each is looked up again in step 3. */
    while (pf_region_next(upto, &region)) {
        if (region.suits == PF_UNSEEN) {
            if (!again)
                pf_link_kick();
            break;
        }
        upto = region.id;
    }
    /* 2. */
    if (!say_all_gone())
        return false;
    /* 3. */
    while (seen < upto && pf_region_next(seen, &region) && region.id <= upto) {
        seen = region.id;
        if (!region.closing && !region.suits && !(add(region.id) && pf_announce_advise(&region)))
            return false;
    }
    seen = upto;
    return true;
}

uint64_t pf_announce_again(void) {
    return again;
}

bool pf_announced(int64_t region) {
    return find(region) != NULL;
}

void pf_announce_forget(void) {
    count = dead = 0;
    seen = 0;
    again = 0;
    pthread_mutex_lock(&lock);
    ringed = 0;
    overflow = false;
    pthread_mutex_unlock(&lock);
}

void pf_announce_child(void) {
    pthread_mutex_init(&lock, NULL);
    known = NULL; /* left as it is: the fork may have come between its move and the note of where it went */
    room = 0;
    count = dead = 0;
    seen = 0;
    again = 0;
    ringed = 0;
    overflow = false;
}
