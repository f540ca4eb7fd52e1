/* Own the public face of the agent (agent.h), and how its parts meet: the command thread, the kit, the link, the embedded
 * store, forks. Must not know the protocol, userfaultfd, or how pages are found equal.
 *
 * Locks, from the outside in: start_lock (command.c), then `kit_lock`, then the small ones of each part, then W
 * (regions.h). None is held while a caller waits for a job.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "announce.h"
#include "array.h"
#include "command.h"
#include "embedded.h"
#include "fault.h"
#include "kernel.h"
#include "link.h"
#include "look.h"
#include "regions.h"
#include "window.h"

static pthread_mutex_t kit_lock = PTHREAD_MUTEX_INITIALIZER; /* of the two below, and while the kit is opened */
static int32_t kit_errno;
static char kit_why[PF_TEXT];

/* --- the kit ------------------------------------------------------------------------------------------------------ */

/* Regions that were advised while there was no kit (or another one) are tracked from now on. */
static void track_all(void) {
    struct pf_region region = {.id = 0};
    while (pf_region_next(region.id, &region))
        if (!region.closing && !region.suits && !region.tracked)
            pf_track(region.start, region.pages * PF_PAGE);
}

void pf_agent_open_kit(int device) {
    char why[PF_TEXT] = "";
    pthread_mutex_lock(&kit_lock);
    if (!pf_kit_ready()) {
        int error = pf_kit_open(device, why);
        kit_errno = error == -EALREADY ? 0 : error;
        memcpy(kit_why, why, sizeof kit_why);
        kit_why[sizeof kit_why - 1] = 0;
        if (pf_kit_ready()) {
            kit_why[0] = 0;
            track_all();
        }
    }
    pthread_mutex_unlock(&kit_lock);
}

void pf_agent_kit(uint32_t *windows_safe, int32_t *why_errno, char why[PF_TEXT]) {
    pthread_mutex_lock(&kit_lock);
    *windows_safe = pf_kit_ready();
    *why_errno = *windows_safe ? 0 : kit_errno;
    memcpy(why, kit_why, PF_TEXT);
    if (*windows_safe)
        memset(why, 0, PF_TEXT);
    pthread_mutex_unlock(&kit_lock);
}

/* --- regions that end late ---------------------------------------------------------------------------------------- */

/* Memory that was discarded is still registered for tracking, and only the command thread can end that; until then its
 * region stays, closed. The thread does so before it adds a region, so memory that was given back and is advised again is
 * neither found taken nor loses its tracking. If there are more than fit, the rest stays registered, which only costs
 * mappings. */
#define NOTES 256u
static pthread_mutex_t notes_lock = PTHREAD_MUTEX_INITIALIZER;
static int64_t notes[NOTES];
static uint32_t note_count;

static bool note(int64_t region) {
    pthread_mutex_lock(&notes_lock);
    bool room = note_count < NOTES;
    if (room)
        notes[note_count++] = region;
    pthread_mutex_unlock(&notes_lock);
    return room;
}

static void end_noted(void) {
    int64_t taken[NOTES];
    struct pf_region region;
    pthread_mutex_lock(&notes_lock);
    uint32_t count = note_count;
    memcpy(taken, notes, count * sizeof *notes);
    note_count = 0;
    pthread_mutex_unlock(&notes_lock);
    for (uint32_t i = 0; i < count; i++)
        if (pf_region_get(taken[i], &region)) {
            pf_untrack(region.start, region.pages * PF_PAGE);
            pf_region_remove(taken[i]);
        }
}

/* --- the command thread ------------------------------------------------------------------------------------------- */

static void opened(void) {
    pf_agent_open_kit(-1);
    if (pf_array_any())
        pf_command_ring(PF_BELL_ARRAYS);
}

static void closing(void) {
    pf_link_stop();
    pf_embedded_close();
    pf_kit_close();
}

static void ring(uint32_t bells) {
    if (bells & PF_BELL_LINK)
        pf_link_kick();
    if (bells & PF_BELL_TRACK)
        end_noted();
    if (bells & PF_BELL_STORE)
        pf_embedded_collect();
}

const struct pf_callbacks pf_callbacks = {opened, closing, ring, pf_array_tick};

static int64_t do_go(struct pf_job *job) {
    return pf_link_go(job->text);
}

int64_t pf_agent_advise(uint64_t start, uint64_t bytes, uint32_t quietly, uint32_t vma) {
    end_noted();
    int64_t region = pf_region_add(start, bytes, quietly, vma);
    if (region > 0) {
        if (vma != PF_VMA_UNSEEN)
            pf_track(start, bytes);
        pf_link_kick();
    }
    return region;
}

static int64_t do_advise(struct pf_job *job) {
    end_noted(); /* what we still track of earlier does not look suitable */
    pf_array_grow_up(job->start);
    int suits = pf_suitable(job->start, job->bytes, NULL);
    if (suits < 0)
        /* Memory that is advised already does not look suitable once it is merged: that is the better answer then. */
        return pf_region_overlaps(job->start, job->bytes) ? -EEXIST : suits;
    return pf_agent_advise(job->start, job->bytes, job->quietly, (uint32_t)suits);
}

static int64_t do_advise_unseen(struct pf_job *job) {
    pf_array_grow_up(job->start);
    return pf_agent_advise(job->start, job->bytes, job->quietly, PF_VMA_UNSEEN);
}

static int64_t do_look(struct pf_job *job) {
    end_noted();
    return pf_look_at(job->region);
}

static int64_t do_unadvise(struct pf_job *job) {
    struct pf_region region;
    if (!pf_region_get(job->region, &region) || region.closing || pf_region_close(job->region))
        return -ENOENT;
    pf_announce_gone(job->region);
    pf_link_kick();
    int64_t left = pf_restore(region.start, region.pages, job->quietly);
    pf_untrack(region.start, region.pages * PF_PAGE);
    pf_region_remove(job->region);
    pf_embedded_collect();
    return left;
}

static int64_t do_merge(struct pf_job *job) {
    return pf_embedded_merge(job->region, job->out);
}

/* --- forks ---------------------------------------------------------------------------------------------------------- */

static pid_t home; /* the process whose threads these are */

static void after_fork_in_child(void) {
    home = getpid();
    pthread_mutex_init(&kit_lock, NULL);
    kit_errno = 0;
    kit_why[0] = 0;
    pthread_mutex_init(&notes_lock, NULL);
    pf_command_child();
    pf_link_child();
    pf_look_child();
    pf_embedded_child();
    pf_array_after_fork(true);
}

static void after_fork_in_parent(void) {
    pf_array_after_fork(false);
}

__attribute__((constructor)) static void watch_forks(void) {
    home = getpid();
    pthread_atfork(pf_array_before_fork, after_fork_in_parent, after_fork_in_child);
}

/* False in a child that was made without the C library (raw clone): it shares our memory as it was at some moment, locks
 * and all, and has no thread; nothing can be asked of it. */
static bool at_home(void) {
    return getpid() == home;
}

/* --- the public face --------------------------------------------------------------------------------------------------- */

int pf_start(const char *socket_path) {
    struct pf_job job = {.run = do_go, .text = socket_path ? socket_path : "", .brief = true};
    if (!at_home())
        return -ECHILD;
    if (strlen(job.text) >= PF_LINK_PATH)
        return -ENAMETOOLONG;
    int error = pf_command_start();
    return error ? error : (int)pf_command_run(&job);
}

int pf_stop(void) {
    return at_home() ? pf_command_stop() : -ECHILD;
}

int pf_get_state(struct pf_state *state) {
    struct pf_counts counts;
    if (state->size != sizeof *state)
        return -EINVAL;
    if (!at_home())
        return -ECHILD;
    memset(state, 0, sizeof *state);
    state->size = sizeof *state;
    state->started = pf_command_started();
    state->connected = pf_link_connected();
    pf_agent_kit(&state->windows_safe, &state->why_errno, state->why);
    pf_region_totals(&state->regions, &state->region_pages);
    pf_window_counts(&counts);
    state->windows = counts.windows;
    memcpy(state->by_status, counts.by_status, sizeof state->by_status);
    state->restored = counts.restored;
    state->remapped = counts.remapped;
    state->forks = counts.forks;
    return 0;
}

static int64_t advise(struct pf_job *job) {
    if (job->start % PF_PAGE || job->bytes % PF_PAGE || job->bytes == 0 || job->start + job->bytes < job->start)
        return -EINVAL;
    return at_home() ? pf_command_run(job) : -ECHILD;
}

int64_t pf_advise(uint64_t start, uint64_t bytes, uint32_t quietly) {
    struct pf_job job = {.run = do_advise, .start = start, .bytes = bytes, .quietly = quietly != 0, .brief = true};
    return advise(&job);
}

int64_t pf_advise_unseen(uint64_t start, uint64_t bytes, uint32_t quietly) {
    struct pf_job job = {.run = do_advise_unseen, .start = start, .bytes = bytes, .quietly = quietly != 0, .brief = true};
    return advise(&job);
}

int pf_suits(int64_t region) {
    struct pf_job job = {.run = do_look, .region = region, .brief = true};
    struct pf_region about;
    if (!at_home())
        return -ECHILD;
    if (!pf_region_get(region, &about))
        return -ENOENT;
    return about.suits != PF_UNSEEN ? about.suits : (int)pf_command_run(&job);
}

int64_t pf_unadvise(int64_t region) {
    struct pf_job job = {.run = do_unadvise, .region = region, .brief = true};
    return at_home() ? pf_command_run(&job) : -ECHILD;
}

int64_t pf_unadvise_plainly(int64_t region) {
    struct pf_job job = {.run = do_unadvise, .region = region, .quietly = 1, .brief = true};
    return at_home() ? pf_command_run(&job) : -ECHILD;
}

int pf_forget(int64_t region) {
    if (!at_home())
        return -ECHILD;
    if (pf_region_abandon(region))
        return -ENOENT;
    /* From here on no window is in it, and nothing is given back there. */
    pf_announce_gone(region);
    int error = pf_region_remove(region);
    pf_command_ring(PF_BELL_LINK | PF_BELL_STORE);
    return error;
}

int64_t pf_find(uint64_t address, uint64_t *start, uint64_t *bytes) {
    struct pf_region region;
    if (!at_home())
        return -ECHILD;
    if (!pf_region_at(address, &region) || region.closing)
        return -ENOENT;
    *start = region.start;
    *bytes = region.pages * PF_PAGE;
    return region.id;
}

/* Put fresh memory, of the same kind as the rest, in the place of pages. */
static bool refresh(uint64_t start, uint64_t bytes, uint32_t vma) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | (vma & PF_VMA_NORESERVE ? MAP_NORESERVE : 0);
    if (mmap((void *)start, bytes, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED)
        return false;
    if (vma & PF_VMA_HUGEPAGE)
        madvise((void *)start, bytes, MADV_HUGEPAGE);
    if (vma & PF_VMA_NOHUGEPAGE)
        madvise((void *)start, bytes, MADV_NOHUGEPAGE);
    return true;
}

int64_t pf_discard(int64_t id) {
    struct pf_region region;
    uint64_t where[512];
    int64_t left = 0;
    if (!at_home())
        return -ECHILD;
    if (pf_region_abandon(id) || !pf_region_get(id, &region))
        return -ENOENT;
    pf_announce_gone(id);
    for (uint64_t first = 0; first < region.pages; first += 512) {
        uint64_t count = region.pages - first < 512 ? region.pages - first : 512;
        if (pf_region_where(id, first, count, where))
            break;
        for (uint64_t i = 0, n; i < count; i += n) {
            for (n = 1; i + n < count && !where[i + n] == !where[i]; n++)
                ;
            uint64_t start = region.start + (first + i) * PF_PAGE;
            if (where[i] && !refresh(start, n * PF_PAGE, region.vma)) {
                madvise((void *)start, n * PF_PAGE, PF_MADV_POPULATE_WRITE); /* at least independent of the store */
                left += (int64_t)n;
            }
        }
    }
    if (!region.tracked || !note(id))
        pf_region_remove(id);
    pf_command_ring(PF_BELL_LINK | PF_BELL_STORE | PF_BELL_TRACK);
    return left;
}

int pf_merge(int64_t region, uint64_t timeout_ms, struct pf_report *report) {
    struct pf_job job = {.run = do_merge, .region = region, .out = report};
    struct pf_region about;
    if (report->size != sizeof *report)
        return -EINVAL;
    memset(report, 0, sizeof *report);
    report->size = sizeof *report;
    if (!at_home())
        return -ECHILD;
    if (!pf_command_started())
        return -ESRCH;
    if (!pf_region_get(region, &about) || about.closing)
        return -ENOENT;
    int error = pf_suits(region);
    if (error)
        return error;
    error = pf_link_merge(region, timeout_ms, report);
    if (error != -ENOTCONN) {
        report->through_daemon = 1;
        return error;
    }
    memset(report, 0, sizeof *report);
    report->size = sizeof *report;
    return (int)pf_command_run(&job);
}

#ifdef PF_FAULTS
/* Of test builds: another plan than the environment's, in a process that has loaded the library already. */
__attribute__((visibility("default"))) void pf_set_fault(const char *plan);
void pf_set_fault(const char *plan) {
    setenv("PAGEFOLD_FAULT", plan, 1);
    pf_fault_plan.read = 0;
    pf_fault_read();
}
#endif
