/* Own the threads and the watchdog over them. The watchdog touches no memory under torture: what hangs there must not take
 * it along. */
#include "crew.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "options.h"
#include "verdict.h"

_Atomic int crew_ending;
_Thread_local struct member *crew_me;

static struct member members[CREW_MOST];
static _Atomic uint32_t number_of_members;
static _Atomic int waited_for[CREW_MOST]; /* per member: a process it waits for */
static _Atomic int watch_over;
static pthread_t watcher;

static void *begin(void *own) {
    crew_me = own;
    atomic_store(&crew_me->tid, (int)syscall(SYS_gettid));
    pthread_setname_np(pthread_self(), crew_me->name);
    beat("begins", NULL);
    crew_me->run(crew_me);
    atomic_store(&crew_me->over, 1);
    return NULL;
}

struct member *crew_begin(const char *name, void (*run)(struct member *), void *own, uint32_t index) {
    pthread_attr_t attributes;
    uint32_t number = atomic_fetch_add(&number_of_members, 1);
    struct member *member = members + number;
    if (number >= CREW_MOST) {
        tell("torture: more than %d threads", CREW_MOST);
        exit(2);
    }
    snprintf(member->name, 16, "%s-%u", name, index); /* the kernel keeps 15 letters */
    member->run = run;
    member->own = own;
    member->index = index;
    member->chance = mixed(options.seed * 1000 + number);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, CREW_STACK);
    if (pthread_create(&member->thread, &attributes, begin, member)) {
        tell("torture: no thread for %s", member->name);
        exit(2);
    }
    pthread_attr_destroy(&attributes);
    return member;
}

void crew_join(void (*run)(struct member *)) {
    uint32_t number = atomic_load(&number_of_members);
    for (uint32_t index = 0; index < number; index++)
        if (members[index].thread && (!run || members[index].run == run)) {
            pthread_join(members[index].thread, NULL);
            members[index].thread = 0;
        }
}

struct member *crew_member(uint32_t number) { return number < atomic_load(&number_of_members) ? members + number : NULL; }

void crew_waits_for(int pid) { atomic_store(&waited_for[crew_me - members], pid); }

static uint64_t microseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

void crew_calm(uint64_t *slice) {
    if (options.calm <= 0)
        return;
    uint64_t worked = *slice ? microseconds() - *slice : 0;
    beat("sleeps", NULL);
    usleep((useconds_t)((double)(worked < 10000 ? worked : 10000) * options.calm / (100 - options.calm)));
    *slice = microseconds();
}

/* Print a small file of /proc, on one line. */
static void print_file(const char *path) {
    char text[2000];
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = file < 0 ? -1 : read(file, text, sizeof text - 1);
    if (length > 0) {
        text[length] = 0;
        for (char *letter = text; *letter; letter++)
            *letter = *letter == '\n' ? ' ' : *letter;
        tell("    %s: %s", path, text);
    }
    if (file >= 0)
        close(file);
}

static void print_member(const struct member *member, int seconds) {
    static const char *const files[] = {"wchan", "syscall", "stack"};
    char path[80];
    tell("torture: thread %s (%d) %s: %s at %p", member->name, member->tid, seconds ? "HANGS" : "is", member->doing, member->at);
    for (int file = 0; file < 3; file++) {
        snprintf(path, sizeof path, "/proc/self/task/%d/%s", member->tid, files[file]);
        print_file(path);
        int pid = atomic_load(&waited_for[member - members]);
        if (!pid)
            continue;
        snprintf(path, sizeof path, "/proc/%d/%s", pid, files[file]);
        print_file(path);
    }
}

static void hang(const struct member *member) {
    tell("torture: HANG: %s has done nothing for %u seconds; seed %llu", member->name, options.hang,
         (unsigned long long)options.seed);
    print_member(member, 1);
    for (uint32_t index = 0; index < atomic_load(&number_of_members); index++)
        if (members + index != member && members[index].thread && !atomic_load(&members[index].over))
            print_member(members + index, 0);
    _exit(3);
}

static void *watch(void *unused) {
    uint64_t seen[CREW_MOST] = {0};
    uint32_t calm[CREW_MOST] = {0};
    struct timespec quarter = {.tv_nsec = 250000000};
    (void)unused;
    pthread_setname_np(pthread_self(), "watchdog");
    while (!atomic_load(&watch_over)) {
        nanosleep(&quarter, NULL);
        for (uint32_t index = 0; index < atomic_load(&number_of_members); index++) {
            struct member *member = members + index;
            uint64_t now = atomic_load(&member->beats);
            calm[index] = now == seen[index] && !atomic_load(&member->over) ? calm[index] + 1 : 0;
            seen[index] = now;
            if (calm[index] > 4 * options.hang)
                hang(member);
        }
    }
    return NULL;
}

void crew_watch(void) {
    if (pthread_create(&watcher, NULL, watch, NULL)) {
        tell("torture: no watchdog");
        exit(2);
    }
}

void crew_watch_end(void) {
    atomic_store(&watch_over, 1);
    pthread_join(watcher, NULL);
}
