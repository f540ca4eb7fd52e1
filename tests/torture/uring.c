/* Own the raw io_uring ring of uring.h: mapping it, and the order of loads and stores that the kernel asks for. */
#include "uring.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static uint32_t load(uint32_t *word) { return atomic_load_explicit((_Atomic uint32_t *)word, memory_order_acquire); }
static void store(uint32_t *word, uint32_t value) {
    atomic_store_explicit((_Atomic uint32_t *)word, value, memory_order_release);
}

int ring_open(struct ring *ring, uint32_t entries) {
    struct io_uring_params params;
    memset(ring, 0, sizeof *ring);
    memset(&params, 0, sizeof params);
    ring->descriptor = (int)syscall(SYS_io_uring_setup, entries, &params);
    if (ring->descriptor < 0)
        return -errno;
    ring->entries = params.sq_entries;
    ring->memory_bytes = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
    uint64_t completions = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    if (completions > ring->memory_bytes)
        ring->memory_bytes = completions;
    ring->sqe_bytes = params.sq_entries * sizeof(struct io_uring_sqe);
    int how = PROT_READ | PROT_WRITE;
    ring->memory = mmap(NULL, ring->memory_bytes, how, MAP_SHARED, ring->descriptor, IORING_OFF_SQ_RING);
    ring->sqe_memory = mmap(NULL, ring->sqe_bytes, how, MAP_SHARED, ring->descriptor, IORING_OFF_SQES);
    if (!(params.features & IORING_FEAT_SINGLE_MMAP) || ring->memory == MAP_FAILED || ring->sqe_memory == MAP_FAILED) {
        close(ring->descriptor);
        return -ENOMEM;
    }
    uint8_t *base = ring->memory;
    ring->sq_tail = (uint32_t *)(base + params.sq_off.tail);
    ring->sq_mask = (uint32_t *)(base + params.sq_off.ring_mask);
    ring->sq_array = (uint32_t *)(base + params.sq_off.array);
    ring->cq_head = (uint32_t *)(base + params.cq_off.head);
    ring->cq_tail = (uint32_t *)(base + params.cq_off.tail);
    ring->cq_mask = (uint32_t *)(base + params.cq_off.ring_mask);
    ring->cqes = (struct io_uring_cqe *)(base + params.cq_off.cqes);
    ring->sqes = ring->sqe_memory;
    return 0;
}

void ring_close(struct ring *ring) {
    munmap(ring->memory, ring->memory_bytes);
    munmap(ring->sqe_memory, ring->sqe_bytes);
    close(ring->descriptor);
}

int ring_register(struct ring *ring, const struct iovec *buffers, uint32_t number) {
    return syscall(SYS_io_uring_register, ring->descriptor, IORING_REGISTER_BUFFERS, buffers, number) < 0 ? -errno : 0;
}

int ring_unregister(struct ring *ring) {
    return syscall(SYS_io_uring_register, ring->descriptor, IORING_UNREGISTER_BUFFERS, NULL, 0) < 0 ? -errno : 0;
}

void ring_queue(struct ring *ring, int out, int file, void *at, uint32_t bytes, uint64_t offset, uint32_t buffer, uint64_t tag) {
    uint32_t tail = *ring->sq_tail, place = tail & *ring->sq_mask;
    struct io_uring_sqe *entry = ring->sqes + place;
    memset(entry, 0, sizeof *entry);
    entry->opcode = out ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED;
    entry->fd = file;
    entry->addr = (uint64_t)at;
    entry->len = bytes;
    entry->off = offset;
    entry->buf_index = (uint16_t)buffer;
    entry->user_data = tag;
    ring->sq_array[place] = place;
    store(ring->sq_tail, tail + 1);
    ring->waiting++;
}

int ring_wait(struct ring *ring, uint32_t number) {
    do {
        uint32_t ready = load(ring->cq_tail) - *ring->cq_head;
        if (!ring->waiting && ready >= number)
            return 0;
        long taken = syscall(SYS_io_uring_enter, ring->descriptor, ring->waiting, number, IORING_ENTER_GETEVENTS, NULL, 0);
        if (taken < 0 && errno != EINTR && errno != EAGAIN && errno != EBUSY)
            return -errno;
        ring->waiting -= taken > 0 ? (uint32_t)taken : 0;
    } while (1);
}

int ring_take(struct ring *ring, uint64_t *tag, int32_t *result) {
    uint32_t head = *ring->cq_head;
    if (head == load(ring->cq_tail))
        return 0;
    const struct io_uring_cqe *entry = ring->cqes + (head & *ring->cq_mask);
    *tag = entry->user_data;
    *result = entry->res;
    store(ring->cq_head, head + 1);
    return 1;
}
