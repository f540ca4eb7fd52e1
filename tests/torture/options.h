/* Own what the command line can say. */
#ifndef TORTURE_OPTIONS_H
#define TORTURE_OPTIONS_H

#include <stdint.h>

struct options {
    double seconds;         /* end after this long; 0: no such end */
    uint64_t windows;       /* end after that many windows; 0: no such end */
    uint32_t pages;         /* of the arena */
    uint32_t run;           /* most pages of a window */
    uint32_t copies;        /* pages of equal content that the same writer keeps equal */
    uint32_t threads;       /* writers; 0: two that store plainly, one of each other kind */
    uint64_t seed;          /* of everything drawn by chance */
    double spread;          /* percent of the writes that go anywhere instead of the hot place */
    double calm;            /* percent of the time in which writers and readers sleep */
    uint32_t fork_pause;    /* most milliseconds between two children */
    uint32_t hang;          /* seconds without a beat after which a thread counts as hanging */
    uint32_t delay;         /* most microseconds that the window is held up at each of its system calls (adverse build) */
    uint32_t lie;           /* one of so many complete moves is told as EEXIST; 0: none (adverse build) */
    uint32_t refuse;        /* one of so many calls of the window fails; 0: none (adverse build) */
    const char *kinds;      /* names to run, comma between; a leading '-' takes names away from all; NULL: all */
    const char *windows_by; /* agent, none, or specimen:FAULT */
    const char *daemon;     /* socket of a daemon; NULL: windows are called here */
    const char *directory;  /* where files for direct I/O are made */
    int embedded;           /* through pf_start without a daemon and pf_merge */
    int json;
    int huge;               /* let the arena have huge pages */
    int quiet;              /* no progress line */
    int until_wrong;        /* end at the first thing that is wrong */
};

extern struct options options;

/* Read the command line; ends the program on a mistake. */
void options_read(int count, char **words);
/* Whether a kind is to run. */
int options_kind(const char *name);
/* Whether a call may fail for want of memory or mappings because something here sees to that. */
int options_memory_may_fail(void);

#endif
