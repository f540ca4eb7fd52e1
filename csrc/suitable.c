/* Own the question whether a mapping can be merged: see pf_suitable in regions.h. Must not know regions or windows.
 *
 * The flags that matter (locked, DONTFORK ...) are shown in /proc/self/smaps only: not by PROCMAP_QUERY, and no other call tells
 * DONTFORK, DONTDUMP or WIPEONFORK. Its text is made from the lowest mapping up, so one reading is for as many ranges as
 * there are. Flags are a white list: one we have not heard of may mean something that a swap would lose.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "kernel.h"
#include "regions.h"

#define BUFFER_BYTES (256u * 1024u)
#define GET_POLICY_OF_ADDRESS 2ul

struct reading {
    int file;
    char *buffer;
    size_t filled, used;
    int error; /* why it broke off: not at its end */
};

/* A mapping, as far as its lines were read. */
struct mapping {
    uint64_t start, end;
    int marks;           /* PF_VMA_* */
    const char *meaning; /* why it cannot be merged; NULL: it can */
};

struct judgement {
    struct pf_range *ranges; /* until one is done its `suits` is PF_VMA_* of what was seen; PF_UNJUDGED: nothing */
    uint32_t first, count;   /* those before `first` are done */
    uint64_t reached;        /* everything of ranges[first] below is suitable; 0: nothing yet */
    struct mapping mapping;  /* the lines read now are about; `end` 0: about none that matters */
    char *why;
};

static const struct {
    char flag[3];
    int mark;
} marks[] = {{"rd", 0}, {"wr", 0}, {"mr", 0}, {"mw", 0}, {"me", 0}, {"ac", 0}, {"sd", 0}, {"nr", PF_VMA_NORESERVE},
             {"hg", PF_VMA_HUGEPAGE}, {"nh", PF_VMA_NOHUGEPAGE}, {"mg", PF_VMA_MERGEABLE}};

static const struct {
    char flag[3];
    const char *meaning;
} reasons[] = {{"lo", "locked in memory (mlock)"},       {"dc", "not to be inherited (MADV_DONTFORK)"},
               {"dd", "not to be dumped (MADV_DONTDUMP)"}, {"wf", "wiped on fork (MADV_WIPEONFORK)"},
               {"um", "watched by a userfaultfd"},         {"uw", "watched by a userfaultfd"},
               {"ui", "watched by a userfaultfd"},         {"ht", "of huge pages (hugetlbfs)"},
               {"gd", "a stack"},                          {"io", "a device's"},
               {"pf", "a device's"},                       {"mm", "a device's"}};

/* The next line, without its end and cut to what fits; NULL at the end of the file. */
static char *next_line(struct reading *reading) {
    for (;;) {
        char *line = reading->buffer + reading->used;
        char *end = memchr(line, '\n', reading->filled - reading->used);
        if (end) {
            *end = 0;
            reading->used = (size_t)(end + 1 - reading->buffer);
            return line;
        }
        memmove(reading->buffer, line, reading->filled - reading->used);
        reading->filled -= reading->used;
        reading->used = 0;
        if (reading->filled == BUFFER_BYTES) { /* no line is that long */
            reading->error = -EIO;
            return NULL;
        }
        ssize_t got = read(reading->file, reading->buffer + reading->filled, BUFFER_BYTES - reading->filled);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            reading->error = got ? -errno : 0;
            return NULL;
        }
        reading->filled += (size_t)got;
    }
}

static const char *hex(const char *text, uint64_t *value) {
    for (*value = 0;; text++) {
        if (*text >= '0' && *text <= '9')
            *value = *value << 4 | (uint64_t)(*text - '0');
        else if (*text >= 'a' && *text <= 'f')
            *value = *value << 4 | (uint64_t)(*text - 'a' + 10);
        else
            return text;
    }
}

static const char *skip_word(const char *text) {
    text += strcspn(text, " ");
    return text + strspn(text, " ");
}

static void refuse(struct judgement *judgement, int error, const char *meaning) {
    judgement->ranges[judgement->first++].suits = error;
    judgement->reached = 0;
    pf_text(judgement->why, error == -EOPNOTSUPP ? "the mapping is %s" : "%s", meaning);
}

/* All lines of the mapping were read: judge the ranges that end in it, or go on behind it. */
static void judge_mapping(struct judgement *judgement) {
    const struct mapping mapping = judgement->mapping;
    judgement->mapping.end = 0;
    while (judgement->first < judgement->count && judgement->ranges[judgement->first].start < mapping.end) {
        struct pf_range *range = &judgement->ranges[judgement->first];
        if (mapping.meaning) {
            refuse(judgement, -EOPNOTSUPP, mapping.meaning);
            continue;
        }
        range->suits = range->suits == PF_UNJUDGED ? mapping.marks : range->suits & mapping.marks;
        if (range->end > mapping.end) {
            judgement->reached = mapping.end;
            return;
        }
        judgement->first++;
        judgement->reached = 0;
    }
}

/* Nothing is mapped between what was reached and `start`. */
static void judge_gap(struct judgement *judgement, uint64_t start) {
    while (judgement->first < judgement->count && judgement->ranges[judgement->first].start < start &&
           judgement->reached < start)
        refuse(judgement, -ENOMEM, "part of the range is not mapped");
}

/* "start-end perms offset device inode path" */
static void begin_mapping(struct judgement *judgement, const char *line) {
    struct mapping mapping = {.meaning = NULL};
    int policy = 0;
    line = hex(line, &mapping.start);
    line = hex(line + (*line == '-'), &mapping.end);
    judge_gap(judgement, mapping.start);
    if (judgement->first == judgement->count || judgement->ranges[judgement->first].start >= mapping.end)
        return;
    const char *rights = line + strspn(line, " ");
    const char *inode = skip_word(skip_word(skip_word(rights)));
    const char *path = skip_word(inode);
    if (rights[3] != 'p')
        mapping.meaning = "shared";
    else if (strncmp(inode, "0 ", 2) && strcmp(inode, "0"))
        mapping.meaning = "a file's";
    else if (strncmp(rights, "rw-", 3))
        mapping.meaning = "not readable and writable (or it is executable)";
    else if (*path && strncmp(path, "[heap]", 6) && strncmp(path, "[anon:", 6))
        mapping.meaning = "special";
    else if (!syscall(__NR_get_mempolicy, &policy, NULL, 0ul, mapping.start, GET_POLICY_OF_ADDRESS) && policy)
        mapping.meaning = "bound to NUMA nodes (mbind)";
    judgement->mapping = mapping;
}

static void judge_flags(struct mapping *mapping, const char *text) {
    for (text += strspn(text, " "); text[0] && text[1]; text = skip_word(text)) {
        size_t i;
        for (i = 0; i < sizeof marks / sizeof *marks && strncmp(text, marks[i].flag, 2); i++)
            ;
        if (i < sizeof marks / sizeof *marks) {
            mapping->marks |= marks[i].mark;
            continue;
        }
        for (i = 0; i < sizeof reasons / sizeof *reasons && strncmp(text, reasons[i].flag, 2); i++)
            ;
        mapping->meaning = i < sizeof reasons / sizeof *reasons ? reasons[i].meaning : "special";
        return;
    }
}

static void judge_line(struct judgement *judgement, const char *line) {
    struct mapping *mapping = &judgement->mapping;
    if (*line < 'A' || *line > 'Z')
        begin_mapping(judgement, line);
    else if (!mapping->end)
        return;
    else if (!strncmp(line, "VmFlags:", 8)) { /* the last line of a mapping */
        if (!mapping->meaning)
            judge_flags(mapping, line + 8);
        judge_mapping(judgement);
    } else if (!strncmp(line, "ProtectionKey:", 14) && line[14 + strspn(line + 14, " ")] != '0' && !mapping->meaning)
        mapping->meaning = "protected by a key (pkey_mprotect)";
}

/* Nothing was found out of those that are left. */
static int give_up(struct judgement *judgement, int error, const char *why) {
    while (judgement->first < judgement->count)
        judgement->ranges[judgement->first++].suits = PF_UNJUDGED;
    pf_text(judgement->why, "%s (errno %d)", why, -error);
    return error == -ENOMEM ? -ENOBUFS : error; /* ENOMEM is what a gap is called */
}

int pf_suitable_all(struct pf_range *ranges, uint32_t count, char *why) {
    char unused[PF_TEXT];
    struct judgement judgement = {.ranges = ranges, .count = count, .why = why ? why : unused};
    struct reading reading = {.file = open("/proc/self/smaps", O_RDONLY | O_CLOEXEC)};
    char *line;
    pf_text(judgement.why, "%s", "");
    for (uint32_t i = 0; i < count; i++)
        ranges[i].suits = PF_UNJUDGED;
    if (reading.file < 0)
        return give_up(&judgement, -errno, "/proc/self/smaps cannot be opened");
    reading.buffer = mmap(NULL, BUFFER_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (reading.buffer == MAP_FAILED) {
        close(reading.file);
        return give_up(&judgement, -ENOMEM, "no memory to read /proc/self/smaps");
    }
    while (judgement.first < count && (line = next_line(&reading)))
        judge_line(&judgement, line);
    munmap(reading.buffer, BUFFER_BYTES);
    close(reading.file);
    if (judgement.first < count && reading.error)
        return give_up(&judgement, reading.error, "/proc/self/smaps cannot be read");
    while (judgement.first < count)
        refuse(&judgement, -ENOMEM, "part of the range is not mapped");
    return 0;
}

int pf_suitable(uint64_t start, uint64_t bytes, char *why) {
    struct pf_range range = {.start = start, .end = start + bytes};
    const int error = pf_suitable_all(&range, 1, why);
    return error ? error : range.suits;
}
