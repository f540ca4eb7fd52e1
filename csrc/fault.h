/* Own the fault points: places where a test build (-DPF_FAULTS) can end or stop the process. A normal build has none.
 *
 * PAGEFOLD_FAULT="window:3" kills the process with SIGKILL at the first pass of point 3 of the windows, "window:3:7" at
 * the seventh; "stop-window:3" sends SIGSTOP instead; a test that has loaded the library may have a function of its own called
 * there instead (`call`). A new kind is a new name in PF_FAULT_KINDS and a constant.
 *
 * window   1 before the run is registered  2 registered  3 moved to scratch  4 barrier passed  5 compared  6 a stretch mapped
 *          to its slots  7 the others moved back  8 no registration left  9 all woken
 * remap    1 before the run is registered  2 registered  3 writers held  4 compared  5 a stretch mapped to its new slots
 *          6 no registration left
 * restore  1 before a batch  2 writers held  3 the twin lives  4 pinned pages known  5 a run copied  6 an empty mapping in its
 *          place  7 filled  8 no registration left  9 end of the batch  10 after it, without W
 */
#ifndef PF_FAULT_H
#define PF_FAULT_H

#define PF_FAULT_WINDOW 0  /* window.c, swap of private pages */
#define PF_FAULT_REMAP 1   /* remap.c, from slot to slot */
#define PF_FAULT_RESTORE 2 /* restore.c */
#define PF_FAULT_LINK 3    /* link.c */
#define PF_FAULT_STORE 4   /* embedded.c */
#define PF_FAULT_KINDS {"window", "remap", "restore", "link", "store"}

#ifndef PF_FAULTS

#define PF_FAULT(kind, point) ((void)0)

#else

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

struct pf_fault_plan {
    int read; /* 1: the environment was read */
    int kind, point, signal;
    long passes; /* left before it happens */
    void (*call)(void); /* not NULL: instead of the signal; set by a test in the same process */
};
/* One for all files that include this. */
__attribute__((weak)) struct pf_fault_plan pf_fault_plan;

/* Read the plan when the library is loaded: getenv is nothing for the middle of a window. */
static void __attribute__((constructor)) pf_fault_read(void) {
    static const char *const kinds[] = PF_FAULT_KINDS;
    const char *text = getenv("PAGEFOLD_FAULT");
    if (pf_fault_plan.read)
        return;
    pf_fault_plan = (struct pf_fault_plan){.read = 1, .kind = -1, .signal = SIGKILL, .passes = 1};
    if (!text)
        return;
    if (!strncmp(text, "stop-", 5)) {
        pf_fault_plan.signal = SIGSTOP;
        text += 5;
    }
    for (unsigned i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        size_t length = strlen(kinds[i]);
        char *rest;
        if (strncmp(text, kinds[i], length) || text[length] != ':')
            continue;
        pf_fault_plan.kind = (int)i;
        pf_fault_plan.point = (int)strtol(text + length + 1, &rest, 10);
        if (*rest == ':')
            pf_fault_plan.passes = strtol(rest + 1, NULL, 10);
    }
}

static inline void pf_fault(int kind, int point) {
    if (kind != pf_fault_plan.kind || point != pf_fault_plan.point)
        return;
    if (__atomic_sub_fetch(&pf_fault_plan.passes, 1, __ATOMIC_SEQ_CST))
        return;
    if (pf_fault_plan.call)
        pf_fault_plan.call();
    else
        syscall(__NR_kill, getpid(), pf_fault_plan.signal);
}
#define PF_FAULT(kind, point) pf_fault(kind, point)

#endif
#endif
