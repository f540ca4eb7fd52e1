/* Own the messages between agent and daemon: one packet each over AF_UNIX SEQPACKET, fixed size, little-endian, versioned.
 * src/pagefold/live/messages.py describes the same; tests/live/test_messages.py compares the two. */
#ifndef PF_MESSAGES_H
#define PF_MESSAGES_H

#include <stdint.h>
#include "agent.h"

#define PF_MAGIC 0x4c4f4650u /* "PFOL" */
#define PF_VERSION 1u
#define PF_PRIVATE 0xffffffffu /* as the extent of a run: give its pages back as private anonymous memory */

enum pf_type {
    PF_HELLO = 1,     /* agent: first packet of a connection */
    PF_ADVISE = 2,    /* agent: a region from now on */
    PF_UNADVISE = 3,  /* agent: a region no more; windows for it that are still under way answer PF_UNMANAGED */
    PF_OUTCOME = 4,   /* agent: what became of a WINDOWS */
    PF_SYNC = 5,      /* agent: merge this region now and answer SYNCED */
    PF_WELCOME = 16,  /* daemon: answer to HELLO; may carry an open /dev/userfaultfd */
    PF_EXTENT = 17,   /* daemon: carries the read-only descriptor of an extent of the store */
    PF_WINDOWS = 18,  /* daemon: swap these runs */
    PF_RELEASE = 19,  /* daemon: close your descriptor of this extent; mappings stay */
    PF_SYNCED = 20,   /* daemon: answer to SYNC */
    PF_CONTROL = 32   /* command line, both ways: header and then JSON text, not fixed in size; ends the rule for this type only */
};

struct pf_header {
    uint32_t magic;
    uint16_t version;
    uint16_t type;
    uint32_t length; /* of the whole packet, bytes */
    uint32_t zero;
};

struct pf_hello {
    struct pf_header header;
    uint32_t windows_safe; /* as in pf_state */
    int32_t why_errno;
    uint32_t want_device;  /* 1: send /dev/userfaultfd if you have it */
    uint32_t max_map_count;
    char why[PF_TEXT];
};

struct pf_welcome {
    struct pf_header header;
    uint32_t has_device; /* 1: a descriptor comes with it */
    uint32_t zero;
};

struct pf_advise_message {
    struct pf_header header;
    int64_t region;
    uint64_t start;   /* address */
    uint64_t pages;
    uint32_t tracked; /* 1: writes are tracked (userfaultfd WP_ASYNC); 0: the daemon must read to know */
    uint32_t quiet;   /* 1: nothing in the background, only SYNC */
};

struct pf_unadvise_message {
    struct pf_header header;
    int64_t region;
};

struct pf_run {
    int64_t region;
    uint64_t start;  /* address of its first page */
    uint32_t pages;  /* 1 to PF_RUN_PAGES */
    uint32_t extent; /* 0: a run of zeros, becomes a hole; PF_PRIVATE */
    uint32_t slot;   /* of its first page; the run's slots are neighbours */
    uint32_t zero;
};

struct pf_windows {
    struct pf_header header;
    uint64_t batch;
    uint32_t count; /* runs in use */
    uint32_t plain; /* 1: only within a SYNC of that region: swap plainly if windows are not safe */
    struct pf_run runs[PF_BATCH_RUNS];
};

struct pf_outcome {
    struct pf_header header;
    uint64_t batch;
    uint32_t pages; /* statuses in use: the runs' pages one after the other */
    uint32_t zero;
    uint8_t status[PF_BATCH_PAGES];
};

struct pf_extent {
    struct pf_header header;
    uint32_t extent; /* its number, never 0, never used again */
    uint32_t slots;  /* pages */
    int32_t node;
    uint32_t zero;
};

struct pf_release {
    struct pf_header header;
    uint32_t extent;
    uint32_t zero;
};

struct pf_sync {
    struct pf_header header;
    uint64_t token;
    int64_t region;
};

struct pf_synced {
    struct pf_header header;
    uint64_t token;
    int32_t error; /* 0, or a negative errno */
    uint32_t zero;
    uint64_t pages;
    uint64_t by_status[PF_STATUSES];
    uint64_t zero_pages;
    uint64_t saved_bytes;
};

#endif
