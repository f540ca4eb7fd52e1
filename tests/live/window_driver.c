/* Own what Python cannot do to windows: threads that write by every way there is while pages are swapped, limits, faults.
 * One command per run; exit status 0 means that every byte was right; what was seen goes to standard output as JSON.
 *
 * Memory under test is REGION_PAGES pages. A page has 8 sectors of 512 bytes; each writer owns one sector of every page,
 * checks it before it writes, and keeps what must be there in tables of its own.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
#include "regions.h"
#include "window.h"

#define REGION_PAGES 1024u
#define SECTOR 512u
#define SECTORS 8u
#define SLOTS 8192u

static uint8_t *memory;                       /* the region */
static int64_t region;
static int store;                             /* memfd of the slots */
static uint8_t *slots;                        /* the same, writable here */
static uint32_t slots_used;
static uint64_t statuses[PF_STATUSES];
static atomic_uint bad;                       /* wrong bytes seen, or calls that failed */
static atomic_bool ended;
static _Atomic uint64_t versions[REGION_PAGES][SECTORS];
static atomic_ulong writes[SECTORS], forks, moment;
static pthread_mutex_t children = PTHREAD_MUTEX_INITIALIZER; /* held while a child lives */
/* A fork copies one page after the other while threads run on: nobody writes then, or tables and memory would not agree. */
static pthread_rwlock_t writing = PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;

static void fail(const char *what) {
    atomic_fetch_add(&bad, 1);
    fprintf(stderr, "%s (errno %d)\n", what, errno);
}

static void need(bool condition, const char *what) {
    if (condition)
        return;
    fail(what);
    exit(1);
}

static uint64_t mix(uint64_t x) {
    x = (x ^ x >> 31) * 0x7fb5d329728ea185ull;
    x = (x ^ x >> 27) * 0x81dadef4bc2dd44dull;
    return x ^ x >> 33;
}

static uint64_t chance(uint64_t *state) {
    return mix(*state += 0x9e3779b97f4a7c15ull);
}

/* Word `at` of a sector that was written as often as `version` says; never written: zeros, so that whole pages are. */
static uint64_t word(uint32_t page, uint32_t sector, uint64_t version, uint32_t at) {
    return version ? mix(version << 24 ^ page << 4 ^ sector) + at : 0;
}

static void fill_sector(uint64_t *words, uint32_t page, uint32_t sector, uint64_t version) {
    for (uint32_t i = 0; i < SECTOR / 8; i++)
        words[i] = word(page, sector, version, i);
}

static uint64_t *sector_at(uint32_t page, uint32_t sector) {
    return (uint64_t *)(memory + page * PF_PAGE + sector * SECTOR);
}

static bool sector_right(uint32_t page, uint32_t sector, uint64_t version) {
    const volatile uint64_t *words = sector_at(page, sector);
    for (uint32_t i = 0; i < SECTOR / 8; i++)
        if (words[i] != word(page, sector, version, i))
            return false;
    return true;
}

/* Only while nobody writes. */
static bool all_right(void) {
    for (uint32_t page = 0; page < REGION_PAGES; page++)
        for (uint32_t sector = 0; sector < SECTORS; sector++)
            if (!sector_right(page, sector, versions[page][sector]))
                return false;
    return true;
}

static void make_region(void) {
    char why[PF_TEXT];
    store = memfd_create("slots", MFD_CLOEXEC);
    need(store >= 0 && !ftruncate(store, (off_t)SLOTS * PF_PAGE), "memfd");
    slots = mmap(NULL, (size_t)SLOTS * PF_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, store, 0);
    memory = mmap(NULL, REGION_PAGES * PF_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    need(slots != MAP_FAILED && memory != MAP_FAILED, "mmap");
    madvise(memory, REGION_PAGES * PF_PAGE, MADV_NOHUGEPAGE);
    need(!pf_kit_open(-1, why), why);
    region = pf_region_add((uint64_t)(uintptr_t)memory, REGION_PAGES * PF_PAGE, 0, PF_VMA_NOHUGEPAGE);
    need(region > 0 && pf_track((uint64_t)(uintptr_t)memory, REGION_PAGES * PF_PAGE) == 1, "region");
}

static uint64_t at(uint32_t page) {
    return (uint64_t)(uintptr_t)memory + (uint64_t)page * PF_PAGE;
}

/* Copy pages to fresh slots, as a daemon would, racing with writers; then swap them. */
static void merge(uint32_t page, uint32_t pages, uint8_t *status) {
    struct pf_target target = {.extent = 1, .slot = slots_used, .fd = store,
                               .bytes = slots + (size_t)slots_used * PF_PAGE, .offset = (uint64_t)slots_used * PF_PAGE};
    bool zero = true;
    need(slots_used + pages <= SLOTS, "slots");
    for (uint32_t i = 0; i < pages * SECTORS; i++)
        zero &= !versions[page + i / SECTORS][i % SECTORS];
    if (zero) {
        target = (struct pf_target){.extent = 0};
    } else {
        memcpy(slots + (size_t)slots_used * PF_PAGE, memory + (size_t)page * PF_PAGE, (size_t)pages * PF_PAGE);
        slots_used += pages;
    }
    pf_window(region, at(page), pages, &target, 0, status);
    for (uint32_t i = 0; i < pages; i++)
        statuses[status[i]]++;
}

/* --- writers ------------------------------------------------------------------------------------------------------ */

struct writer {
    pthread_t thread;
    char kind;
    uint32_t sector;
    uint64_t seed;
    const char *path;
    int pipe[2], file, mem, ring;
    uint8_t *block; /* aligned, for direct I/O */
    struct io_uring_sqe *entries;
    uint8_t *rings;
    struct io_uring_params parameters;
    uint32_t pinned; /* first page of the registered ones */
};
enum { PINNED_PAGES = 8 };

static void open_writer(struct writer *writer) {
    char path[4096];
    writer->block = mmap(NULL, PF_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    need(!pipe(writer->pipe), "pipe");
    writer->mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
    snprintf(path, sizeof path, "%s.%c%u", writer->path, writer->kind, writer->sector);
    writer->file = open(path, O_RDWR | O_CREAT | O_CLOEXEC | (writer->kind == 'd' ? O_DIRECT : 0), 0600);
    need(writer->mem >= 0 && writer->file >= 0 && writer->block != MAP_FAILED, "files of a writer");
    need(!ftruncate(writer->file, PF_PAGE), "ftruncate");
    if (writer->kind != 'u')
        return;
    writer->ring = (int)syscall(__NR_io_uring_setup, 4, &writer->parameters);
    need(writer->ring >= 0, "io_uring");
    writer->rings = mmap(NULL, PF_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, writer->ring, IORING_OFF_SQ_RING);
    writer->entries = mmap(NULL, PF_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, writer->ring, IORING_OFF_SQES);
    need(writer->rings != MAP_FAILED && writer->entries != MAP_FAILED, "rings");
}

static void pin(struct writer *writer, uint32_t page, uint32_t pages) {
    struct iovec buffer = {memory + (size_t)page * PF_PAGE, (size_t)pages * PF_PAGE};
    need(!syscall(__NR_io_uring_register, writer->ring, IORING_REGISTER_BUFFERS, &buffer, 1), "register buffers");
    writer->pinned = page;
}

static void unpin(struct writer *writer) {
    need(!syscall(__NR_io_uring_register, writer->ring, IORING_UNREGISTER_BUFFERS, NULL, 0), "unregister buffers");
}

/* Let the device (the file) write to pinned memory. */
static bool read_fixed(struct writer *writer, void *to, uint32_t bytes) {
    const struct io_sqring_offsets *sq = &writer->parameters.sq_off;
    const struct io_cqring_offsets *cq = &writer->parameters.cq_off;
    uint32_t *tail = (uint32_t *)(writer->rings + sq->tail), *array = (uint32_t *)(writer->rings + sq->array);
    uint32_t *head = (uint32_t *)(writer->rings + cq->head);
    const uint32_t entry = *tail & *(uint32_t *)(writer->rings + sq->ring_mask);
    const uint32_t answer = *head & *(uint32_t *)(writer->rings + cq->ring_mask);
    writer->entries[entry] = (struct io_uring_sqe){.opcode = IORING_OP_READ_FIXED, .fd = writer->file, .len = bytes,
                                                   .addr = (uint64_t)(uintptr_t)to};
    array[entry] = entry;
    __atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
    if (syscall(__NR_io_uring_enter, writer->ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) != 1)
        return false;
    const struct io_uring_cqe *answers = (const struct io_uring_cqe *)(writer->rings + cq->cqes);
    bool right = answers[answer].res == (int32_t)bytes;
    __atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
    return right;
}

static bool write_sector(struct writer *writer, void *to, const void *from) {
    struct iovec local = {(void *)from, SECTOR}, remote = {to, SECTOR};
    switch (writer->kind) {
    case 'c':
        for (uint32_t i = 0; i < SECTOR / 8; i++)
            ((volatile uint64_t *)to)[i] = ((const uint64_t *)from)[i];
        return true;
    case 'r':
        return write(writer->pipe[1], from, SECTOR) == SECTOR && read(writer->pipe[0], to, SECTOR) == SECTOR;
    case 'd':
        memcpy(writer->block, from, SECTOR);
        return pwrite(writer->file, writer->block, SECTOR, 0) == SECTOR && pread(writer->file, to, SECTOR, 0) == SECTOR;
    case 'u':
        return pwrite(writer->file, from, SECTOR, 0) == SECTOR && read_fixed(writer, to, SECTOR);
    case 'm': /* documented: EIO for a page in a window, try again */
        while (pwrite(writer->mem, from, SECTOR, (off_t)(uintptr_t)to) != SECTOR)
            if (errno != EIO)
                return false;
        return true;
    case 'v':
        return process_vm_writev(getpid(), &local, 1, &remote, 1, 0) == SECTOR;
    }
    return false;
}

static void *write_on(void *argument) {
    struct writer *writer = argument;
    uint64_t words[SECTOR / 8], turn = 0;
    if (writer->kind == 'u')
        pin(writer, 0, PINNED_PAGES);
    while (!atomic_load(&ended)) {
        uint32_t page = chance(&writer->seed) % REGION_PAGES;
        if (turn++ % 2) /* near the window */
            page = (uint32_t)(atomic_load(&moment) + page % 32) % REGION_PAGES;
        if (writer->kind == 'u') {
            if (turn % 64 == 0) {
                unpin(writer);
                pin(writer, page % (REGION_PAGES - PINNED_PAGES), PINNED_PAGES);
            }
            page = writer->pinned + page % PINNED_PAGES;
        }
        const uint64_t version = atomic_load(&versions[page][writer->sector]);
        if (!sector_right(page, writer->sector, version))
            fail("a writer found its sector wrong");
        pthread_rwlock_rdlock(&writing);
        atomic_store(&versions[page][writer->sector], turn % 4 ? version + turn : 0);
        fill_sector(words, page, writer->sector, versions[page][writer->sector]);
        if (!write_sector(writer, sector_at(page, writer->sector), words))
            fail("a write failed");
        if (!sector_right(page, writer->sector, versions[page][writer->sector]))
            fail("a write was lost");
        pthread_rwlock_unlock(&writing);
        atomic_fetch_add(&writes[writer->sector], 1);
        if (turn % 16 == 0)
            usleep(50); /* two cores: let the windows run */
    }
    if (writer->kind == 'u')
        unpin(writer);
    return NULL;
}

static void *fork_on(void *unused) {
    (void)unused;
    while (!atomic_load(&ended)) {
        pthread_mutex_lock(&children);
        pthread_rwlock_wrlock(&writing);
        pid_t child = fork();
        if (!child)
            _exit(!all_right());
        pthread_rwlock_unlock(&writing);
        int status = 0;
        if (child < 0 || waitpid(child, &status, 0) != child || status)
            fail("a child saw wrong bytes");
        pthread_mutex_unlock(&children);
        atomic_fetch_add(&forks, 1);
        usleep(2000);
    }
    return NULL;
}

static void restore_all(void) {
    if (pf_restore(at(0), REGION_PAGES, 0) < 0)
        fail("restore");
    slots_used = 0; /* what could not be given back is private too */
}

static int stress(const char *kinds, uint64_t wanted, const char *path) {
    struct writer writers[SECTORS] = {{0}};
    uint64_t seed = 42, restored = 0;
    uint8_t status[PF_WINDOW_PAGES];
    uint32_t count = 0;
    pthread_t forker;
    make_region();
    for (; *kinds && *kinds != 'f'; kinds++, count++) {
        need(count < SECTORS, "kinds");
        writers[count] = (struct writer){.kind = *kinds, .sector = count, .seed = count, .path = path};
        open_writer(&writers[count]);
    }
    for (uint32_t i = 0; i < count; i++)
        pthread_create(&writers[i].thread, NULL, write_on, &writers[i]);
    const bool forking = *kinds == 'f';
    if (forking)
        pthread_create(&forker, NULL, fork_on, NULL);
    /* Not only so many windows: every writer must have had its share of the time. */
    bool busy = true;
    for (uint64_t i = 0; (i < wanted || busy) && !bad; i++) {
        uint32_t pages = 1 + chance(&seed) % (i % 8 ? 16 : 64), page = chance(&seed) % (REGION_PAGES - pages);
        atomic_store(&moment, page);
        if (slots_used + pages > SLOTS) {
            pthread_mutex_lock(&children);
            restore_all();
            pthread_mutex_unlock(&children);
            restored++;
        }
        merge(page, pages, status);
        if (i % 4 == 0)
            pf_restore(at(0), REGION_PAGES, 0);
        else if (i % 4 == 1)
            pf_restore(at(page), pages, 0);
        busy = forking && forks < wanted / 1000;
        for (uint32_t w = 0; w < count; w++)
            busy |= writes[w] < wanted / 100;
    }
    atomic_store(&ended, true);
    for (uint32_t i = 0; i < count; i++)
        pthread_join(writers[i].thread, NULL);
    if (forking)
        pthread_join(forker, NULL);
    restore_all();
    if (!all_right())
        fail("the end is wrong");
    struct pf_counts counts;
    pf_window_counts(&counts);
    printf("{\"windows\": %lu, \"restored\": %lu, \"remapped\": %lu, \"forks\": %lu, \"full\": %lu, \"statuses\": [",
           counts.windows, counts.restored, counts.remapped, (unsigned long)forks, restored);
    for (int i = 0; i < PF_STATUSES; i++)
        printf("%s%lu", i ? ", " : "", statuses[i]);
    printf("], \"writes\": [");
    for (uint32_t i = 0; i < count; i++)
        printf("%s%lu", i ? ", " : "", (unsigned long)writes[i]);
    printf("]}\n");
    return bad != 0;
}

/* --- faults ------------------------------------------------------------------------------------------------------- */

static void set_pages(uint32_t page, uint32_t pages, uint64_t version) {
    for (uint32_t i = page; i < page + pages; i++)
        for (uint32_t sector = 0; sector < SECTORS; sector++) {
            versions[i][sector] = version;
            fill_sector(sector_at(i, sector), i, sector, version);
        }
}

/* Touches pages and changes nothing; runs into windows. Pages 0 to 23 stay unwritten: merged, they stay unbroken. */
static void *rewrite_on(void *unused) {
    (void)unused;
    for (uint32_t page = 24; !atomic_load(&ended); page = page < 127 ? page + 1 : 24) {
        _Atomic uint64_t *word = (_Atomic uint64_t *)sector_at(page, 0);
        atomic_fetch_add(word, 0);
        atomic_fetch_add(&writes[0], page == 127);
    }
    return NULL;
}

/* A forked twin checks its memory when this process has ended, however: it inherits standard output and says so. */
static void start_twin(void) {
    int ends[2];
    char byte;
    need(!pipe(ends), "pipe");
    fflush(NULL);
    pid_t twin = fork();
    need(twin >= 0, "fork");
    if (twin) {
        close(ends[0]);
        return;
    }
    close(ends[1]);
    while (read(ends[0], &byte, 1) < 0)
        ;
    bool right = all_right();
    for (uint32_t page = 0; page < REGION_PAGES; page++) /* and it is its own */
        sector_at(page, 0)[0]++;
    dprintf(1, right ? "twin right\n" : "twin wrong\n");
    _exit(0);
}

/* Go once through every step of one kind: the environment says where it ends or stops. */
static int steps(const char *kind) {
    uint8_t status[PF_WINDOW_PAGES];
    pthread_t writer;
    make_region();
    set_pages(0, 96, 1); /* the rest is never touched; 64 to 95 become zeros */
    set_pages(64, 32, 0);
    if (strcmp(kind, "window")) {
        merge(0, 64, status);
        need(!memcmp(status, (uint8_t[64]){PF_MERGED}, 64), "merged first");
    }
    if (!strcmp(kind, "restore"))
        set_pages(8, 3, 2); /* broken */
    start_twin();
    pthread_create(&writer, NULL, rewrite_on, NULL);
    while (!atomic_load(&writes[0])) /* once round */
        ;
    if (!strcmp(kind, "window")) {
        merge(0, 16, status);
        merge(16, 16, status);
        const uint32_t slot = 200; /* not in use */
        struct pf_target other = {.extent = 1, .slot = slot, .fd = store, .bytes = slots + slot * PF_PAGE,
                                  .offset = slot * PF_PAGE};
        memcpy(slots + slot * PF_PAGE, memory + 32 * PF_PAGE, 16 * PF_PAGE);
        slots[(slot + 5) * PF_PAGE] ^= 1;
        pf_window(region, at(32), 16, &other, 0, status);
        need(status[4] == PF_MERGED && status[5] == PF_DIFFERS && status[6] == PF_MERGED, "one differs");
        merge(64, 32, status);
    } else if (!strcmp(kind, "remap")) {
        merge(0, 64, status);
        need(status[0] == PF_MERGED && status[40] == PF_BROKEN, "another slot");
    } else {
        restore_all();
    }
    atomic_store(&ended, true);
    pthread_join(writer, NULL);
    return !all_right() || bad;
}

/* --- limits and adversities --------------------------------------------------------------------------------------- */

/* Fill up with mappings until none is left, then leave `room`. */
static uint8_t *fill_mappings(uint32_t room, uint32_t *count) {
    const uint32_t most = 200000;
    uint8_t *pages = mmap(NULL, (size_t)most * PF_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    need(pages != MAP_FAILED, "mmap");
    for (*count = 1; *count < most; *count += 2)
        if (mprotect(pages + (size_t)*count * PF_PAGE, PF_PAGE, PROT_READ))
            break;
    need(*count < most, "vm.max_map_count is too high for this test");
    for (; room > 1; room -= 2, *count -= 2) /* each takes two mappings away */
        mprotect(pages + (size_t)(*count - 2) * PF_PAGE, PF_PAGE, PROT_NONE);
    return pages;
}

static void empty_mappings(uint8_t *pages) {
    munmap(pages, (size_t)200000 * PF_PAGE);
}

/* No registration may be left that makes somebody wait: then touching an absent page would hang. */
static void touch_all(void) {
    for (uint32_t page = 0; page < REGION_PAGES; page++)
        atomic_fetch_add((_Atomic uint64_t *)sector_at(page, 7), 0);
}

static int limit(void) {
    uint8_t status[PF_WINDOW_PAGES];
    uint64_t refused = 0, kept = 0;
    make_region();
    static const uint32_t rooms[] = {0, 2, 4, 6, 8, 12, 20};
    for (uint32_t turn = 0; turn < sizeof rooms / sizeof *rooms; turn++) {
        const uint32_t room = rooms[turn];
        uint32_t count;
        set_pages(0, 128, room + 1);
        merge(3, 1, status); /* isolated, while there is room; a run to be changed; one to be given back */
        merge(40, 8, status);
        merge(60, 8, status);
        need(status[0] == PF_MERGED, "merged");
        set_pages(62, 1, room + 2);
        uint8_t *filled = fill_mappings(room, &count);
        merge(20, 1, status);
        refused += status[0] == PF_NO_VMA;
        merge(24, 4, status);
        refused += status[0] == PF_NO_VMA;
        merge(42, 3, status); /* to another slot, in the middle of a mapping */
        refused += status[0] == PF_NO_VMA;
        if (!all_right())
            fail("wrong after merging at the limit");
        kept += (uint64_t)pf_restore(at(0), REGION_PAGES, 0);
        if (!all_right())
            fail("wrong after restoring at the limit");
        touch_all();
        empty_mappings(filled);
        if (pf_restore(at(0), REGION_PAGES, 0))
            fail("not all was given back when there was room again");
        touch_all();
        if (!all_right())
            fail("wrong at the end");
    }
    printf("{\"refused\": %lu, \"kept\": %lu}\n", refused, kept);
    return bad != 0;
}

struct scan_arguments {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

/* What a daemon does from outside: ask for written pages and protect them again. It leaves markers in holes. */
static void *scan_on(void *unused) {
    uint64_t found[3 * 64];
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    (void)unused;
    while (!atomic_load(&ended)) {
        struct scan_arguments scan = {.size = sizeof scan, .flags = 1, .start = at(0), .end = at(REGION_PAGES),
                                      .vec = (uint64_t)(uintptr_t)found, .vec_len = 64, .category_mask = 2,
                                      .return_mask = 2};
        if (ioctl(pagemap, _IOWR('f', 16, struct scan_arguments), &scan) < 0)
            fail("scan");
        atomic_fetch_add(&writes[0], 1);
    }
    close(pagemap);
    return NULL;
}

static int scanned(uint64_t wanted) {
    uint8_t status[PF_WINDOW_PAGES];
    pthread_t scanner;
    uint64_t differing = 0;
    make_region();
    set_pages(0, REGION_PAGES / 2, 1);
    pthread_create(&scanner, NULL, scan_on, NULL);
    for (uint64_t i = 0; (i < wanted || writes[0] < wanted / 10) && !bad; i++) {
        const uint32_t page = (uint32_t)(i * 16 % (REGION_PAGES / 2 - 16));
        struct pf_target other = {.extent = 1, .slot = 0, .fd = store, .bytes = slots};
        pf_window(region, at(page), 16, &other, 0, status); /* all pages go there and back */
        for (int k = 0; k < 16; k++)
            differing += status[k] == PF_DIFFERS;
        if (i % 64 == 0 && !all_right())
            fail("wrong bytes");
    }
    atomic_store(&ended, true);
    pthread_join(scanner, NULL);
    printf("{\"differing\": %lu, \"scans\": %lu}\n", differing, (unsigned long)writes[0]);
    return !all_right() || bad;
}

/* A buffer that a device writes to, as a private page, and as a page written after it was merged. */
static int pinned(const char *path) {
    struct writer writer = {.kind = 'u', .path = path};
    uint8_t status[PF_WINDOW_PAGES];
    uint64_t words[SECTOR / 8];
    make_region();
    open_writer(&writer);
    set_pages(0, 64, 1);
    pin(&writer, 8, 1);
    merge(0, 16, status);
    need(status[8] == PF_PINNED && status[7] == PF_MERGED && status[9] == PF_MERGED, "a pinned page among others");
    fill_sector(words, 8, 3, 2);
    need(pwrite(writer.file, words, SECTOR, 0) == SECTOR && read_fixed(&writer, sector_at(8, 3), SECTOR), "read");
    versions[8][3] = 2;
    need(all_right(), "a write through a pin was lost by a window");
    unpin(&writer);

    merge(32, 16, status);
    need(!memcmp(status, (uint8_t[16]){PF_MERGED}, 16), "merged");
    set_pages(34, 2, 2);  /* broken, not pinned */
    pin(&writer, 40, 2);  /* pinning breaks them */
    const int64_t kept = pf_restore(at(0), REGION_PAGES, 0);
    need(kept == 2, "two pages stay");
    fill_sector(words, 41, 5, 7);
    need(pwrite(writer.file, words, SECTOR, 0) == SECTOR && read_fixed(&writer, sector_at(41, 5), SECTOR), "read");
    versions[41][5] = 7;
    need(all_right(), "a write through a pin was lost by restore");
    unpin(&writer);
    need(pf_restore(at(0), REGION_PAGES, 0) == 0, "nothing stays when the pin is gone");
    need(all_right(), "restored");
    printf("{\"kept\": %ld}\n", (long)kept);
    return bad != 0;
}

/* mlockall fills every hole of the process, also ours. */
static int locked(int flags) {
    uint8_t status[PF_WINDOW_PAGES];
    uint64_t off = 0;
    make_region();
    set_pages(0, 512, 1);
    for (uint32_t page = 0; page < 256; page += 16)
        merge(page, 16, status);
    need(!mlockall(flags), "mlockall");
    for (uint32_t page = 0; page < 512; page += 16) {
        merge(page, 16, status);
        off += status[0] != PF_MERGED && status[0] != PF_ALREADY;
    }
    need(all_right(), "merged beside mlockall");
    for (int i = 0; i < 200; i++) { /* until scratch would be used a second time */
        merge(256 + (uint32_t)i % 128, 16, status);
        need(all_right(), "merged after mlockall");
    }
    const int64_t kept = pf_restore(at(0), REGION_PAGES, 0);
    need(all_right(), "restored after mlockall");
    printf("{\"off\": %lu, \"kept\": %ld, \"unsuitable\": %lu}\n", off, (long)kept, statuses[PF_UNSUITABLE]);
    return bad != 0;
}

int main(int count, char **words) {
    const char *command = count > 1 ? words[1] : "";
    const char *first = count > 2 ? words[2] : "";
    if (!strcmp(command, "stress") && count == 5)
        return stress(first, strtoull(words[3], NULL, 10), words[4]);
    if (!strcmp(command, "steps"))
        return steps(first);
    if (!strcmp(command, "limit"))
        return limit();
    if (!strcmp(command, "scanned"))
        return scanned(strtoull(first, NULL, 10));
    if (!strcmp(command, "pinned"))
        return pinned(first);
    if (!strcmp(command, "locked"))
        return locked(atoi(first));
    return 2;
}
