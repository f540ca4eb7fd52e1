/* Own the thread "pagefold" and what it is asked: jobs (a caller waits for the answer) and bells (nobody waits).
 * Must not know what jobs do.
 *
 * The thread has a file table of its own, shared only with threads it starts: the program can neither see nor close what
 * is opened there. So whatever needs a descriptor is a job. All signals are blocked in it but the two that the C library
 * keeps for itself (setuid() in a threaded program waits for every thread to answer one).
 */
#ifndef PF_COMMAND_H
#define PF_COMMAND_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct pf_job {
    int64_t (*run)(struct pf_job *job); /* in the thread; its result is the caller's */
    int64_t region;
    uint64_t start, bytes;
    uint32_t quietly;
    const char *text;
    void *out;
    bool brief; /* may run in the middle of one that is not */
    bool done;
    int64_t result;
    struct pf_job *next;
};

enum pf_bell {
    PF_BELL_LINK = 1,   /* the link has something to do */
    PF_BELL_ARRAYS = 2, /* array.c has young blocks or a cache: look after a while */
    PF_BELL_STORE = 4,  /* regions went: chunks of the embedded store may be unused now */
    PF_BELL_TRACK = 8,  /* regions that end late (agent.c) */
};

/* Where bells and the thread's beginning and end lead to; set once, before the first start. */
struct pf_callbacks {
    void (*opened)(void);       /* first thing in the thread, in its own file table */
    void (*closing)(void);      /* last thing in it */
    void (*ring)(uint32_t bells);
    bool (*tick)(void);         /* about a second after PF_BELL_ARRAYS; true: call again in a second */
};
extern const struct pf_callbacks pf_callbacks; /* agent.c */

/* Start the thread and wait until `opened` returned. 0 (also if it runs already), or a negative errno. */
int pf_command_start(void);
/* End it; jobs that wait get -ECANCELED. */
int pf_command_stop(void);
bool pf_command_started(void);
/* Have a job done and wait for it, from any program thread. -ESRCH: the thread does not run. */
int64_t pf_command_run(struct pf_job *job);
/* Never blocks, from any thread. */
void pf_command_ring(uint32_t bells);
/* Inside a long job, every few dozen pages: lets brief jobs and bells through. False: the thread shall end. */
bool pf_command_breathe(void);
/* In a forked child: there is no thread, nothing was asked. */
void pf_command_child(void);

/* Start a thread of the agent on a stack that outlives it; all signals blocked. `stack` is kept for the next start. */
int pf_thread_start(pthread_t *thread, void **stack, void *(*main)(void *));
/* A condition variable whose timeouts count in monotonic time. */
void pf_condition_init(pthread_cond_t *condition);
/* Milliseconds of monotonic time, and the same `ms` from now as pthread_cond_timedwait wants it. */
uint64_t pf_now_ms(void);
struct timespec pf_deadline(uint64_t ms);

#endif
