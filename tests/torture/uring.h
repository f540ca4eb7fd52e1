/* Own the little of io_uring that is needed, from its system calls: one ring, fixed buffers, fixed reads and writes. */
#ifndef TORTURE_URING_H
#define TORTURE_URING_H

#include <stdint.h>
#include <sys/uio.h>

struct ring {
    int descriptor;
    uint32_t entries, waiting; /* queued, not yet handed to the kernel */
    uint32_t *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    void *memory, *sqe_memory;
    uint64_t memory_bytes, sqe_bytes;
};

int ring_open(struct ring *ring, uint32_t entries); /* 0 or a negative errno */
void ring_close(struct ring *ring);
int ring_register(struct ring *ring, const struct iovec *buffers, uint32_t number);
int ring_unregister(struct ring *ring);
/* Queue a read into (or, with `out`, a write from) a registered buffer. */
void ring_queue(struct ring *ring, int out, int file, void *at, uint32_t bytes, uint64_t offset, uint32_t buffer, uint64_t tag);
/* Hand over what is queued and wait for `number` ends; 0 or a negative errno. */
int ring_wait(struct ring *ring, uint32_t number);
/* Take one end: 1 and its tag and result, or 0. */
int ring_take(struct ring *ring, uint64_t *tag, int32_t *result);

#endif
