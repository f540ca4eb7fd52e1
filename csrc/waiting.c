/* Own who waits for the daemon. */
#define _GNU_SOURCE
#include "waiting.h"

#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <string.h>

#include "command.h"
#include "link.h"
#include "regions.h"

#define MOST_AT_A_TIME 32u /* that the daemon is asked for */

struct waiter {
    int64_t region;
    uint64_t token;
    struct pf_report *report;
    int error;
    enum { ASKED, SENT, ANSWERED } phase;
    struct waiter *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of all below; held for a few instructions (and W in it) */
static pthread_cond_t changed;
static enum pf_link_phase phase = PF_LINK_NONE;
static struct waiter *waiters;
static uint64_t tokens;
static int64_t plain_region; /* a plain swap in it is under way */

__attribute__((constructor)) static void make_condition(void) {
    pf_condition_init(&changed);
}

void pf_waiting_phase(enum pf_link_phase now) {
    pthread_mutex_lock(&lock);
    phase = now;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

enum pf_link_phase pf_waiting_phase_now(void) {
    pthread_mutex_lock(&lock);
    enum pf_link_phase now = phase;
    pthread_mutex_unlock(&lock);
    return now;
}

bool pf_link_connected(void) {
    return pf_waiting_phase_now() == PF_LINK_UP;
}

void pf_waiting_lost(enum pf_link_phase next) {
    pthread_mutex_lock(&lock);
    phase = next;
    for (struct waiter *at = waiters; at; at = at->next)
        if (at->phase != ANSWERED) {
            at->error = -ENOTCONN;
            at->phase = ANSWERED;
        }
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

bool pf_waiting_next(bool (*known)(int64_t region), uint64_t *token, int64_t *region) {
    struct pf_region about;
    bool found = false;
    uint32_t sent = 0;
    pthread_mutex_lock(&lock);
    for (struct waiter *at = waiters; at; at = at->next)
        sent += at->phase == SENT;
    for (struct waiter *at = waiters; at && !found && sent < MOST_AT_A_TIME; at = at->next) {
        if (at->phase != ASKED)
            continue;
        found = known(at->region); /* a search in memory, no lock */
        if (found) {
            at->phase = SENT;
            *token = at->token;
            *region = at->region;
        } else if (!pf_region_get(at->region, &about) || about.closing) {
            at->phase = ANSWERED;
            at->error = -ENOENT;
            pthread_cond_broadcast(&changed);
        } /* else the daemon is told of it soon, and who tells it asks here again */
    }
    pthread_mutex_unlock(&lock);
    return found;
}

void pf_waiting_answer(const struct pf_synced *synced) {
    pthread_mutex_lock(&lock);
    for (struct waiter *at = waiters; at; at = at->next)
        if (at->token == synced->token && at->phase == SENT) {
            at->error = synced->error;
            at->report->pages = synced->pages;
            memcpy(at->report->by_status, synced->by_status, sizeof synced->by_status);
            at->report->zero_pages = synced->zero_pages;
            at->report->saved_bytes = synced->saved_bytes;
            at->phase = ANSWERED;
        }
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

bool pf_waiting_begin_plain(int64_t region) {
    bool promised = false;
    pthread_mutex_lock(&lock);
    for (struct waiter *at = waiters; at; at = at->next)
        promised |= at->region == region && at->phase == SENT;
    if (promised)
        plain_region = region;
    pthread_mutex_unlock(&lock);
    return promised;
}

void pf_waiting_end_plain(void) {
    pthread_mutex_lock(&lock);
    plain_region = 0;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

int pf_link_merge(int64_t region, uint64_t timeout_ms, struct pf_report *report) {
    struct timespec until = pf_deadline(timeout_ms);
    struct waiter mine = {.region = region, .report = report, .error = -ENOTCONN, .phase = ASKED};
    int state; /* `mine` lies on this stack: the caller must not be cancelled while it waits */
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
    pthread_mutex_lock(&lock);
    int late = 0;
    while (phase == PF_LINK_CONNECTING && !late)
        late = pthread_cond_timedwait(&changed, &lock, &until);
    if (phase == PF_LINK_UP) {
        mine.token = ++tokens;
        mine.next = waiters;
        waiters = &mine;
        pthread_mutex_unlock(&lock);
        pf_command_ring(PF_BELL_LINK);
        pthread_mutex_lock(&lock);
        while (mine.phase != ANSWERED && !late)
            late = pthread_cond_timedwait(&changed, &lock, &until);
        if (mine.phase != ANSWERED)
            mine.error = -ETIMEDOUT;
        for (struct waiter **at = &waiters; *at; at = &(*at)->next)
            if (*at == &mine) {
                *at = mine.next;
                break;
            }
        while (plain_region == region)
            pthread_cond_wait(&changed, &lock);
    } else if (phase == PF_LINK_CONNECTING) {
        mine.error = -ETIMEDOUT;
    }
    pthread_mutex_unlock(&lock);
    pthread_setcancelstate(state, NULL);
    return mine.error;
}

void pf_waiting_child(void) {
    pthread_mutex_init(&lock, NULL);
    make_condition();
    phase = PF_LINK_NONE;
    waiters = NULL;
    plain_region = 0;
}
