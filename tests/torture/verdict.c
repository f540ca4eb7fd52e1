/* Own the verdict: counts in shared memory, reports without stdio (the teller may be a forked child or hold no lock). */
#include "verdict.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "arena.h"
#include "options.h"

struct verdict *verdict;
static uint64_t failed_here; /* not shared with children, but for what it was at the fork */

int verdict_open(void) {
    void *memory = mmap(NULL, sizeof *verdict, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return -1;
    verdict = memory;
    return 0;
}

void tell(const char *format, ...) {
    char line[1200];
    va_list words;
    va_start(words, format);
    int length = vsnprintf(line, sizeof line - 1, format, words);
    va_end(words);
    if (length > (int)sizeof line - 2)
        length = (int)sizeof line - 2;
    line[length] = '\n';
    if (write(STDERR_FILENO, line, (size_t)length + 1) < 0)
        return;
}

void verdict_wrong(enum finder finder, const char *who, uint32_t page, uint32_t sector, uint64_t before, uint64_t after,
                   const uint8_t *seen, uint32_t bytes) {
    char text[700];
    uint64_t last = atomic_load(&arena.windowed[page]);
    atomic_fetch_add(&verdict->wrong_bytes, bytes);
    atomic_fetch_add(finder == BY_READER ? &verdict->bad_reads : &verdict->wrong_sectors, 1);
    if (atomic_fetch_add(&verdict->reports, 1) >= TOLD_IN_FULL)
        return;
    describe(page, sector, before, after, seen, text, sizeof text);
    tell("torture: WRONG at %p (page %u, sector %u), found by %s: %u bytes. %s. The page's last window: number %llu, %c, "
         "status %u.",
         (void *)sector_at(page, sector), page, sector, who, bytes, text, (unsigned long long)(last >> 16),
         last ? (char)(last >> 8) : '-', (unsigned)last & 0xff);
}

void verdict_failed(const char *who, const char *what, int64_t error) {
    uint64_t before = atomic_fetch_add(&verdict->failures, 1);
    failed_here++;
    if (before < TOLD_IN_FULL)
        tell("torture: FAILED %s: %s (%lld%s%s)", who, what, (long long)error, error > 0 ? ": " : "",
             error > 0 ? strerror((int)error) : "");
}

uint64_t verdict_failed_here(void) { return failed_here; }

int verdict_enough(void) {
    return (options.until_wrong && verdict_bad()) || atomic_load(&verdict->reports) + atomic_load(&verdict->failures) > ENOUGH;
}

int verdict_bad(void) {
    return atomic_load(&verdict->wrong_bytes) || atomic_load(&verdict->bad_children) || atomic_load(&verdict->failures);
}
