/* Own the threads: their names, what each is doing just now, and the watch over those that hang. */
#ifndef TORTURE_CREW_H
#define TORTURE_CREW_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "chance.h"

enum { CREW_MOST = 64, CREW_STACK = 256 * 1024 };

struct member {
    char name[24];
    void (*run)(struct member *);
    void *own;      /* what its kind needs */
    uint32_t index; /* among those of its trade */
    uint64_t chance;
    pthread_t thread;
    _Atomic int tid;
    _Atomic uint64_t beats;        /* grows while it gets on; the watchdog looks at it */
    _Atomic(const char *) doing;   /* a literal */
    _Atomic(void *) at;            /* the address it is busy with */
    _Atomic uint64_t done;         /* what it has achieved: writes, reads, children, windows */
    _Atomic uint64_t again;        /* tries that were refused as they may be, and repeated */
    _Atomic int over;
};

extern _Atomic int crew_ending; /* set once: everyone comes home */
extern _Thread_local struct member *crew_me;

/* Begin a thread; it runs until crew_ending. */
struct member *crew_begin(const char *name, void (*run)(struct member *), void *own, uint32_t index);
/* Wait for everyone whose run() is this; NULL: all that are left. */
void crew_join(void (*run)(struct member *));
struct member *crew_member(uint32_t number); /* NULL after the last */
void crew_watch(void);                       /* start the watchdog */
void crew_watch_end(void);
/* Say which process the caller waits for now (0: none); a hang is then looked up there too. */
void crew_waits_for(int pid);

/* Sleep for --calm percent of the time since the last call; `slice` begins as 0. Where all run all the time, threads lose the
 * processor while they hold the kernel's lock on the mappings, and few windows happen. */
void crew_calm(uint64_t *slice);

static inline void beat(const char *doing, void *at) {
    struct member *me = crew_me;
    if (!me)
        return;
    atomic_store_explicit(&me->doing, doing, memory_order_relaxed);
    atomic_store_explicit(&me->at, at, memory_order_relaxed);
    atomic_store_explicit(&me->beats, atomic_load_explicit(&me->beats, memory_order_relaxed) + 1, memory_order_relaxed);
}

static inline void count(_Atomic uint64_t *counter, uint64_t more) {
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + more, memory_order_relaxed);
}

#endif
