/* Own what was found wrong: it is counted in memory that forked children share, and told at once, the first few in full. */
#ifndef TORTURE_VERDICT_H
#define TORTURE_VERDICT_H

#include <stdatomic.h>
#include <stdint.h>

enum { TOLD_IN_FULL = 12, ENOUGH = 1000 };

struct verdict {
    _Atomic uint64_t wrong_bytes;   /* found by anyone */
    _Atomic uint64_t wrong_sectors; /* found by writers and at the end: writes that were lost or torn */
    _Atomic uint64_t bad_reads;     /* sectors that a reader saw wrong */
    _Atomic uint64_t bad_children;  /* children that found something wrong, or did not come home */
    _Atomic uint64_t failures;      /* calls that must not fail and did; things left behind */
    _Atomic uint64_t raced;         /* sectors that changed too often while being looked at: judged by their fixed bytes only */
    _Atomic uint64_t reports;
};

enum finder { BY_WRITER, BY_READER, BY_CHILD };

extern struct verdict *verdict;

int verdict_open(void);
void verdict_wrong(enum finder finder, const char *who, uint32_t page, uint32_t sector, uint64_t before, uint64_t after,
                   const uint8_t *seen, uint32_t bytes);
/* A call that must not fail did; `error` is an errno or 0. */
void verdict_failed(const char *who, const char *what, int64_t error);
/* How often that was, told by this process; a child begins with its parent's number. */
uint64_t verdict_failed_here(void);
/* Whether so much is wrong that going on tells nothing new. */
int verdict_enough(void);
int verdict_bad(void);
/* Write a line to standard error without stdio: children and the watchdog do. */
void tell(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
