/* Own the question whether a mapping can be merged: see pf_suitable in regions.h. Must not know regions or windows.
 *
 * The flags that matter (locked, DONTFORK ...) are shown in /proc/self/smaps only. Flags are a white list: one we have not
 * heard of may mean something that a swap would lose.
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
    bool ended;
};

struct judgement {
    uint64_t start, end; /* asked for */
    uint64_t reached;    /* everything below is suitable */
    int marks;           /* PF_VMA_* that all mappings so far have; -1: none seen */
    int error;
    char *why;
    bool inside; /* the lines read now are about a mapping of the range */
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
        if (reading->filled == BUFFER_BYTES)
            return NULL; /* no line is that long */
        ssize_t got = read(reading->file, reading->buffer + reading->filled, BUFFER_BYTES - reading->filled);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            reading->ended = !got;
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
    judgement->error = error;
    pf_text(judgement->why, "the mapping is %s", meaning);
}

/* "start-end perms offset device inode path" */
static void judge_header(struct judgement *judgement, const char *line) {
    uint64_t from, to;
    line = hex(line, &from);
    line = hex(line + (*line == '-'), &to);
    judgement->inside = from < judgement->end && to > judgement->start;
    if (!judgement->inside)
        return;
    const char *rights = line + strspn(line, " ");
    const char *inode = skip_word(skip_word(skip_word(rights)));
    const char *path = skip_word(inode);
    if (from > judgement->reached) {
        judgement->error = -ENOMEM;
        pf_text(judgement->why, "part of the range is not mapped");
    } else if (rights[3] != 'p') {
        refuse(judgement, -EOPNOTSUPP, "shared");
    } else if (strncmp(inode, "0 ", 2) && strcmp(inode, "0")) {
        refuse(judgement, -EOPNOTSUPP, "a file's");
    } else if (strncmp(rights, "rw-", 3)) {
        refuse(judgement, -EOPNOTSUPP, "not readable and writable (or it is executable)");
    } else if (*path && strncmp(path, "[heap]", 6) && strncmp(path, "[anon:", 6)) {
        refuse(judgement, -EOPNOTSUPP, "special");
    } else {
        int policy = 0;
        if (!syscall(__NR_get_mempolicy, &policy, NULL, 0ul, from, GET_POLICY_OF_ADDRESS) && policy)
            refuse(judgement, -EOPNOTSUPP, "bound to NUMA nodes (mbind)");
        judgement->reached = to;
    }
}

static void judge_flags(struct judgement *judgement, const char *text) {
    int found = 0;
    for (text += strspn(text, " "); text[0] && text[1]; text = skip_word(text)) {
        size_t i;
        for (i = 0; i < sizeof marks / sizeof *marks && strncmp(text, marks[i].flag, 2); i++)
            ;
        if (i < sizeof marks / sizeof *marks) {
            found |= marks[i].mark;
            continue;
        }
        for (i = 0; i < sizeof reasons / sizeof *reasons && strncmp(text, reasons[i].flag, 2); i++)
            ;
        refuse(judgement, -EOPNOTSUPP, i < sizeof reasons / sizeof *reasons ? reasons[i].meaning : "special");
        return;
    }
    judgement->marks = judgement->marks < 0 ? found : judgement->marks & found;
}

static void judge_line(struct judgement *judgement, const char *line) {
    if (*line < 'A' || *line > 'Z')
        judge_header(judgement, line);
    else if (!judgement->inside)
        return;
    else if (!strncmp(line, "VmFlags:", 8))
        judge_flags(judgement, line + 8);
    else if (!strncmp(line, "ProtectionKey:", 14) && line[14 + strspn(line + 14, " ")] != '0')
        refuse(judgement, -EOPNOTSUPP, "protected by a key (pkey_mprotect)");
}

int pf_suitable(uint64_t start, uint64_t bytes, char *why) {
    struct judgement judgement = {.start = start, .end = start + bytes, .reached = start, .marks = -1, .why = why};
    struct reading reading = {.file = open("/proc/self/smaps", O_RDONLY | O_CLOEXEC)};
    pf_text(why, "%s", "");
    if (reading.file < 0) {
        const int error = -errno;
        pf_text(why, "/proc/self/smaps cannot be opened (errno %d)", -error);
        return error;
    }
    reading.buffer = mmap(NULL, BUFFER_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (reading.buffer == MAP_FAILED) {
        close(reading.file);
        pf_text(why, "no memory to read /proc/self/smaps");
        return -ENOMEM;
    }
    char *line;
    bool past = false; /* beyond the range: no more lines are needed */
    while (!judgement.error && !past && (line = next_line(&reading))) {
        judge_line(&judgement, line);
        past = !judgement.inside && judgement.reached >= judgement.end;
    }
    munmap(reading.buffer, BUFFER_BYTES);
    close(reading.file);
    if (!judgement.error && judgement.reached < judgement.end) {
        judgement.error = reading.ended ? -ENOMEM : -EIO;
        pf_text(why, "part of the range is not mapped");
    }
    return judgement.error ? judgement.error : judgement.marks < 0 ? 0 : judgement.marks;
}
