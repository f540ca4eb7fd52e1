/* Own the agent's public face: what Python (through ctypes) and the test programs call.
 *
 * Addresses and sizes are bytes in 64 bits, always whole pages of 4096 unless said. Functions return 0 or more for
 * success, a negative errno for failure, and never set errno for the caller to read. All may be called from any thread.
 */
#ifndef PF_AGENT_H
#define PF_AGENT_H

#include <stddef.h>
#include <stdint.h>

#define PF_PAGE 4096u
#define PF_RUN_PAGES 64u     /* most pages of one window: a writer waits some 60 us for that many */
#define PF_BATCH_RUNS 64u    /* most runs of one WINDOWS message */
#define PF_BATCH_PAGES 4096u /* most pages of one WINDOWS message: PF_BATCH_RUNS x PF_RUN_PAGES */
#define PF_TEXT 160u

/* What became of a page in a window; the same numbers travel in messages and stand in reports. */
enum pf_status {
    PF_MERGED = 0,       /* it maps the slot now (or, in a zero run, nothing: it reads as zeros) */
    PF_ALREADY = 1,      /* it mapped that slot before */
    PF_DIFFERS = 2,      /* its bytes are not the slot's */
    PF_PINNED = 3,       /* EBUSY, also after MADV_POPULATE_WRITE: a device or io_uring may write to it */
    PF_SHARED = 4,       /* shared by fork and could not be made exclusive */
    PF_UNMANAGED = 5,    /* not inside a region that is advised now */
    PF_NO_VMA = 6,       /* the limit on mappings (vm.max_map_count) or no memory for one */
    PF_UNSUITABLE = 7,   /* the mapping cannot be swapped: shared, file, locked, special, foreign userfaultfd */
    PF_BROKEN = 8,       /* merged before, written since: a private page in a file mapping */
    PF_ABSENT = 9,       /* nothing is there (never touched, discarded or swapped out) */
    PF_BUSY = 10,        /* bounded retries used up */
    PF_OFF = 11,         /* no window is possible here: see pf_state.why */
    PF_BAD = 12,         /* the request is nonsense: unknown extent, slot out of range, too long */
    PF_UNKNOWN = 13,     /* reports of pf_merge only: no equal page is known elsewhere */
    PF_STATUSES = 16
};

/* The agent's own view; counters since the library was loaded (in a forked child: since the fork). */
struct pf_state {
    uint32_t size;         /* sizeof, set by the caller */
    uint32_t started;      /* 1: the agent's threads run */
    uint32_t connected;    /* 1: a daemon answers */
    uint32_t windows_safe; /* 1: userfaultfd windows work here and passed the self-test */
    int32_t why_errno;     /* if not: the errno behind `why` */
    uint32_t regions;
    uint64_t region_pages;
    uint64_t windows;      /* windows run */
    uint64_t by_status[PF_STATUSES]; /* pages, by what became of them */
    uint64_t restored;     /* pages made private and anonymous again */
    uint64_t remapped;     /* pages moved from one slot to another */
    uint64_t forks;
    char why[PF_TEXT];     /* why windows are not safe and what would allow them, one line; empty if they are */
};

/* What a synchronous merge found. */
struct pf_report {
    uint32_t size;
    uint32_t through_daemon;          /* 0: the embedded store */
    uint64_t pages;                   /* looked at */
    uint64_t by_status[PF_STATUSES];  /* of those */
    uint64_t zero_pages;              /* of PF_MERGED: became holes */
    uint64_t saved_bytes;             /* memory that this call gave back */
};

#pragma GCC visibility push(default) /* the only names that the library exports */

/* Start the agent: its threads, its own file table, its self-test. `socket_path` NULL or "": no daemon, embedded only.
 * Calling it again with another path moves to that daemon; regions stay. In a forked child: call again. */
int pf_start(const char *socket_path);
/* End the threads and the connection; memory stays as it is. */
int pf_stop(void);
int pf_get_state(struct pf_state *state);

/* Let [start, start+bytes) be managed from now on; returns a region's number (> 0). The memory must stay mapped, private,
 * anonymous, until pf_unadvise or pf_forget. Memory of pf_array_malloc becomes a region as it would by itself, now: -EEXIST.
 * -EINVAL not whole pages, -EEXIST overlaps a region, -ENOMEM,
 * -EOPNOTSUPP the mapping cannot be merged (shared, file, special ...). With `quietly` != 0 only pf_merge touches it: no background. */
int64_t pf_advise(uint64_t start, uint64_t bytes, uint32_t quietly);
/* The same, but whether the mapping can be merged is found out later, for all such regions at once: by pf_suits, before the
 * daemon hears of it, or at the first pf_merge. Until then nothing touches it. Costs some 30 us, pf_advise what the reading of
 * /proc/self/smaps takes. */
int64_t pf_advise_unseen(uint64_t start, uint64_t bytes, uint32_t quietly);
/* 0: the region's mapping can be merged; or the error that pf_advise would have given. After -EOPNOTSUPP and -ENOMEM it stays
 * a region that nothing touches, until it is ended; other errors pass: ask again. -ENOENT. */
int pf_suits(int64_t region);
/* The region that holds `address`, its first address and bytes; -ENOENT. */
int64_t pf_find(uint64_t address, uint64_t *start, uint64_t *bytes);
/* End that, and give every merged page back as private anonymous memory; threads may write meanwhile. Returns the number of
 * pages that could not be given back (pinned: they stay private, correct, in a file mapping), or a negative errno: of all of
 * these functions -ESRCH means that the agent is not started, -ECHILD that this process was made by a bare clone(2). */
int64_t pf_unadvise(int64_t region);
/* The same where windows are not safe (pf_state): the caller promises that nothing writes to the region during the call. With
 * pf_unadvise its merged pages then stay in a file mapping, private and correct, and are counted in the answer. */
int64_t pf_unadvise_plainly(int64_t region);
/* End that without touching the memory: its owner unmaps it next. Returns only when no window is in it. */
int pf_forget(int64_t region);
/* End that for memory whose content nobody wants any more, but which stays mapped (it goes back to malloc): merged pages become
 * fresh ones. At once, from any thread. Returns the number of pages that could not be replaced, or a negative errno. */
int64_t pf_discard(int64_t region);
/* Merge the region's pages now, with what is known to be equal elsewhere; waits. Where windows are not safe the pages are
 * swapped plainly: the caller promises that nobody writes to them during the call. timeout_ms bounds the wait for a daemon. */
int pf_merge(int64_t region, uint64_t timeout_ms, struct pf_report *report);

/* NEP 49: the functions of a NumPy memory handler (ctx unused). Blocks of PF_ARRAY bytes and more are page-aligned
 * and become regions of their own once they have lived a while. */
#define PF_ARRAY 65536u
void *pf_array_malloc(void *ctx, size_t size);
void *pf_array_calloc(void *ctx, size_t count, size_t size);
void *pf_array_realloc(void *ctx, void *pointer, size_t size);
void pf_array_free(void *ctx, void *pointer, size_t size);

/* sizeof and offsetof of every message and struct, as text "name size field:offset ...\n"; the test compares it with Python. */
const char *pf_layout(void);

#pragma GCC visibility pop

#endif
