/* Own the figures that the program ends with; it only reads what others count. */
#include "tally.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "arena.h"
#include "crew.h"
#include "merger.h"
#include "options.h"
#include "trades.h"
#include "verdict.h"

static const char *const statuses[PF_STATUSES] = {"merged",     "already", "differs", "pinned", "shared", "unmanaged", "no_vma",
                                                  "unsuitable", "broken",  "absent",  "busy",   "off",    "bad",       "unknown"};

typedef void (*runner)(struct member *);
static const struct {
    const char *name;
    runner run;
} trades[] = {{"writes", writer_run}, {"reads", reader_run}, {"children", child_run}, {"trouble", trouble_run}};

static uint64_t total(runner run) {
    uint64_t sum = 0;
    struct member *member;
    for (uint32_t number = 0; (member = crew_member(number)); number++)
        sum += member->run == run ? atomic_load(&member->done) : 0;
    return sum;
}

static uint64_t total_again(void) {
    uint64_t sum = 0;
    struct member *member;
    for (uint32_t number = 0; (member = crew_member(number)); number++)
        sum += atomic_load(&member->again);
    return sum;
}

/* The name of a kind: a thread's without its number. */
static void kind_of(const struct member *member, char kind[24]) {
    snprintf(kind, 24, "%s", member->name);
    *strrchr(kind, '-') = 0;
}

/* Members of one trade and kind are summed under the first of them. */
static int first_of_kind(uint32_t number, char kind[24], uint64_t *sum) {
    struct member *member = crew_member(number), *other;
    char name[24];
    kind_of(member, kind);
    *sum = 0;
    for (uint32_t index = 0; (other = crew_member(index)); index++) {
        kind_of(other, name);
        if (other->run != member->run || strcmp(name, kind))
            continue;
        if (index < number)
            return 0;
        *sum += atomic_load(&other->done);
    }
    return 1;
}

/* Digits in threes. */
static const char *grouped(uint64_t value) {
    static char texts[8][32];
    static int turn;
    char digits[24], *text = texts[turn++ % 8], *to = text;
    int length = snprintf(digits, sizeof digits, "%" PRIu64, value);
    for (int digit = 0; digit < length; digit++) {
        *to++ = digits[digit];
        if ((length - digit) % 3 == 1 && digit + 1 < length)
            *to++ = ',';
    }
    *to = 0;
    return text;
}

void tally_progress(double seconds) {
    if (options.quiet || !isatty(STDERR_FILENO))
        return;
    fprintf(stderr, "\r%6.0f s  windows %s  merged %s  writes %s  children %s  wrong bytes %s \033[K", seconds,
            grouped(atomic_load(&merging.windows)), grouped(atomic_load(&merging.by_status[PF_MERGED])), grouped(total(writer_run)),
            grouped(total(child_run)), grouped(atomic_load(&verdict->wrong_bytes)));
}

void tally_end_progress(void) {
    if (!options.quiet && isatty(STDERR_FILENO))
        fputs("\r\033[K", stderr);
}

static void row(const char *name, uint64_t value) { printf("%-34s %18s\n", name, grouped(value)); }

void tally_table(double seconds) {
    char name[40], kind[24];
    uint64_t sum;
    const char *by = options.daemon ? "the daemon" : options.embedded ? "the embedded store" : options.windows_by;
    printf("torture: %.1f s, seed %" PRIu64 ", %u pages in %u copies, %u writers, windows by %s\n", seconds, options.seed,
           arena.pages, arena.copies, arena.owners, by);
    row("windows", atomic_load(&merging.windows));
    for (int status = 0; status < PF_STATUSES; status++)
        if (atomic_load(&merging.by_status[status])) {
            snprintf(name, sizeof name, "  pages %s", statuses[status] ? statuses[status] : "?");
            row(name, atomic_load(&merging.by_status[status]));
        }
    row("calls to give back", atomic_load(&merging.restores));
    row("  pages refused", atomic_load(&merging.not_restored));
    row("regions advised again", atomic_load(&merging.advised_again));
    row("extents freed", atomic_load(&merging.extents));
    for (size_t trade = 0; trade < sizeof trades / sizeof *trades; trade++) {
        row(trades[trade].name, total(trades[trade].run));
        for (uint32_t number = 0; crew_member(number); number++)
            if (crew_member(number)->run == trades[trade].run && first_of_kind(number, kind, &sum)) {
                snprintf(name, sizeof name, "  %s", kind);
                row(name, sum);
            }
    }
    row("tried again after EIO", total_again());
    row("sectors judged by fixed bytes", atomic_load(&verdict->raced));
    row("wrong bytes", atomic_load(&verdict->wrong_bytes));
    row("wrong sectors", atomic_load(&verdict->wrong_sectors));
    row("bad reads", atomic_load(&verdict->bad_reads));
    row("bad children", atomic_load(&verdict->bad_children));
    row("failures", atomic_load(&verdict->failures));
}

void tally_json(double seconds) {
    char kind[24];
    uint64_t sum;
    printf("{\"seconds\": %.3f, \"seed\": %" PRIu64 ", \"pages\": %u, \"copies\": %u, \"writers\": %u", seconds, options.seed,
           arena.pages, arena.copies, arena.owners);
    printf(", \"windows\": %" PRIu64, atomic_load(&merging.windows));
    printf(", \"by_status\": {");
    for (int status = 0; status < PF_STATUSES && statuses[status]; status++)
        printf("%s\"%s\": %" PRIu64, status ? ", " : "", statuses[status], atomic_load(&merging.by_status[status]));
    printf("}, \"restores\": %" PRIu64 ", \"restored\": %" PRIu64 ", \"not_restored\": %" PRIu64 ", \"advised_again\": %" PRIu64
           ", \"extents_freed\": %" PRIu64,
           atomic_load(&merging.restores), atomic_load(&merging.restored), atomic_load(&merging.not_restored),
           atomic_load(&merging.advised_again), atomic_load(&merging.extents));
    for (size_t trade = 0; trade < sizeof trades / sizeof *trades; trade++) {
        const char *comma = "";
        printf(", \"%s\": {", trades[trade].name);
        for (uint32_t number = 0; crew_member(number); number++)
            if (crew_member(number)->run == trades[trade].run && first_of_kind(number, kind, &sum)) {
                printf("%s\"%s\": %" PRIu64, comma, kind, sum);
                comma = ", ";
            }
        printf("}");
    }
    printf(", \"again\": %" PRIu64 ", \"raced\": %" PRIu64 ", \"wrong_bytes\": %" PRIu64 ", \"wrong_sectors\": %" PRIu64
           ", \"bad_reads\": %" PRIu64 ", \"bad_children\": %" PRIu64 ", \"failures\": %" PRIu64 "}\n",
           total_again(), atomic_load(&verdict->raced), atomic_load(&verdict->wrong_bytes), atomic_load(&verdict->wrong_sectors),
           atomic_load(&verdict->bad_reads), atomic_load(&verdict->bad_children), atomic_load(&verdict->failures));
}
