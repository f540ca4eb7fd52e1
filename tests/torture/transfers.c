/* Own the writers that let the kernel copy into the arena: read(2) from a file and from a pipe, /proc/self/mem,
 * process_vm_writev, and another process that writes here. */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "arena.h"
#include "trades.h"
#include "verdict.h"

extern char **environ;

static void fill_for(const struct job *job, uint8_t *fill) {
    content_fill(job->page % arena.groups, job->sector, job->content, fill);
}

static int read_open(struct member *me) {
    struct tools *tools = me->own;
    tools->file = contents_file(O_RDONLY);
    return tools->file < 0 ? -errno : 0;
}

/* A read that a signal cuts short goes on where it stopped; 0 or a negative errno. */
static int read_whole(int file, uint8_t *to, int64_t offset) {
    for (size_t done = 0; done < SECTOR;) {
        ssize_t got = offset < 0 ? read(file, to + done, SECTOR - done)
                                 : pread(file, to + done, SECTOR - done, (off_t)(offset + (int64_t)done));
        if (got == 0)
            return -EPIPE;
        if (got < 0 && errno != EINTR)
            return -errno;
        done += got > 0 ? (size_t)got : 0;
    }
    return 0;
}

static int read_write(struct member *me, const struct job *jobs, uint32_t number) {
    struct tools *tools = me->own;
    int error = 0;
    for (uint32_t index = 0; index < number && !error; index++) {
        const struct job *job = jobs + index;
        uint64_t offset = file_offset(job->page % arena.groups, job->sector, job->content);
        error = read_whole(tools->file, sector_at(job->page, job->sector), (int64_t)offset);
    }
    return error;
}

static void file_close(struct member *me) { close(((struct tools *)me->own)->file); }

static int pipe_open(struct member *me) { return pipe2(((struct tools *)me->own)->pipe, O_CLOEXEC) ? -errno : 0; }

static int pipe_write(struct member *me, const struct job *jobs, uint32_t number) {
    struct tools *tools = me->own;
    int error = 0;
    for (uint32_t index = 0; index < number && !error; index++) {
        fill_for(jobs + index, tools->staging);
        if (write(tools->pipe[1], tools->staging, SECTOR) != SECTOR)
            return -errno;
        error = read_whole(tools->pipe[0], sector_at(jobs[index].page, jobs[index].sector), -1);
    }
    return error;
}

static void pipe_close(struct member *me) {
    close(((struct tools *)me->own)->pipe[0]);
    close(((struct tools *)me->own)->pipe[1]);
}

static int mem_open(struct member *me) {
    struct tools *tools = me->own;
    tools->file = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
    return tools->file < 0 ? -errno : 0;
}

/* A page in a window refuses /proc/PID/mem with EIO and nothing written (window.md section 3): try again, and count it. */
static int mem_write_at(int file, uint64_t to, const uint8_t *fill, uint64_t *again) {
    for (;;) {
        ssize_t put = pwrite(file, fill, SECTOR, (off_t)to);
        if (put == SECTOR)
            return 0;
        if (put >= 0 || (errno != EIO && errno != EINTR))
            return put >= 0 ? -EPROTO : -errno;
        ++*again;
        beat("writes again", (void *)to);
        sched_yield(); /* or it takes the core from the window it waits for */
    }
}

static int mem_write(struct member *me, const struct job *jobs, uint32_t number) {
    struct tools *tools = me->own;
    uint64_t again = 0;
    int error = 0;
    for (uint32_t index = 0; index < number && !error; index++) {
        fill_for(jobs + index, tools->staging);
        error = mem_write_at(tools->file, (uint64_t)sector_at(jobs[index].page, jobs[index].sector), tools->staging, &again);
    }
    count(&me->again, again);
    return error;
}

static int vm_write_to(int pid, const struct iovec *from, const struct iovec *to, uint32_t number) {
    ssize_t put = process_vm_writev(pid, from, number, to, number, 0);
    return put == (ssize_t)number * SECTOR ? 0 : put < 0 ? -errno : -EPROTO;
}

static int vm_write(struct member *me, const struct job *jobs, uint32_t number) {
    struct tools *tools = me->own;
    struct iovec from[32], to[32];
    for (uint32_t index = 0; index < number; index++) {
        from[index] = (struct iovec){tools->staging + index * SECTOR, SECTOR};
        to[index] = (struct iovec){sector_at(jobs[index].page, jobs[index].sector), SECTOR};
        fill_for(jobs + index, from[index].iov_base);
    }
    return vm_write_to(getpid(), from, to, number);
}

/* The other process: what to write, and how it went. */
struct order {
    uint64_t to;
    uint32_t by_memory; /* through /proc/PID/mem instead of process_vm_writev */
    int32_t error;
    uint64_t again;
    uint8_t fill[SECTOR];
};

static int remote_open(struct member *me) {
    struct tools *tools = me->own;
    char pid[16], descriptor[16];
    char *words[] = {"torture", SERVANT, pid, descriptor, NULL};
    int ends[2], child, error;
    posix_spawn_file_actions_t actions;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
        return -errno;
    snprintf(pid, sizeof pid, "%d", getpid());
    snprintf(descriptor, sizeof descriptor, "%d", ends[1]);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], ends[1]); /* to itself: takes close-on-exec away */
    error = posix_spawn(&child, "/proc/self/exe", &actions, NULL, words, environ);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    tools->servant = ends[0];
    tools->file = child;
    return -error;
}

static int remote_write(struct member *me, const struct job *jobs, uint32_t number) {
    struct tools *tools = me->own;
    struct order order;
    for (uint32_t index = 0; index < number; index++) {
        memset(&order, 0, sizeof order);
        order.to = (uint64_t)sector_at(jobs[index].page, jobs[index].sector);
        order.by_memory = below(&me->chance, 2);
        fill_for(jobs + index, order.fill);
        if (send(tools->servant, &order, sizeof order, MSG_NOSIGNAL) != sizeof order)
            return -errno;
        while (recv(tools->servant, &order, sizeof order, 0) != sizeof order)
            if (errno != EINTR)
                return -EPIPE;
        count(&me->again, order.again);
        if (order.error)
            return order.error;
    }
    return 0;
}

static void remote_close(struct member *me) {
    struct tools *tools = me->own;
    close(tools->servant);
    waitpid(tools->file, NULL, 0);
}

int servant_main(int pid, int socket) {
    struct order order;
    char path[40];
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    snprintf(path, sizeof path, "/proc/%d/mem", pid);
    int memory = open(path, O_RDWR | O_CLOEXEC);
    while (recv(socket, &order, sizeof order, 0) == sizeof order) {
        struct iovec from = {order.fill, SECTOR}, to = {(void *)order.to, SECTOR};
        order.error = order.by_memory ? mem_write_at(memory, order.to, order.fill, &order.again) : vm_write_to(pid, &from, &to, 1);
        if (send(socket, &order, sizeof order, MSG_NOSIGNAL) != sizeof order)
            break;
    }
    return 0;
}

const struct writer_kind writer_read = {
    .name = "read", .most_jobs = 2, .limit = FILE_CONTENTS - 1, .open = read_open, .write = read_write, .close = file_close};
const struct writer_kind writer_pipe = {
    .name = "pipe", .most_jobs = 2, .limit = UINT16_MAX, .open = pipe_open, .write = pipe_write, .close = pipe_close};
const struct writer_kind writer_mem = {
    .name = "mem", .most_jobs = 2, .limit = UINT16_MAX, .open = mem_open, .write = mem_write, .close = file_close};
const struct writer_kind writer_vm = {.name = "vm", .most_jobs = 16, .limit = UINT16_MAX, .write = vm_write};
const struct writer_kind writer_remote = {
    .name = "remote", .most_jobs = 1, .limit = UINT16_MAX, .open = remote_open, .write = remote_write, .close = remote_close};
