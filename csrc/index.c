/* Own the family's shared index. */
#define _GNU_SOURCE
#include "index.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

#include "command.h"

#define MOST_LOG2 22u /* 4 Mi entries: 16 GiB of different pages; 144 MiB of address space */
#define LEAST_LOG2 12u
#define PATIENCE_MS 1000u
#define TRY_AGAIN 65536u /* turned away, until room is looked for again: that reads the whole index */

struct shared {
    pthread_mutex_t lock;
    uint32_t room;    /* entries there can be */
    uint32_t buckets; /* a power of two; grows with the entries, so that a small index touches few pages */
    uint32_t count;   /* entries ever used, free ones among them; the first is none */
    uint32_t free;    /* chain of free entries by `next` */
    uint32_t unfree;  /* entries in chains of buckets */
    uint32_t turned_away; /* hashes that found no room since room was last made */
    struct pf_family family;
};

static struct shared *shared;
static uint32_t *heads;         /* by bucket: first entry, 0 is none */
static struct pf_entry *entries;

/* Before any fork, so that all descendants share it. If there is no such room, less will do; if none, there is no index. */
__attribute__((constructor)) static void map_index(void) {
    size_t first = (sizeof *shared + 4095) & ~(size_t)4095;
    for (uint32_t log2 = MOST_LOG2; log2 >= LEAST_LOG2; log2 -= 2) {
        size_t room = (size_t)1 << log2;
        size_t bytes = first + room * (sizeof *heads + sizeof *entries);
        char *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED)
            continue;
        madvise(at, bytes, MADV_DONTDUMP);
        struct shared *made = (struct shared *)at;
        pthread_mutexattr_t attributes;
        pthread_mutexattr_init(&attributes);
        pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
        pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
        pthread_mutex_init(&made->lock, &attributes);
        pthread_mutexattr_destroy(&attributes);
        made->room = (uint32_t)room;
        made->buckets = 1u << LEAST_LOG2;
        made->count = 1;
        made->family.open = PF_CHUNKS;
        heads = (uint32_t *)(at + first);
        entries = (struct pf_entry *)(at + first + room * sizeof *heads);
        shared = made;
        return;
    }
}

/* Build all chains from the entries themselves, which say what they are. */
static void chain_anew(uint32_t buckets) {
    memset(heads, 0, buckets * sizeof *heads);
    shared->buckets = buckets;
    shared->free = 0;
    shared->unfree = 0;
    for (uint32_t i = 1; i < shared->count; i++) {
        struct pf_entry *entry = &entries[i];
        uint32_t *chain = entry->kind == PF_ENTRY_FREE ? &shared->free : &heads[entry->hash & (buckets - 1)];
        shared->unfree += entry->kind != PF_ENTRY_FREE;
        entry->next = *chain;
        *chain = i;
    }
}

struct pf_family *pf_index_lock(void) {
    if (shared == NULL)
        return NULL;
    struct timespec until = pf_deadline(PATIENCE_MS);
    int error = pthread_mutex_clocklock(&shared->lock, CLOCK_MONOTONIC, &until);
    if (error == EOWNERDEAD) {
        if (shared->count == 0 || shared->count > shared->room)
            shared->count = shared->count ? shared->room : 1;
        chain_anew(shared->buckets);
        pthread_mutex_consistent(&shared->lock);
        error = 0;
    }
    return error ? NULL : &shared->family;
}

void pf_index_unlock(void) {
    pthread_mutex_unlock(&shared->lock);
}

struct pf_entry *pf_index_find(uint64_t hash) {
    uint32_t steps = 0;
    for (uint32_t i = heads[hash & (shared->buckets - 1)]; i && i < shared->count && steps < shared->count; steps++) {
        struct pf_entry *entry = &entries[i];
        if (entry->hash == hash && entry->kind != PF_ENTRY_FREE)
            return entry;
        i = entry->next;
    }
    return NULL;
}

void pf_entry_set(struct pf_entry *entry, enum pf_entry_kind kind, uint32_t a, uint32_t b, uint32_t c) {
    entry->place[0] = a;
    entry->place[1] = b;
    entry->place[2] = c;
    atomic_thread_fence(memory_order_release); /* if we die in between, it is still what it was or what it will be */
    entry->kind = kind;
}

static void make_room(bool (*keep)(const struct pf_entry *)) {
    for (uint32_t i = 1; i < shared->count; i++)
        if (entries[i].kind != PF_ENTRY_FREE && !keep(&entries[i]))
            entries[i].kind = PF_ENTRY_FREE;
    uint32_t buckets = shared->buckets;
    chain_anew(buckets);
    while (buckets < shared->unfree * 2 && buckets < shared->room)
        buckets *= 2;
    if (buckets != shared->buckets)
        chain_anew(buckets);
}

bool pf_index_add(uint64_t hash, enum pf_entry_kind kind, uint32_t a, uint32_t b, uint32_t c,
                  bool (*keep)(const struct pf_entry *)) {
    /* Room is made whenever the chains would grow long: so what nobody needs goes before the index takes more memory. */
    bool full = shared->free == 0 && shared->count == shared->room;
    if ((shared->unfree >= shared->buckets && shared->buckets < shared->room) ||
        (full && shared->turned_away++ % TRY_AGAIN == 0))
        make_room(keep);
    uint32_t i = shared->free;
    if (i && i < shared->count)
        shared->free = entries[i].next;
    else if (shared->count < shared->room)
        i = shared->count++;
    else
        return false;
    shared->turned_away = 0;
    struct pf_entry *entry = &entries[i];
    uint32_t *head = &heads[hash & (shared->buckets - 1)];
    entry->hash = hash;
    entry->next = *head;
    pf_entry_set(entry, kind, a, b, c);
    *head = i;
    shared->unfree++;
    return true;
}
