/* Own those who only make trouble: mappings that come and go beside the arena, signals that interrupt, huge pages that form,
 * so many mappings that there are no more, scans that protect pages, advice, pages that migrate. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "arena.h"
#include "options.h"
#include "trades.h"
#include "verdict.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#define MPOL_MF_MOVE 2

enum { BESIDE = 128, ELSEWHERE = 16 };

/* Mappings right behind the arena are replaced and change their protection: they split, and would like to join, its last. */
static void churn_beside(struct member *me) {
    uint8_t *behind = page_at(arena.pages);
    uint32_t from = below(&me->chance, BESIDE), pages = 1 + below(&me->chance, BESIDE - from);
    uint8_t *at = behind + (uint64_t)from * PF_PAGE;
    if (below(&me->chance, 2)) {
        mprotect(at, (uint64_t)pages * PF_PAGE, below(&me->chance, 2) ? PROT_READ : PROT_READ | PROT_WRITE);
        return;
    }
    int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    if (mmap(at, (uint64_t)pages * PF_PAGE, PROT_READ | PROT_WRITE, how, -1, 0) != MAP_FAILED)
        at[below(&me->chance, pages) * PF_PAGE] = 1;
}

static void churn(struct member *me) {
    static uint8_t *maps[ELSEWHERE];
    static uint64_t bytes[ELSEWHERE];
    uint32_t which = below(&me->chance, ELSEWHERE);
    if (maps[which])
        munmap(maps[which], bytes[which]);
    bytes[which] = (uint64_t)(1 + below(&me->chance, 64)) * PF_PAGE;
    maps[which] = mmap(NULL, bytes[which], PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (maps[which] == MAP_FAILED)
        maps[which] = NULL;
    else
        memset(maps[which], 1, bytes[which]);
    churn_beside(me);
    usleep(100);
}

static void interrupted(int number) { (void)number; }

static void signal_someone(struct member *me) {
    uint32_t number = 0;
    while (crew_member(number))
        number++;
    struct member *other = crew_member(below(&me->chance, number));
    if ((other->run == writer_run || other->run == reader_run) && !atomic_load(&other->over) && atomic_load(&other->tid))
        syscall(SYS_tgkill, getpid(), other->tid, SIGUSR1);
    usleep(50 + below(&me->chance, 500));
}

static void collapse(struct member *me) {
    uint64_t huge = 2u << 20, count_of = (uint64_t)arena.pages * PF_PAGE / huge;
    if (count_of)
        madvise(arena.bytes + below(&me->chance, (uint32_t)count_of) * huge, huge, MADV_COLLAPSE); /* may fail as it likes */
    usleep(2000);
}

/* Take nearly all mappings that the kernel grants a process, so that a window may get none, or just so: every second page of
 * a range gets another protection. */
static void use_up_mappings(struct member *me) {
    enum { MOST = 70000, LEFT = 400 };
    static uint8_t *range;
    static uint32_t used;
    if (!range)
        range = mmap(NULL, 2ull * MOST * PF_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED)
        return;
    while (used < MOST && !mprotect(range + 2ull * used * PF_PAGE, PF_PAGE, PROT_READ))
        used++;
    for (uint32_t left = below(&me->chance, LEFT); left && used; left--)
        mprotect(range + 2ull * --used * PF_PAGE, PF_PAGE, PROT_NONE);
    usleep(below(&me->chance, 10000));
    if (!atomic_load(&crew_ending))
        return;
    munmap(range, 2ull * MOST * PF_PAGE);
}

struct scan { /* as the kernel lays it out */
    uint64_t size, flags, start, end, walk_end, found, found_room, most_pages;
    uint64_t inverted, all_of, any_of, returned;
};

/* What a daemon does to learn which pages were written: it protects them for the next look, also in the middle of a window. */
static void scan_for_writes(struct member *me) {
    enum { PROTECT_FOUND = 1, MAY_BE_PROTECTED = 1, WRITTEN = 2 };
    static int pagemap = -1;
    uint64_t found[64 * 3];
    uint32_t from = below(&me->chance, arena.pages), pages = 1 + below(&me->chance, 64);
    pages = pages < arena.pages - from ? pages : arena.pages - from;
    if (pagemap < 0)
        pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    struct scan scan = {.size = sizeof scan, .flags = PROTECT_FOUND, .start = (uint64_t)page_at(from),
                        .end = (uint64_t)page_at(from + pages), .found = (uint64_t)found, .found_room = 64,
                        .all_of = MAY_BE_PROTECTED | WRITTEN, .returned = WRITTEN};
    ioctl(pagemap, _IOWR('f', 16, struct scan), &scan); /* refused where nothing is tracked */
    usleep(below(&me->chance, 300));
}

/* Advice that changes no byte of memory, whatever it is. */
static void advise_harmlessly(struct member *me) {
    static const int advice[] = {MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_COLD, MADV_PAGEOUT, MADV_WILLNEED};
    uint32_t from = below(&me->chance, arena.pages), pages = 1 + below(&me->chance, 16);
    pages = pages < arena.pages - from ? pages : arena.pages - from;
    beat("advises", page_at(from));
    madvise(page_at(from), (uint64_t)pages * PF_PAGE, advice[below(&me->chance, sizeof advice / sizeof *advice)]);
    usleep(below(&me->chance, 500));
}

/* Move pages to another node, if there are two. */
static void migrate(struct member *me) {
    enum { MOST = 16, NODES = 2 };
    void *pages[MOST];
    int nodes[MOST], became[MOST];
    uint32_t from = below(&me->chance, arena.pages - MOST);
    for (uint32_t page = 0; page < MOST; page++) {
        pages[page] = page_at(from + page);
        nodes[page] = (int)below(&me->chance, NODES);
    }
    beat("migrates", page_at(from));
    syscall(SYS_move_pages, 0, (unsigned long)MOST, pages, nodes, became, MPOL_MF_MOVE);
    usleep(below(&me->chance, 500));
}

struct trouble_kind {
    const char *name;
    void (*once)(struct member *me);
};

void trouble_run(struct member *me) {
    const struct trouble_kind *kind = me->own;
    while (!atomic_load(&crew_ending)) {
        beat(kind->name, NULL);
        kind->once(me);
        count(&me->done, 1);
    }
}

void trouble_begin(void) {
    static const struct trouble_kind kinds[] = {
        {"churn", churn},          {"signal", signal_someone},  {"huge", collapse},  {"limit", use_up_mappings},
        {"scan", scan_for_writes}, {"advice", advise_harmlessly}, {"migrate", migrate},
    };
    struct sigaction action = {.sa_handler = interrupted, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &action, NULL);
    for (uint32_t kind = 0, number = 0; kind < sizeof kinds / sizeof *kinds; kind++)
        if (options_kind(kinds[kind].name) && (kinds[kind].once != collapse || options.huge))
            crew_begin(kinds[kind].name, trouble_run, (void *)(uintptr_t)&kinds[kind], number++);
}
