/* Own the memory that a family of forked processes shares: by the hash of a page, where its content is known to be; and
 * who holds which chunk of the store. Must not know regions, windows or files.
 *
 * It is mapped when the library is loaded, before any fork; it costs address space and, as it fills, 36 bytes a page.
 * Everything in it may be half-written by a process that died, or wrong: what leads somewhere is checked before use, and
 * bytes are compared in the window. The lock is robust: who finds its owner dead builds the chains anew.
 */
#ifndef PF_INDEX_H
#define PF_INDEX_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define PF_CHUNKS 256u       /* of the store at a time */
#define PF_CHUNK_PAGES 16384u /* 64 MiB */
#define PF_MEMBERS 64u       /* processes that hold chunks at a time */

enum pf_entry_kind {
    PF_ENTRY_FREE = 0,
    PF_ENTRY_PAGE = 1, /* a private page that somebody would merge: place[] = process, region, page of the region */
    PF_ENTRY_SLOT = 2  /* a slot of the store: place[] = chunk number, slot */
};

struct pf_entry {
    uint64_t hash;
    uint32_t next; /* in the chain of its bucket; 0 ends it */
    uint32_t kind; /* written last */
    uint32_t place[3];
    uint32_t zero;
};

struct pf_chunk {
    uint32_t number; /* never used again in the family; 0: no chunk */
    uint32_t used;   /* slots given out, from the first */
    uint64_t device, inode;
};

struct pf_member {
    pid_t process; /* 0: free */
    pid_t thread;  /* whose file table the descriptors are in */
    int32_t fd[PF_CHUNKS]; /* -1: it does not hold that chunk */
};

struct pf_family {
    uint32_t open; /* the chunk that is being filled, by place; PF_CHUNKS: none */
    uint32_t numbers;
    struct pf_chunk chunks[PF_CHUNKS];
    struct pf_member members[PF_MEMBERS];
};

/* NULL: it could not be mapped, or is of a family that stopped answering: then there is no embedded store. Waits at most a
 * second for a process that holds the lock. */
struct pf_family *pf_index_lock(void);
void pf_index_unlock(void);

/* With the lock: */
struct pf_entry *pf_index_find(uint64_t hash); /* NULL: not known */
/* Remember a new hash; false: full. `keep` says of an entry whether it may still be of use, when room is made. */
bool pf_index_add(uint64_t hash, enum pf_entry_kind kind, uint32_t a, uint32_t b, uint32_t c,
                  bool (*keep)(const struct pf_entry *));
void pf_entry_set(struct pf_entry *entry, enum pf_entry_kind kind, uint32_t a, uint32_t b, uint32_t c);

#endif
