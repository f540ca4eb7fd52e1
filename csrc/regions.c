/* Own the registry of regions and W, the window mutex: see regions.h. Must not know userfaultfd, the daemon, or Python.
 *
 * The registry is an array of entries, sorted by address, and one sorted by id, in memory of their own mmap; they double. An
 * entry repeats what a search needs, so that one with thousands of regions touches few cache lines. Ids count up, so a late
 * message about a region that is gone can never meet another one, and a new id goes to the end of its array.
 */
#define _GNU_SOURCE
#include "regions.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include "kit.h"

static pthread_mutex_t window_mutex = PTHREAD_MUTEX_INITIALIZER;
static atomic_int waiting; /* threads in pf_w_lock */

static struct entry {
    uint64_t start, end;
    int64_t id;
    struct pf_region *region;
} *entries; /* sorted by start */
static struct numbered {
    int64_t id;
    struct pf_region *region;
} *numbered; /* the same, sorted by id */
static uint32_t count, room;
static uint32_t unseen, refused; /* regions whose `suits` is PF_UNSEEN, is negative */
static int64_t last_id;
static uint64_t all_pages, refused_pages;

static void before_fork(void) {
    pf_w_lock();
}

static void after_fork_in_parent(void) {
    pf_counts_all.forks++;
    pf_w_unlock();
}

void pf_w_lock(void) {
    atomic_fetch_add(&waiting, 1);
    pthread_mutex_lock(&window_mutex);
    atomic_fetch_sub(&waiting, 1);
}

void pf_w_lock_window(void) {
    /* Bounded, and only politeness: each round lasts longer than it takes to wake a thread. */
    for (int round = 0; round < 20 && atomic_load(&waiting); round++) {
        struct timespec pause = {.tv_nsec = 50000};
        nanosleep(&pause, NULL);
    }
    pthread_mutex_lock(&window_mutex);
}

void pf_w_unlock(void) {
    pthread_mutex_unlock(&window_mutex);
}

static void *map_memory(uint64_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    madvise(memory, bytes, MADV_NOHUGEPAGE); /* 8 bytes per page, and mostly zeros: keep them few */
    return memory;
}

static uint64_t round_up(uint64_t bytes) {
    return (bytes + PF_PAGE - 1) / PF_PAGE * PF_PAGE;
}

/* A region's record and its `where` are one mapping: the record first. */
static uint64_t record_bytes(uint64_t pages) {
    return round_up(sizeof(struct pf_region) + pages * sizeof(uint64_t));
}

/* First index in a sorted table, of rows of `words` words with the key in `keys[0]`, whose key is above this one. */
static uint32_t first_above(const uint64_t *keys, uint32_t words, uint64_t key) {
    uint32_t low = 0, high = count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (keys[(size_t)middle * words] > key)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* First index whose region ends above `address`. */
static uint32_t index_above(uint64_t address) {
    return count ? first_above(&entries->end, sizeof *entries / sizeof(uint64_t), address) : 0;
}

/* First index in `numbered` whose id is above `id`. */
static uint32_t index_after(int64_t id) {
    return count ? first_above((const uint64_t *)&numbered->id, sizeof *numbered / sizeof(uint64_t), (uint64_t)id) : 0;
}

static bool make_room(void) {
    if (count < room)
        return true;
    uint32_t more = room ? 2 * room : PF_PAGE / sizeof *entries;
    struct entry *larger = map_memory(more * sizeof *entries);
    struct numbered *longer = map_memory(round_up(more * sizeof *numbered));
    if (!larger || !longer) {
        if (larger)
            munmap(larger, more * sizeof *entries);
        if (longer)
            munmap(longer, round_up(more * sizeof *numbered));
        return false;
    }
    if (entries) {
        memcpy(larger, entries, count * sizeof *entries);
        memcpy(longer, numbered, count * sizeof *numbered);
        munmap(entries, room * sizeof *entries);
        munmap(numbered, round_up(room * sizeof *numbered));
    }
    entries = larger;
    numbered = longer;
    room = more;
    return true;
}

static void take_out(const struct pf_region *region) {
    const uint32_t at = index_above(region->start), number = index_after(region->id) - 1;
    count--;
    memmove(entries + at, entries + at + 1, (count - at) * sizeof *entries);
    memmove(numbered + number, numbered + number + 1, (count - number) * sizeof *numbered);
    all_pages -= region->pages;
    unseen -= region->suits == PF_UNSEEN;
    refused -= region->suits < 0;
    refused_pages -= region->suits < 0 ? region->pages : 0;
}

/* The child has no agent, no userfaultfd (its registrations are not inherited) and no other thread: nobody will end the
 * regions that were closing, and their memory may be another's. */
static void after_fork_in_child(void) {
    atomic_store(&waiting, 0);
    for (uint32_t i = 0; i < count;) {
        struct pf_region *region = entries[i].region;
        if (region->closing) {
            take_out(region);
            munmap(region, record_bytes(region->pages));
        } else {
            region->tracked = 0;
            i++;
        }
    }
    pf_kit_forget();
    pf_w_unlock();
}

/* 101: before those of all other files, so that this prepare runs last; see regions.h. */
static void __attribute__((constructor(101))) watch_forks(void) {
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

int64_t pf_region_add(uint64_t start, uint64_t bytes, uint32_t quiet, uint32_t vma) {
    const uint64_t pages = bytes / PF_PAGE;
    if (start % PF_PAGE || bytes % PF_PAGE || !pages || start + bytes < start || pages > UINT64_MAX / 16 / PF_PAGE)
        return -EINVAL;
    struct pf_region *region = map_memory(record_bytes(pages));
    if (!region)
        return -ENOMEM;
    *region = (struct pf_region){.start = start, .pages = pages, .quiet = quiet, .where = (uint64_t *)(region + 1)};
    if (vma == PF_VMA_UNSEEN)
        region->suits = PF_UNSEEN;
    else
        region->vma = vma;
    pf_w_lock();
    int64_t result = 0;
    uint32_t at = index_above(start);
    if (at < count && entries[at].start < start + bytes)
        result = -EEXIST;
    else if (!make_room())
        result = -ENOMEM;
    if (!result) {
        memmove(entries + at + 1, entries + at, (count - at) * sizeof *entries);
        result = region->id = ++last_id;
        entries[at] = (struct entry){start, start + bytes, region->id, region};
        numbered[count++] = (struct numbered){region->id, region};
        unseen += region->suits == PF_UNSEEN;
        all_pages += pages;
    }
    pf_w_unlock();
    if (result < 0)
        munmap(region, record_bytes(pages));
    return result;
}

static struct pf_region *find(int64_t id) {
    const uint32_t after = index_after(id);
    return after && numbered[after - 1].id == id ? numbered[after - 1].region : NULL;
}

struct pf_region *pf_region_find_at(uint64_t address) {
    uint32_t at = index_above(address);
    return at < count && entries[at].start <= address ? entries[at].region : NULL;
}

struct pf_region *pf_region_index(uint32_t index) {
    return index < count ? entries[index].region : NULL;
}

static int end_use(int64_t id, uint32_t abandoned) {
    pf_w_lock();
    struct pf_region *region = find(id);
    const bool open = region && !region->closing;
    if (region) {
        region->closing = 1;
        region->abandoned |= abandoned;
    }
    pf_w_unlock();
    return open ? 0 : -ENOENT;
}

int pf_region_close(int64_t id) {
    return end_use(id, 0);
}

int pf_region_abandon(int64_t id) {
    return end_use(id, 1);
}

int pf_region_remove(int64_t id) {
    pf_w_lock();
    struct pf_region *region = find(id);
    if (region)
        take_out(region);
    pf_w_unlock();
    if (!region)
        return -ENOENT;
    munmap(region, record_bytes(region->pages));
    return 0;
}

int pf_region_seen(int64_t id, int32_t suits) {
    pf_w_lock();
    struct pf_region *region = find(id);
    const int result = !region ? -ENOENT : region->suits != PF_UNSEEN ? -EALREADY : 0;
    if (!result) {
        unseen--;
        region->suits = suits < 0 ? suits : 0;
        region->vma = suits < 0 ? 0 : (uint32_t)suits;
        refused += suits < 0;
        refused_pages += suits < 0 ? region->pages : 0;
    }
    pf_w_unlock();
    return result;
}

uint32_t pf_region_unseen(struct pf_range *ranges, uint32_t most) {
    uint32_t found = 0;
    pf_w_lock();
    for (uint32_t i = 0; unseen && i < count && found < most; i++)
        if (entries[i].region->suits == PF_UNSEEN)
            ranges[found++] = (struct pf_range){entries[i].id, entries[i].start, entries[i].end, 0};
    pf_w_unlock();
    return found;
}

static bool copy_record(const struct pf_region *region, struct pf_region *copy) {
    if (region) {
        *copy = *region;
        copy->where = NULL;
    }
    return region != NULL;
}

bool pf_region_get(int64_t id, struct pf_region *copy) {
    pf_w_lock();
    bool found = copy_record(find(id), copy);
    pf_w_unlock();
    return found;
}

bool pf_region_next(int64_t after, struct pf_region *copy) {
    pf_w_lock();
    const uint32_t next = index_after(after);
    bool found = copy_record(next < count ? numbered[next].region : NULL, copy);
    pf_w_unlock();
    return found;
}

bool pf_region_at(uint64_t address, struct pf_region *copy) {
    pf_w_lock();
    bool found = copy_record(pf_region_find_at(address), copy);
    pf_w_unlock();
    return found;
}

int pf_region_where(int64_t id, uint64_t first, uint64_t pages, uint64_t *out) {
    int result = -ENOENT;
    pf_w_lock();
    const struct pf_region *region = find(id);
    if (region) {
        result = first <= region->pages && pages <= region->pages - first ? 0 : -EINVAL;
        if (!result)
            memcpy(out, region->where + first, pages * sizeof *out);
    }
    pf_w_unlock();
    return result;
}

void pf_region_totals(uint32_t *number, uint64_t *pages) {
    pf_w_lock();
    *number = count - refused;
    *pages = all_pages - refused_pages;
    pf_w_unlock();
}

bool pf_region_overlaps(uint64_t start, uint64_t bytes) {
    pf_w_lock();
    const uint32_t at = index_above(start);
    const bool found = at < count && entries[at].start < start + bytes;
    pf_w_unlock();
    return found;
}
