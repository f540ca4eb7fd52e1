/* Own the embedded store. */
#define _GNU_SOURCE
#include "chunks.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"
#include "fault.h"
#include "kernel.h"
#include "link.h"
#include "regions.h"

#define CHUNK_BYTES ((size_t)PF_CHUNK_PAGES * PF_PAGE)
#define NOEXEC_SEAL 8u /* MFD_NOEXEC_SEAL, Linux 6.3 */

/* By place in the family's table; `number` says whether it is still the chunk it was. */
static struct here {
    uint32_t number; /* 0: not open here */
    int fd;
    uint8_t *bytes; /* read-only, shared; not there in forked children */
    bool looked;    /* at some of it, since pf_chunks_drop */
    bool used;          /* after pf_chunks_mark: pages here map it */
} chunks[PF_CHUNKS];
static int32_t me = -1; /* our place among the members */

static uint32_t extent_of(uint32_t number) {
    return PF_LINK_EXTENTS + number; /* the numbers above the link's */
}

static bool alive(const struct pf_member *member) {
    return member->process > 0 && (kill(member->process, 0) == 0 || errno != ESRCH);
}

/* Our own entry among the members; those of processes that ended are taken over. */
static struct pf_member *member(struct pf_family *family) {
    if (me >= 0 && family->members[me].process == getpid())
        return &family->members[me];
    for (uint32_t i = 0; i < PF_MEMBERS; i++) {
        struct pf_member *at = &family->members[i];
        if (at->process == getpid() || !alive(at)) {
            me = (int32_t)i;
            for (uint32_t c = 0; c < PF_CHUNKS; c++)
                at->fd[c] = -1;
            at->thread = gettid();
            at->process = getpid();
            return at;
        }
    }
    return NULL;
}

static void shut(uint32_t place) {
    struct here *here = &chunks[place];
    if (here->number == 0)
        return;
    munmap(here->bytes, CHUNK_BYTES);
    close(here->fd);
    *here = (struct here){.fd = -1};
}

/* Keep a descriptor as the chunk at this place; closes it and returns false if it cannot be mapped. */
static bool keep(struct pf_family *family, uint32_t place, uint32_t number, int fd) {
    struct pf_member *mine = member(family);
    void *at = mine ? mmap(NULL, CHUNK_BYTES, PROT_READ, MAP_SHARED, fd, 0) : MAP_FAILED;
    if (at == MAP_FAILED) {
        close(fd);
        return false;
    }
    madvise(at, CHUNK_BYTES, MADV_DONTFORK);
    madvise(at, CHUNK_BYTES, MADV_DONTDUMP);
    chunks[place] = (struct here){.number = number, .fd = fd, .bytes = at};
    mine->fd[place] = fd;
    return true;
}

static bool same_file(int fd, const struct pf_chunk *chunk) {
    struct stat about;
    return fstat(fd, &about) == 0 && about.st_dev == chunk->device && about.st_ino == chunk->inode;
}

/* Open a chunk of the family that is not open here; true if it is then. One that no living process has is struck off. */
static bool open_place(struct pf_family *family, uint32_t place) {
    struct pf_chunk *chunk = &family->chunks[place];
    bool held = false;
    if (chunks[place].number == chunk->number)
        return chunk->number != 0;
    shut(place);
    for (uint32_t i = 0; chunk->number && i < PF_MEMBERS; i++) {
        struct pf_member *other = &family->members[i];
        if (other->process == 0 || other->process == getpid() || other->fd[place] < 0 || !alive(other))
            continue;
        held = true;
        char path[80];
        snprintf(path, sizeof path, "/proc/%d/task/%d/fd/%d", other->process, other->thread, other->fd[place]);
        int fd = open(path, O_RDWR | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
        if (fd < 0)
            continue;
        if (same_file(fd, chunk))
            return keep(family, place, chunk->number, fd);
        close(fd);
    }
    if (!held)
        chunk->number = 0;
    return false;
}

static uint32_t place_of(const struct pf_family *family, uint32_t number) {
    for (uint32_t place = 0; number && place < PF_CHUNKS; place++)
        if (family->chunks[place].number == number)
            return place;
    return PF_CHUNKS;
}

bool pf_chunk_usable(struct pf_family *family, uint32_t number) {
    uint32_t place = place_of(family, number);
    return place < PF_CHUNKS && open_place(family, place);
}

/* Make a new chunk; its place, or PF_CHUNKS. */
static uint32_t make_chunk(struct pf_family *family) {
    for (uint32_t place = 0; place < PF_CHUNKS; place++) {
        struct pf_chunk *chunk = &family->chunks[place];
        if (chunk->number)
            continue;
        shut(place);
        int fd = memfd_create("pagefold-embedded", MFD_CLOEXEC | MFD_ALLOW_SEALING | NOEXEC_SEAL);
        if (fd < 0 && errno == EINVAL)
            fd = memfd_create("pagefold-embedded", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        struct stat about;
        if (fd < 0)
            return PF_CHUNKS;
        /* Its size is sealed, so no window can end in SIGBUS; it is written through descriptors, page by page, once. */
        if (ftruncate(fd, (off_t)CHUNK_BYTES) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) ||
            fstat(fd, &about) || family->numbers >= PF_LINK_EXTENTS) {
            close(fd);
            return PF_CHUNKS;
        }
        uint32_t number = family->numbers + 1;
        if (!keep(family, place, number, fd))
            return PF_CHUNKS;
        family->numbers = number;
        *chunk = (struct pf_chunk){number, 0, about.st_dev, about.st_ino};
        return place;
    }
    return PF_CHUNKS;
}

uint32_t pf_chunk_write(struct pf_family *family, const uint8_t *bytes, uint32_t count, uint32_t *number,
                        uint32_t *slot) {
    uint32_t place = family->open;
    if (place >= PF_CHUNKS || family->chunks[place].used >= PF_CHUNK_PAGES || !open_place(family, place)) {
        place = make_chunk(family);
        family->open = place;
        if (place >= PF_CHUNKS)
            return 0;
    }
    struct pf_chunk *chunk = &family->chunks[place];
    uint32_t first = chunk->used;
    if (count > PF_CHUNK_PAGES - first)
        count = PF_CHUNK_PAGES - first;
    /* Given out before they are written: if we die in between, nobody will ever look at them. */
    chunk->used = first + count;
    PF_FAULT(PF_FAULT_STORE, 2);
    uint32_t done = 0;
    while (done < count * PF_PAGE) {
        ssize_t wrote = pwrite(chunks[place].fd, bytes + done, count * PF_PAGE - done,
                               (off_t)first * PF_PAGE + (off_t)done);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote <= 0)
            break; /* no memory */
        done += (uint32_t)wrote;
    }
    *number = chunk->number;
    *slot = first;
    PF_FAULT(PF_FAULT_STORE, 3);
    return done / PF_PAGE;
}

struct pf_target pf_chunk_target(uint32_t number, uint32_t slot, uint32_t count) {
    for (uint32_t place = 0; place < PF_CHUNKS; place++) {
        struct here *here = &chunks[place];
        if (here->number != number)
            continue;
        here->looked = true;
        const uint8_t *at = here->bytes + (size_t)slot * PF_PAGE;
        madvise((void *)at, (size_t)count * PF_PAGE, PF_MADV_POPULATE_READ); /* before the window rather than in it */
        return (struct pf_target){extent_of(number), slot, here->fd, at, (uint64_t)slot * PF_PAGE};
    }
    return (struct pf_target){.extent = 0, .fd = -1};
}

void pf_chunks_drop(void) {
    for (uint32_t place = 0; place < PF_CHUNKS; place++) {
        struct here *here = &chunks[place];
        if (here->number && here->looked) /* all of it: the kernel also mapped the neighbours of what we looked at */
            madvise(here->bytes, CHUNK_BYTES, MADV_DONTNEED);
        here->looked = false;
    }
}

/* In pieces: W must not be held for long. */
void pf_chunks_mark(void) {
    static uint64_t where[1024];
    struct pf_region region = {.id = 0};
    for (uint32_t place = 0; place < PF_CHUNKS; place++)
        chunks[place].used = false;
    while (pf_region_next(region.id, &region))
        for (uint64_t first = 0; first < region.pages; first += 1024) {
            uint64_t count = region.pages - first < 1024 ? region.pages - first : 1024;
            if (pf_region_where(region.id, first, count, where))
                break; /* it went */
            for (uint64_t i = 0; i < count; i++) {
                uint32_t extent = PF_WHERE_EXTENT(where[i]);
                for (uint32_t place = 0; extent > PF_LINK_EXTENTS && place < PF_CHUNKS; place++)
                    if (chunks[place].number && extent_of(chunks[place].number) == extent) {
                        chunks[place].used = true;
                        break;
                    }
            }
        }
}

/* Strike a chunk off that no living process has open: what it holds goes when its last mapping goes. */
static void strike(struct pf_family *family, uint32_t place) {
    for (uint32_t i = 0; i < PF_MEMBERS; i++) {
        const struct pf_member *at = &family->members[i];
        if (at->process && at->fd[place] >= 0 && alive(at))
            return;
    }
    family->chunks[place].number = 0;
}

void pf_chunks_collect(struct pf_family *family) {
    for (uint32_t place = 0; place < PF_CHUNKS; place++) {
        if (chunks[place].number == 0 || chunks[place].used)
            continue;
        bool current = family->chunks[place].number == chunks[place].number;
        shut(place);
        if (me >= 0)
            family->members[me].fd[place] = -1;
        if (current)
            strike(family, place);
    }
}

void pf_chunks_shut(void) {
    for (uint32_t place = 0; place < PF_CHUNKS; place++)
        shut(place);
}

void pf_chunks_leave(struct pf_family *family) {
    if (me >= 0)
        family->members[me].process = 0;
    me = -1;
    for (uint32_t place = 0; place < PF_CHUNKS; place++)
        if (family->chunks[place].number)
            strike(family, place);
}

bool pf_chunks_any(void) {
    for (uint32_t place = 0; place < PF_CHUNKS; place++)
        if (chunks[place].number)
            return true;
    return false;
}

void pf_chunks_child(void) {
    for (uint32_t place = 0; place < PF_CHUNKS; place++)
        chunks[place] = (struct here){.fd = -1};
    me = -1;
}
