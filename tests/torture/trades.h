/* Own the list of what there is to run beside the windows: writers, readers, children, and those who only make trouble. */
#ifndef TORTURE_TRADES_H
#define TORTURE_TRADES_H

#include <stdint.h>

#include "crew.h"

struct job {
    uint32_t page, sector, content;
};

/* One way to write sectors; `write` returns 0 or a negative errno that no program should meet. */
struct writer_kind {
    const char *name;
    uint32_t most_jobs; /* in one call of write */
    uint32_t limit;     /* contents above this it cannot write */
    int (*open)(struct member *me);
    int (*write)(struct member *me, const struct job *jobs, uint32_t number);
    int (*between)(struct member *me);  /* before each round; 0 or a negative errno; NULL: nothing to do */
    int64_t (*pick)(struct member *me); /* a group to write in; NULL: anywhere */
    void (*close)(struct member *me);
};

/* What a writer or reader has open. */
struct tools {
    const void *kind;
    int file, direct, memory; /* the file of contents, the same for O_DIRECT, /proc/self/mem */
    int pipe[2];
    int servant;      /* socket to another process that writes here */
    uint8_t *staging; /* a page-aligned buffer that is not under torture */
    struct ring *ring;
    uint32_t base[8], pages[8], spans, uses; /* registered runs: first group and groups */
};

extern const struct writer_kind writer_store, writer_read, writer_pipe, writer_direct, writer_uring, writer_mem, writer_vm,
    writer_remote;
extern const struct writer_kind *const writer_kinds[]; /* ends with NULL */

int contents_probe(void); /* make the file, and find out what it can; 0: it cannot be made */
void contents_open(void); /* fill it, once the arena is there */
int contents_file(int flags);
int contents_direct(void); /* whether the file can be read with O_DIRECT at 512 bytes */

uint32_t writers_number(void); /* how many there will be; the arena is dealt out among them */
void writers_begin(void);
void readers_begin(void);
void children_begin(void);
void trouble_begin(void);
void writer_run(struct member *me);
void reader_run(struct member *me);
void child_run(struct member *me);
void trouble_run(struct member *me);

/* The other process of `remote`: writes into `pid` what comes over `socket`. */
int servant_main(int pid, int socket);
/* Another program that a child runs: looks at nothing, ends well. */
#define SERVANT "--servant"
#define NOTHING "--nothing"

#endif
