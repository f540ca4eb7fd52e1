/* Own the thread "pagefold": its start, its private file table, its queue of jobs, its end. */
#define _GNU_SOURCE
#include "command.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define STACK_BYTES (512u << 10) /* beside what the C library needs; only what is touched counts */
#define GUARD_BYTES 4096u
#define TICK_MS 1000u
#define CLOSE_RANGE_UNSHARE_FLAG 2u

static pthread_mutex_t start_lock = PTHREAD_MUTEX_INITIALIZER; /* one start or stop at a time */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;       /* of all below; held for a few instructions */
static pthread_cond_t wanted;   /* the thread waits here */
static pthread_cond_t answered; /* callers wait here */
static struct pf_job *first, **last = &first;
static enum { OFF, STARTING, ON, STOPPING } phase = OFF;
static int start_error;
static pthread_t thread;
static void *thread_stack;
static atomic_uint bells; /* set without the lock: ringing is cheap while nobody listens yet */
static uint64_t tick_at;  /* 0: no tick wanted */

uint64_t pf_now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

struct timespec pf_deadline(uint64_t ms) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    if (ms > (uint64_t)1 << 40) /* some 35 years: for ever */
        ms = (uint64_t)1 << 40;
    at.tv_sec += (time_t)(ms / 1000);
    at.tv_nsec += (long)(ms % 1000) * 1000000;
    if (at.tv_nsec >= 1000000000) {
        at.tv_nsec -= 1000000000;
        at.tv_sec++;
    }
    return at;
}

void pf_condition_init(pthread_cond_t *condition) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
}

__attribute__((constructor)) static void make_conditions(void) {
    pf_condition_init(&wanted);
    pf_condition_init(&answered);
}

int pf_thread_start(pthread_t *made, void **stack, void *(*body)(void *)) {
    long least = sysconf(_SC_THREAD_STACK_MIN); /* with the thread-local storage of all libraries that are loaded */
    size_t bytes = STACK_BYTES + (((size_t)(least > 0 ? least : 0) + 4095) & ~(size_t)4095);
    /* The stack is kept and used again, in a forked child too: the C library's list of threads leads through it. */
    static size_t kept_bytes;
    if (kept_bytes == 0)
        kept_bytes = bytes;
    bytes = kept_bytes;
    if (*stack == NULL) {
        char *at = mmap(NULL, bytes + GUARD_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED)
            return -errno;
        if (mprotect(at + GUARD_BYTES, bytes, PROT_READ | PROT_WRITE)) {
            int error = -errno;
            munmap(at, bytes + GUARD_BYTES);
            return error;
        }
        *stack = at + GUARD_BYTES;
    }
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    int error = pthread_attr_setstack(&attributes, *stack, bytes);
    sigset_t all, before;
    sigfillset(&all); /* pthread_sigmask leaves the C library's own two signals out of it */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (error == 0)
        error = pthread_create(made, &attributes, body, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return -error;
}

/* Leave the program's file table. The first way copies nothing that it then has to close (closing a copy may block: some
 * file systems flush), and is allowed in containers where unshare(2) is not. */
static int own_file_table(void) {
    if (syscall(SYS_close_range, 0, ~0u, CLOSE_RANGE_UNSHARE_FLAG)) {
        if (errno != ENOSYS && errno != EPERM && errno != EINVAL)
            return -errno;
        if (unshare(CLONE_FILES))
            return -errno;
        if (syscall(SYS_close_range, 0, ~0u, 0))
            for (int fd = 0, most = (int)sysconf(_SC_OPEN_MAX); fd < most && fd < 1 << 20; fd++)
                close(fd);
    }
    /* What a library writes to "stderr" from this thread must not land in a socket that got the number 2. */
    for (int fd = 0; fd < 3; fd++) {
        int null = open("/dev/null", O_RDWR | O_CLOEXEC);
        if (null >= 3) {
            close(null);
            break;
        }
    }
    return 0;
}

static struct pf_job *take_job(bool brief_only) {
    for (struct pf_job **at = &first; *at; at = &(*at)->next) {
        struct pf_job *job = *at;
        if (brief_only && !job->brief)
            continue;
        *at = job->next;
        if (last == &job->next)
            last = at;
        return job;
    }
    return NULL;
}

/* Called with the lock, returns with it. */
static void do_job(struct pf_job *job) {
    pthread_mutex_unlock(&lock);
    int64_t result = job->run(job);
    pthread_mutex_lock(&lock);
    job->result = result;
    job->done = true; /* from here on the job is the caller's again */
    pthread_cond_broadcast(&answered);
}

static void answer_bells(void) {
    uint32_t rung = atomic_exchange(&bells, 0);
    if (rung == 0)
        return;
    if (rung & PF_BELL_ARRAYS && tick_at == 0)
        tick_at = pf_now_ms() + TICK_MS;
    pthread_mutex_unlock(&lock);
    pf_callbacks.ring(rung);
    pthread_mutex_lock(&lock);
}

static void tick(void) {
    if (tick_at == 0 || pf_now_ms() < tick_at)
        return;
    pthread_mutex_unlock(&lock);
    bool again = pf_callbacks.tick();
    pthread_mutex_lock(&lock);
    tick_at = again ? pf_now_ms() + TICK_MS : 0;
}

bool pf_command_breathe(void) {
    pthread_mutex_lock(&lock);
    answer_bells();
    for (struct pf_job *job; phase != STOPPING && (job = take_job(true));)
        do_job(job);
    bool on = phase != STOPPING;
    pthread_mutex_unlock(&lock);
    return on;
}

static void *command_main(void *nothing) {
    (void)nothing;
    prctl(PR_SET_NAME, "pagefold", 0, 0, 0);
    int error = own_file_table();
    if (error == 0)
        pf_callbacks.opened();
    pthread_mutex_lock(&lock);
    start_error = error;
    if (error == 0)
        phase = ON;
    pthread_cond_broadcast(&answered);
    while (phase == ON) {
        answer_bells();
        tick();
        struct pf_job *job = phase == ON ? take_job(false) : NULL;
        if (job) {
            do_job(job);
        } else if (phase == ON && atomic_load(&bells) == 0) {
            if (tick_at) {
                uint64_t now = pf_now_ms();
                struct timespec until = pf_deadline(tick_at > now ? tick_at - now : 0);
                pthread_cond_timedwait(&wanted, &lock, &until);
            } else {
                pthread_cond_wait(&wanted, &lock);
            }
        }
    }
    for (struct pf_job *job; (job = take_job(false));) {
        job->result = -ECANCELED;
        job->done = true;
    }
    pthread_cond_broadcast(&answered);
    pthread_mutex_unlock(&lock);
    if (error == 0)
        pf_callbacks.closing();
    return NULL;
}

int pf_command_start(void) {
    int state;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
    pthread_mutex_lock(&start_lock);
    pthread_mutex_lock(&lock);
    int error = 0;
    if (phase == OFF) {
        phase = STARTING;
        start_error = 0;
        error = pf_thread_start(&thread, &thread_stack, command_main);
        while (error == 0 && phase == STARTING && start_error == 0)
            pthread_cond_wait(&answered, &lock);
        if (error == 0 && start_error) {
            error = start_error;
            pthread_mutex_unlock(&lock);
            pthread_join(thread, NULL);
            pthread_mutex_lock(&lock);
        }
        if (error)
            phase = OFF;
    }
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&start_lock);
    pthread_setcancelstate(state, NULL);
    return error;
}

int pf_command_stop(void) {
    int state;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
    pthread_mutex_lock(&start_lock);
    pthread_mutex_lock(&lock);
    if (phase == ON) {
        phase = STOPPING;
        pthread_cond_signal(&wanted);
        pthread_mutex_unlock(&lock);
        pthread_join(thread, NULL);
        pthread_mutex_lock(&lock);
        phase = OFF;
        tick_at = 0;
    }
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&start_lock);
    pthread_setcancelstate(state, NULL);
    return 0;
}

bool pf_command_started(void) {
    pthread_mutex_lock(&lock);
    bool on = phase == ON;
    pthread_mutex_unlock(&lock);
    return on;
}

int64_t pf_command_run(struct pf_job *job) {
    int state; /* the job lies on this stack: the caller must not be cancelled while it waits */
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
    pthread_mutex_lock(&lock);
    job->done = false;
    job->next = NULL;
    if (phase == ON) {
        *last = job;
        last = &job->next;
        pthread_cond_signal(&wanted);
        while (!job->done)
            pthread_cond_wait(&answered, &lock);
    } else {
        job->result = -ESRCH;
    }
    pthread_mutex_unlock(&lock);
    pthread_setcancelstate(state, NULL);
    return job->result;
}

void pf_command_ring(uint32_t rung) {
    if ((atomic_fetch_or(&bells, rung) & rung) == rung)
        return; /* not heard yet: whoever rang first also woke the thread */
    pthread_mutex_lock(&lock);
    if (phase == ON)
        pthread_cond_signal(&wanted);
    pthread_mutex_unlock(&lock);
}

void pf_command_child(void) {
    pthread_mutex_init(&start_lock, NULL);
    pthread_mutex_init(&lock, NULL);
    make_conditions();
    first = NULL;
    last = &first;
    phase = OFF;
    tick_at = 0;
    /* Bells stay: what they mean (young arrays, say) is still so, and nobody has heard them. */
}
