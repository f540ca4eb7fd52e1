/* Own the test of what windows and restore stand on, made on two pages of our own before the first real one. Must not know
 * regions or slots.
 *
 *  1. MOVE moves a page and back, and its bytes stay.
 *  2. MOVE refuses a page that is pinned: by an io_uring fixed buffer, or, where io_uring is not permitted, by a
 *     process_vm_readv that waits for its destination.
 *  3. MOVE refuses a page that a forked process shares.
 *  4. After a fork pagemap tells a pinned page (copied for the child, still exclusive here) from others (shared).
 *  5. Write protection holds on a private page of a file mapping, and pagemap tells that page from the file's.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
#include "kernel.h"
#include "kit.h"

enum { PINNED, FREE, HOLE, STACK, PAGES = STACK + 4 };

struct pin {
    int ring; /* io_uring, or -1 */
    int reader; /* pid, or -1 */
    pid_t parent;
    uint8_t *pages;
};

/* struct io_uring_params, of which nothing but the size matters here: 120 bytes. */
static int ring_pin(uint8_t *page) {
    uint32_t parameters[30] = {0};
    struct iovec buffer = {page, PF_PAGE};
    if (!pf_call_allowed(__NR_io_uring_setup) || !pf_call_allowed(__NR_io_uring_register))
        return -EPERM;
    long ring = syscall(__NR_io_uring_setup, 1u, parameters);
    if (ring < 0)
        return -errno;
    if (syscall(__NR_io_uring_register, (int)ring, 0u /* IORING_REGISTER_BUFFERS */, &buffer, 1u) < 0) {
        int error = -errno;
        close((int)ring);
        return error;
    }
    return (int)ring;
}

/* Reads our own page with its pin held, into a page that is missing. In a process of its own that shares our memory, and ends
 * with us: to make a thread takes the C library's locks and its heap, which whoever holds W leaves alone. */
static int read_own(void *argument) {
    const struct pin *pin = argument;
    struct iovec to = {pin->pages + HOLE * PF_PAGE, PF_PAGE}, from = {pin->pages + PINNED * PF_PAGE, PF_PAGE};
    if (!prctl(PR_SET_PDEATHSIG, SIGKILL) && getppid() == pin->parent)
        syscall(__NR_process_vm_readv, getpid(), &to, 1ul, &from, 1ul, 0ul);
    return 0;
}

static void end_reading(struct pin *pin) {
    const uint64_t hole = (uint64_t)(uintptr_t)(pin->pages + HOLE * PF_PAGE);
    pf_uffd_unregister(pf_kit.track, hole, PF_PAGE); /* and wake: the page of zeros serves the read */
    while (waitpid(pin->reader, NULL, __WALL) < 0 && errno == EINTR)
        ;
    pin->reader = -1;
}

static int start_reading(struct pin *pin) {
    const uint64_t hole = (uint64_t)(uintptr_t)(pin->pages + HOLE * PF_PAGE);
    uint64_t message[4]; /* struct uffd_msg: 32 bytes */
    struct pollfd fault = {.fd = pf_kit.track, .events = POLLIN};
    if (!pf_call_allowed(__NR_process_vm_readv))
        return -EPERM;
    if (pf_uffd_register(pf_kit.track, hole, PF_PAGE, PF_UFFD_MISSING))
        return -EAGAIN;
    pin->parent = getpid();
    pin->reader = clone(read_own, pin->pages + PAGES * PF_PAGE, CLONE_VM | CLONE_FILES, pin); /* no exit signal */
    if (pin->reader < 0)
        return -EAGAIN;
    /* Its fault is the proof that the other page is pinned now. Without that it was refused and has ended. */
    if (poll(&fault, 1, 2000) == 1 && read(pf_kit.track, message, sizeof message) == sizeof message)
        return 0;
    end_reading(pin);
    return -EPERM;
}

static int start_pin(struct pin *pin, uint8_t *pages) {
    *pin = (struct pin){.ring = ring_pin(pages + PINNED * PF_PAGE), .reader = -1, .pages = pages};
    return pin->ring >= 0 ? 0 : start_reading(pin);
}

static void end_pin(struct pin *pin) {
    if (pin->ring >= 0)
        close(pin->ring);
    if (pin->reader >= 0)
        end_reading(pin);
}

static uint64_t address(const uint8_t *pages, int page) {
    return (uint64_t)(uintptr_t)(pages + page * PF_PAGE);
}

/* Try to move a page to scratch; true if it went, and then it is back. */
static bool moves(const uint8_t *pages, int page) {
    const uint64_t scratch = (uint64_t)(uintptr_t)pf_kit.scratch;
    uint64_t entry = 0;
    for (int i = 0; i < 8 && pf_uffd_move(pf_kit.track, scratch, address(pages, page), PF_PAGE) == -EAGAIN; i++)
        ;
    pf_pagemap_read(pf_kit.pagemap, scratch, 1, &entry);
    pf_kit_put_back(pf_kit.track, address(pages, page), scratch, 1);
    return entry & PF_PM_PRESENT;
}

static bool exclusive(const uint8_t *pages, int page) {
    uint64_t entry = 0;
    return !pf_pagemap_read(pf_kit.pagemap, address(pages, page), 1, &entry) && entry & PF_PM_PRESENT &&
           entry & PF_PM_EXCLUSIVE;
}

static const char *try_forked(const uint8_t *pages) {
    struct pf_twin twin;
    const char *wrong = NULL;
    if (pf_twin_start(&twin))
        return "no child process could be made";
    if (moves(pages, FREE))
        wrong = "a page shared with a child was moved";
    else if (!exclusive(pages, PINNED) || exclusive(pages, FREE))
        wrong = "after a fork pagemap does not tell pinned pages";
    pf_twin_end(&twin);
    return wrong;
}

static const char *try_pages(uint8_t *pages) {
    struct pin pin;
    memset(pages, 0x5a, 2 * PF_PAGE);
    if (pf_uffd_register(pf_kit.track, address(pages, 0), 2 * PF_PAGE, PF_UFFD_MISSING))
        return "memory could not be registered";
    if (!moves(pages, PINNED) || !moves(pages, FREE))
        return "a page could not be moved";
    if (memcmp(pages, pages + PF_PAGE, PF_PAGE) || pages[0] != 0x5a)
        return "a moved page lost its bytes";
    if (start_pin(&pin, pages))
        return "no page can be pinned: io_uring and process_vm_readv are not permitted";
    const char *wrong = moves(pages, PINNED) ? "a pinned page was moved" : try_forked(pages);
    end_pin(&pin);
    return wrong;
}

/* A page of a file mapping, first the file's, then private. */
static const char *try_held(void) {
    const char *wrong = NULL;
    uint64_t entry = 0;
    int file = memfd_create("pagefold-selftest", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, PF_PAGE)) {
        if (file >= 0)
            close(file);
        return "no memfd could be made";
    }
    uint8_t *page = mmap(NULL, PF_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    close(file);
    if (page == MAP_FAILED)
        return "no memfd could be mapped";
    if (madvise(page, PF_PAGE, PF_MADV_POPULATE_READ) || pf_uffd_register(pf_kit.hold, address(page, 0), PF_PAGE, PF_UFFD_WP) ||
        pf_uffd_protect(pf_kit.hold, address(page, 0), PF_PAGE, true) ||
        pf_pagemap_read(pf_kit.pagemap, address(page, 0), 1, &entry) || !(entry & PF_PM_PRESENT) ||
        !(entry & PF_PM_FILE) || !(entry & PF_PM_UFFD_WP))
        wrong = "a merged page could not be held";
    pf_uffd_unregister(pf_kit.hold, address(page, 0), PF_PAGE);
    *(volatile uint8_t *)page = 1;
    if (!wrong && (pf_pagemap_read(pf_kit.pagemap, address(page, 0), 1, &entry) || entry & PF_PM_FILE))
        wrong = "pagemap does not tell private pages of a file mapping";
    munmap(page, PF_PAGE);
    return wrong;
}

int pf_selftest(char why[PF_TEXT]) {
    uint8_t *pages = mmap(NULL, PAGES * PF_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) {
        pf_text(why, "no memory for the self-test");
        return -ENOMEM;
    }
    madvise(pages, PAGES * PF_PAGE, MADV_NOHUGEPAGE);
    munlock(pages, PAGES * PF_PAGE);
    madvise(pages, PAGES * PF_PAGE, MADV_DONTNEED);
    const char *wrong = try_pages(pages);
    if (!wrong)
        wrong = try_held();
    munmap(pages, PAGES * PF_PAGE);
    if (!wrong)
        return 0;
    pf_text(why, "the self-test of windows failed: %s", wrong);
    return -EOPNOTSUPP;
}
