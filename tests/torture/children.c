/* Own the children: forked ones verify all their memory, may merge it themselves, and then spoil it, which the parent must
 * not see; others share the memory for a moment (vfork, posix_spawn) or leave it behind (exec). */
#include <errno.h>
#include <sched.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "arena.h"
#include "merger.h"
#include "options.h"
#include "trades.h"
#include "verdict.h"

extern char **environ;

enum { SPOILED = 64, LOOKED_AT = 256, CHILD_STACK = 128 * 1024 };

struct nursery {
    const char *kind;
    uint64_t *before, *after; /* copies of the shadow */
    uint8_t *stack;
};

static int spoil(uint64_t *stream) {
    uint8_t fill[SECTOR];
    int wrong = 0;
    for (uint32_t turn = 0; turn < SPOILED; turn++) {
        uint32_t group = turn & 1 ? atomic_load(&arena.hot) + below(stream, HOT_SPAN) : below(stream, arena.groups);
        uint32_t page = group % arena.groups + below(stream, arena.copies) * arena.groups, sector = below(stream, PER_PAGE);
        content_fill(group % arena.groups, sector, INTRUDER, fill);
        memcpy(sector_at(page, sector), fill, SECTOR);
        __asm__ volatile("" : : : "memory");
        wrong += memcmp(sector_at(page, sector), fill, SECTOR) != 0;
    }
    return wrong;
}

/* In the child nobody else writes, so merging there must not change a single byte of it. */
static int merges(struct member *me) {
    uint64_t sum = arena_sum();
    merger_in_child(me);
    if (sum == arena_sum())
        return 0;
    verdict_failed(me->name, "merging in the child changed its memory", 0);
    return 1;
}

static int forked(struct member *me) {
    struct nursery *nursery = me->own;
    uint64_t failures = verdict_failed_here();
    shadow_copy(nursery->after);
    int wrong = arena_verify(me->name, nursery->before, nursery->after) != 0;
    if (!wrong && !strcmp(nursery->kind, "forkmerge"))
        wrong = merges(me) || arena_verify(me->name, nursery->before, nursery->after);
    return wrong || spoil(&me->chance) || verdict_failed_here() != failures;
}

/* Runs in a vfork child: the memory is the parent's, whose other threads go on. */
static int looking(void *own) {
    struct member *me = own;
    uint8_t seen[SECTOR];
    int wrong = 0;
    for (uint32_t turn = 0; turn < LOOKED_AT; turn++) {
        uint32_t page = below(&me->chance, arena.pages), sector = below(&me->chance, PER_PAGE);
        uint64_t before = atomic_load(shadow_at(page, sector));
        memcpy(seen, sector_at(page, sector), SECTOR);
        uint64_t after = atomic_load(shadow_at(page, sector));
        uint32_t bytes = judge(page, sector, before, after, seen);
        if (!bytes)
            continue;
        wrong = 1;
        verdict_wrong(BY_CHILD, me->name, page, sector, before, after, seen, bytes);
    }
    return wrong;
}

static int begin_child(struct member *me) {
    struct nursery *nursery = me->own;
    char *words[] = {"torture", NOTHING, NULL};
    int pid = -1;
    if (!strncmp(nursery->kind, "fork", 4) || !strcmp(nursery->kind, "rawfork")) {
        shadow_copy(nursery->before);
        beat("forks", NULL);
        pid = nursery->kind[0] == 'f' ? fork() : (int)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
        if (!pid)
            _exit(forked(me) ? 1 : 0);
    } else if (!strcmp(nursery->kind, "vfork")) {
        beat("vforks", NULL);
        pid = clone(looking, nursery->stack + CHILD_STACK, CLONE_VM | CLONE_VFORK | SIGCHLD, me);
    } else if (!strcmp(nursery->kind, "spawn")) {
        beat("spawns", NULL);
        errno = posix_spawn(&pid, "/proc/self/exe", NULL, NULL, words, environ);
        pid = errno ? -1 : pid;
    } else {
        beat("forks for exec", NULL);
        pid = fork();
        if (!pid) {
            execv("/proc/self/exe", words);
            _exit(127);
        }
    }
    return pid;
}

void child_run(struct member *me) {
    while (!atomic_load(&crew_ending)) {
        int status = 0, pid = begin_child(me), back;
        if (pid < 0 && errno == ENOMEM && options_memory_may_fail()) {
            beat("gets no child", NULL);
            continue;
        }
        if (pid < 0) {
            verdict_failed(me->name, "no child", errno);
            return;
        }
        crew_waits_for(pid);
        beat("waits for its child", NULL);
        while ((back = waitpid(pid, &status, 0)) < 0 && errno == EINTR)
            continue;
        crew_waits_for(0);
        if (back != pid || !WIFEXITED(status) || WEXITSTATUS(status)) {
            atomic_fetch_add(&verdict->bad_children, 1);
            if (WIFSIGNALED(status))
                verdict_failed(me->name, "its child was killed by a signal", WTERMSIG(status));
        }
        count(&me->done, 1);
        beat("pauses", NULL);
        usleep(below(&me->chance, options.fork_pause * 1000 + 1));
    }
}

static void *room(uint64_t bytes) { return mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }

void children_begin(void) {
    static const char *const kinds[] = {"fork", "forkmerge", "vfork", "spawn", "exec", "rawfork"};
    for (uint32_t kind = 0, number = 0; kind < sizeof kinds / sizeof *kinds; kind++) {
        if (!options_kind(kinds[kind]))
            continue;
        struct nursery *nursery = calloc(1, sizeof *nursery);
        nursery->kind = kinds[kind];
        nursery->before = room((uint64_t)arena.pages * PER_PAGE * 8);
        nursery->after = room((uint64_t)arena.pages * PER_PAGE * 8);
        nursery->stack = room(CHILD_STACK);
        crew_begin(kinds[kind], child_run, nursery, number++);
    }
}
