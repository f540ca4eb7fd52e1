/* Own a window of its own, small and slow, that can be broken on purpose: torture must find every one of its faults, and none
 * when it has none. It shows what torture can find, not how windows are made: csrc/window.c does that.
 *
 * Faults: early    bytes are compared before the move, not after it
 *         trust    what UFFDIO_MOVE returns is believed; one in 64 complete moves is told as EEXIST here
 *         protect  pages are write-protected instead of moved: a device that has pinned one writes to the old page
 *         plain    compared and mapped with nothing at all in between
 *         fork     forks are not held up while a window is open
 *         unpinned pages written since their merge are given back without asking whether they are pinned
 *         tail     the last page of a run is not compared
 *         asleep   those who wait for a page are not woken */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "arena.h"
#include "crew.h"
#include "door.h"
#include "merger.h"
#include "options.h"

#define UFFD(number, type) _IOC(_IOC_READ | _IOC_WRITE, 0xaa, number, sizeof(type))
#define UFFD_API UFFD(0x3f, struct api)
#define UFFD_REGISTER UFFD(0, struct registration)
#define UFFD_UNREGISTER _IOC(_IOC_READ, 0xaa, 1, sizeof(struct range))
#define UFFD_WAKE _IOC(_IOC_READ, 0xaa, 2, sizeof(struct range))
#define UFFD_MOVE UFFD(5, struct move)
#define UFFD_PROTECT UFFD(6, struct protection)
enum { MISSING = 1, PROTECTED = 2, MOST_PAGES = 64, MOST_ARENA = 1 << 20 };
#define FEATURES (1ull << 0 | 1ull << 12 | 1ull << 13 | 1ull << 16) /* WP flag, WP of files, WP of unpopulated, MOVE */
#define PRESENT (1ull << 63)
#define OF_FILE (1ull << 61)

struct api { uint64_t api, features, ioctls; };
struct range { uint64_t start, bytes; };
struct registration { struct range range; uint64_t mode, ioctls; };
struct protection { struct range range; uint64_t mode; };
struct move { uint64_t to, from, bytes, mode; int64_t moved; };

const char *const specimen_faults[] = {"none", "early", "trust", "protect", "plain", "fork", "unpinned", "tail", "asleep", NULL};

static const char *fault = "none";
static int uffd = -1, pagemap = -1;
static uint8_t *scratch;
static uint8_t merged[MOST_ARENA]; /* per page: it maps a slot */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int has(const char *name) { return !strcmp(fault, name); }

int specimen_choose(const char *name) {
    for (int index = 0; specimen_faults[index]; index++)
        if (!strcmp(specimen_faults[index], name))
            fault = specimen_faults[index];
    return has(name) ? 0 : -1;
}

static void take(void) { pthread_mutex_lock(&lock); }
static void give(void) { pthread_mutex_unlock(&lock); }

static int specimen_open(char why[PF_TEXT]) {
    struct api api = {0xaa, FEATURES, 0};
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0 || ioctl(uffd, UFFD_API, &api)) {
        snprintf(why, PF_TEXT, "userfaultfd: %s", strerror(errno));
        return -errno;
    }
    pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    scratch = mmap(NULL, MOST_PAGES * PF_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(scratch, MOST_PAGES * PF_PAGE, MADV_NOHUGEPAGE);
    madvise(scratch, MOST_PAGES * PF_PAGE, MADV_DONTFORK);
    struct registration registration = {{(uint64_t)scratch, MOST_PAGES * PF_PAGE}, MISSING, 0};
    if (!has("fork"))
        pthread_atfork(take, give, give);
    return ioctl(uffd, UFFD_REGISTER, &registration) ? -errno : 0;
}

static void specimen_close(void) { close(uffd); }

static int64_t specimen_advise(uint64_t start, uint64_t bytes) {
    return start + bytes > (uint64_t)page_at(MOST_ARENA) ? -EINVAL : 1;
}

static void entries(uint64_t start, uint32_t pages, uint64_t *out) {
    if (pread(pagemap, out, pages * 8, (off_t)(start / PF_PAGE * 8)) != (ssize_t)pages * 8)
        memset(out, 0, pages * 8);
}

static int enlist(uint64_t start, uint64_t bytes, uint64_t mode) {
    struct registration registration = {{start, bytes}, mode, 0};
    return ioctl(uffd, UFFD_REGISTER, &registration);
}

static void wake(struct range range) {
    if (!has("asleep"))
        ioctl(uffd, UFFD_WAKE, &range);
}

static void dismiss(uint64_t start, uint64_t bytes) {
    struct range range = {start, bytes};
    ioctl(uffd, UFFD_UNREGISTER, &range);
    wake(range);
}

static int protect(uint64_t start, uint64_t bytes) {
    struct protection protection = {{start, bytes}, 1};
    return ioctl(uffd, UFFD_PROTECT, &protection);
}

/* Move all pages; 0, or an errno when some could not be moved. Which are where is for pagemap to say. */
static int move(uint64_t to, uint64_t from, uint32_t pages) {
    static uint32_t moves;
    uint64_t there[MOST_PAGES], done = 0;
    for (int attempt = 0; attempt < 20; attempt++) {
        struct move order = {to + done * PF_PAGE, from + done * PF_PAGE, (pages - done) * PF_PAGE, 1, 0};
        int error = ioctl(uffd, UFFD_MOVE, &order) ? errno : 0;
        if (has("trust") && !error && ++moves % 64 == 0)
            return EEXIST;
        if (!error || (error != EAGAIN && error != EEXIST))
            return error;
        entries(to, pages, there);
        for (done = 0; done < pages && there[done] & PRESENT;)
            done++;
        if (done == pages)
            return 0;
    }
    return EBUSY;
}

static void move_back(uint64_t start, uint32_t pages) {
    uint64_t there[MOST_PAGES];
    for (;;) {
        uint32_t left = 0;
        entries((uint64_t)scratch, pages, there);
        for (uint32_t page = 0; page < pages; page++)
            if (there[page] & PRESENT) {
                struct move order = {start + page * PF_PAGE, (uint64_t)scratch + page * PF_PAGE, PF_PAGE, 1, 0};
                ioctl(uffd, UFFD_MOVE, &order);
                left++;
            }
        if (!left)
            return;
    }
}

/* Take the run out of use, and say where its bytes can now be compared; NULL: it cannot be. */
static const uint8_t *shut(uint64_t start, uint32_t pages, int *error) {
    uint64_t bytes = (uint64_t)pages * PF_PAGE;
    if (has("plain"))
        return (const uint8_t *)start;
    if (enlist(start, bytes, has("protect") ? PROTECTED : MISSING)) {
        *error = errno;
        return NULL;
    }
    if (has("protect")) {
        *error = protect(start, bytes) ? errno : 0;
        return *error ? NULL : (const uint8_t *)start;
    }
    *error = move((uint64_t)scratch, start, pages);
    if (has("trust") && *error == EEXIST) {
        madvise(scratch, bytes, MADV_DONTNEED); /* "nothing was moved" */
        return NULL;
    }
    syscall(SYS_munmap, (void *)0x1000, PF_PAGE);
    return *error ? NULL : scratch;
}

static enum pf_status window(uint64_t start, uint32_t pages, const struct pf_target *target) {
    uint64_t bytes = (uint64_t)pages * PF_PAGE, compared = has("tail") ? bytes - PF_PAGE : bytes;
    int error = 0, equal = memcmp((const void *)start, target->bytes, bytes) == 0;
    if (!equal && !has("tail"))
        return PF_DIFFERS;
    const uint8_t *held = shut(start, pages, &error);
    if (held && !has("early"))
        equal = memcmp(held, target->bytes, compared) == 0;
    int how = MAP_PRIVATE | MAP_FIXED, access = PROT_READ | PROT_WRITE;
    if (held && equal && mmap((void *)start, bytes, access, how, target->fd, (off_t)target->offset) != MAP_FAILED) {
        madvise(scratch, MOST_PAGES * PF_PAGE, MADV_DONTNEED);
        wake((struct range){start, bytes});
        memset(merged + (start - (uint64_t)arena.bytes) / PF_PAGE, 1, pages);
        return PF_MERGED;
    }
    if (!has("plain") && !has("protect"))
        move_back(start, pages);
    if (!has("plain"))
        dismiss(start, bytes);
    if (error == EBUSY) /* pinned, or shared by fork: then this helps the next try */
        madvise((void *)start, bytes, 23 /* MADV_POPULATE_WRITE */);
    return error == EBUSY ? PF_PINNED : error ? PF_BUSY : PF_DIFFERS;
}

static void specimen_window(int64_t region, uint64_t start, uint32_t pages, const struct pf_target *target, uint8_t *status) {
    uint32_t first = (uint32_t)((start - (uint64_t)arena.bytes) / PF_PAGE);
    uint64_t there[MOST_PAGES];
    (void)region;
    take();
    entries(start, pages, there);
    for (uint32_t from = 0, to; from < pages; from = to) {
        enum pf_status outcome = merged[first + from] ? PF_BROKEN : there[from] & PRESENT ? PF_BUSY : PF_ABSENT;
        for (to = from + 1; outcome == PF_BUSY && to < pages && !merged[first + to] && there[to] & PRESENT;)
            to++;
        struct pf_target part = *target;
        part.bytes += (uint64_t)from * PF_PAGE;
        part.offset += (uint64_t)from * PF_PAGE;
        if (outcome == PF_BUSY)
            outcome = target->extent ? window(start + (uint64_t)from * PF_PAGE, to - from, &part) : PF_OFF;
        memset(status + from, (int)outcome, to - from);
    }
    give();
}

/* Whether something runs that pins pages, so that a page written since its merge must stay until the end. */
static int someone_pins(void) {
    static const char *const kinds[] = {"uring", "direct", "vm", "remote", "uringwrite", "directwrite", "vmread"};
    int any = 0;
    for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++)
        any |= options_kind(kinds[kind]);
    return any && !atomic_load(&merger_finish);
}

/* Copy a merged page and put the copy in its place while writers wait. 1: refused. */
static int restore(uint64_t start) {
    uint64_t there;
    if (enlist(start, PF_PAGE, PROTECTED) || protect(start, PF_PAGE))
        return 1;
    entries(start, 1, &there);
    int broken = there & PRESENT && !(there & OF_FILE);
    if (broken && !has("unpinned") && someone_pins()) {
        struct protection off = {{start, PF_PAGE}, 0};
        ioctl(uffd, UFFD_PROTECT, &off);
        dismiss(start, PF_PAGE);
        return 1;
    }
    uint8_t *copy = mmap(NULL, PF_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(copy, (const void *)start, PF_PAGE);
    mremap(copy, PF_PAGE, PF_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)start);
    wake((struct range){start, PF_PAGE});
    merged[(start - (uint64_t)arena.bytes) / PF_PAGE] = 0;
    return 0;
}

static int64_t specimen_restore(uint64_t start, uint64_t pages) {
    uint64_t first = (start - (uint64_t)arena.bytes) / PF_PAGE;
    int64_t refused = 0;
    take();
    for (uint64_t page = 0; page < pages; page++)
        if (merged[first + page])
            refused += restore(start + page * PF_PAGE);
    give();
    return refused;
}

static int64_t specimen_unadvise(int64_t region, uint64_t start, uint64_t pages) {
    (void)region;
    return specimen_restore(start, pages);
}

const struct door door_specimen = {"specimen",        specimen_open,   specimen_close,   specimen_advise,
                                   specimen_unadvise, specimen_window, specimen_restore, NULL};
