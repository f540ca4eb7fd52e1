/* Own the connection to the daemon.
 *
 * Everything is said by one thread, so the order of what the daemon hears is this thread's to decide. Why a region's
 * number and memory are always free again at the daemon when it hears of them (it drops clients that advise memory twice):
 *  1. Numbers grow; announce() first takes note of all numbers above the last it saw, then says UNADVISE for every region
 *     that is known to go (`gone`), then ADVISE for each new one that the registry still has and that is not closing.
 *  2. Whoever takes a region away first closes it, then puts it into `gone`, then removes it from the registry.
 *  3. So if a new region lies where an old one lay, the old one was in `gone` before the new one could be seen in the
 *     registry, and its UNADVISE goes first. A region that closes before its ADVISE is skipped; one that closes later is
 *     in `gone` after its ADVISE.
 * The thread holds `lock` only for a few instructions, never in a window or a system call that can wait.
 */
#define _GNU_SOURCE
#include "link.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "announce.h"
#include "command.h"
#include "extents.h"
#include "fault.h"
#include "packets.h"
#include "waiting.h"

#define BACK_OFF_MS 100u
#define BACK_OFF_MOST_MS 5000u
#define STUCK_MS 30000 /* a daemon that does not read for so long is as good as gone */
#define MOST_DESCRIPTORS 8u

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of these three; held for a few instructions */
static char wanted_path[PF_LINK_PATH];
static bool path_changed, stopping;

static atomic_bool running; /* the link's thread exists; set by the command thread */
static pthread_t thread;
static void *thread_stack;
static int kick_fd = -1;

static int link_fd = -1; /* from here on: of the link's thread */
static bool greeted;     /* WELCOME came */
static bool device_wanted;
static pid_t daemon_pid;
static uint64_t retry_at, back_off = BACK_OFF_MS;

static void drain_kicks(void) {
    uint64_t count;
    while (read(kick_fd, &count, sizeof count) == sizeof count)
        ;
}

/* Under Yama (scope 1) a process is read by its ancestors and by whom it names. `pid` 0: nobody more. */
static void let_read(pid_t pid) {
    char scope = 0;
    int fd = open("/proc/sys/kernel/yama/ptrace_scope", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    if (read(fd, &scope, 1) == 1 && scope == '1')
        prctl(PR_SET_PTRACER, (unsigned long)pid, 0, 0, 0);
    close(fd);
}

/* End the connection and what depended on it; memory stays as it is. `next` is what those who wait for a daemon may expect:
 * there must be no moment at which a daemon that we were just sent to looks lost. */
static void hang_up(bool soon, enum pf_link_phase next) {
    if (link_fd >= 0) {
        close(link_fd);
        link_fd = -1;
        if (daemon_pid > 0)
            let_read(0);
    }
    daemon_pid = 0;
    greeted = false;
    pf_announce_forget();
    pf_extents_release_all();
    if (soon)
        back_off = BACK_OFF_MS;
    retry_at = pf_now_ms() + back_off;
    back_off = back_off * 2 < BACK_OFF_MOST_MS ? back_off * 2 : BACK_OFF_MOST_MS;
    pf_waiting_lost(next);
}

/* Wait until the daemon takes more; false: it does not, or we are called away. */
static bool wait_to_send(void) {
    uint64_t until = pf_now_ms() + STUCK_MS;
    for (;;) {
        uint64_t now = pf_now_ms();
        struct pollfd wait = {link_fd, POLLOUT, 0};
        pthread_mutex_lock(&lock);
        bool away = stopping || path_changed;
        pthread_mutex_unlock(&lock);
        if (away || now >= until)
            return false;
        /* Half a second at a time: a kick must end this wait, but must not be swallowed by it. */
        int ready = poll(&wait, 1, 500);
        if (ready > 0)
            return (wait.revents & POLLOUT) != 0;
        if (ready < 0 && errno != EINTR)
            return false;
    }
}

bool pf_link_say(void *message, uint16_t type, size_t bytes) {
    struct pf_header *header = message;
    *header = (struct pf_header){PF_MAGIC, PF_VERSION, type, (uint32_t)bytes, 0};
    for (;;) {
        ssize_t sent = send(link_fd, message, bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent == (ssize_t)bytes)
            return true;
        if (sent >= 0 || (errno != EAGAIN && errno != EINTR))
            return false;
        if (errno == EAGAIN && !wait_to_send())
            return false;
    }
}

bool pf_announce_advise(const struct pf_region *region) {
    struct pf_advise_message message = {.region = region->id,
                                        .start = region->start,
                                        .pages = region->pages,
                                        .tracked = region->tracked,
                                        .quiet = region->quiet};
    bool sent = pf_link_say(&message, PF_ADVISE, sizeof message);
    PF_FAULT(PF_FAULT_LINK, 4);
    return sent;
}

bool pf_announce_unadvise(int64_t region) {
    struct pf_unadvise_message message = {.region = region};
    bool sent = pf_link_say(&message, PF_UNADVISE, sizeof message);
    PF_FAULT(PF_FAULT_LINK, 5);
    return sent;
}

static bool say_hello(void) {
    struct pf_hello hello = {.max_map_count = 65530};
    char number[32];
    int fd = open("/proc/sys/vm/max_map_count", O_RDONLY | O_CLOEXEC);
    ssize_t digits = fd >= 0 ? read(fd, number, sizeof number) : 0;
    if (fd >= 0)
        close(fd);
    uint64_t value = 0;
    for (ssize_t i = 0; i < digits && number[i] >= '0' && number[i] <= '9' && value < UINT32_MAX; i++)
        value = value * 10 + (uint64_t)(number[i] - '0');
    if (value > 0)
        hello.max_map_count = value < UINT32_MAX ? (uint32_t)value : UINT32_MAX;
    pf_agent_kit(&hello.windows_safe, &hello.why_errno, hello.why);
    hello.want_device = !hello.windows_safe && (hello.why_errno == -EPERM || hello.why_errno == -EACCES ||
                                                hello.why_errno == -ENOENT || hello.why_errno == -ENOSYS);
    device_wanted = hello.want_device;
    return pf_link_say(&hello, PF_HELLO, sizeof hello);
}

/* Connect and say hello. The daemon may read us before it hears anything: it opens /proc/PID/mem when it does. */
static void reach(const char *path) {
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    struct ucred peer;
    socklen_t size = sizeof peer;
    PF_FAULT(PF_FAULT_LINK, 1);
    link_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    memcpy(at.sun_path, path, strlen(path) + 1); /* shorter than PF_LINK_PATH, which is its room */
    if (link_fd < 0 || connect(link_fd, (struct sockaddr *)&at, sizeof at) ||
        getsockopt(link_fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) || (peer.uid != geteuid() && peer.uid != 0)) {
        hang_up(false, PF_LINK_DOWN);
        return;
    }
    daemon_pid = peer.pid;
    if (daemon_pid > 0)
        let_read(daemon_pid);
    if (!say_hello())
        hang_up(false, PF_LINK_DOWN);
    PF_FAULT(PF_FAULT_LINK, 2);
}

bool pf_link_say_syncs(void) {
    struct pf_sync message;
    memset(&message, 0, sizeof message);
    while (pf_waiting_next(pf_announced, &message.token, &message.region)) {
        if (!pf_link_say(&message, PF_SYNC, sizeof message))
            return false;
        PF_FAULT(PF_FAULT_LINK, 6);
    }
    return true;
}

static bool on_welcome(const struct pf_welcome *welcome, int fd) {
    if (welcome->zero || welcome->has_device > device_wanted || (welcome->has_device != 0) != (fd >= 0)) {
        if (fd >= 0)
            close(fd);
        return false;
    }
    PF_FAULT(PF_FAULT_LINK, 3);
    if (welcome->has_device) {
        uint32_t safe;
        int32_t why_errno;
        char why[PF_TEXT];
        pf_agent_open_kit(fd);
        close(fd);
        pf_agent_kit(&safe, &why_errno, why);
        if (safe) { /* HELLO is the first packet of a connection and no other: say anew what is true now */
            hang_up(true, PF_LINK_CONNECTING);
            retry_at = 0;
            return true;
        }
    }
    greeted = true;
    back_off = BACK_OFF_MS;
    pf_waiting_phase(PF_LINK_UP);
    return pf_announce() && pf_link_say_syncs();
}

/* Take the descriptors out of a message; more than one is nonsense and all are closed. */
static int descriptor_of(struct msghdr *message, bool *nonsense) {
    int kept = -1;
    for (struct cmsghdr *at = CMSG_FIRSTHDR(message); at; at = CMSG_NXTHDR(message, at)) {
        if (at->cmsg_level != SOL_SOCKET || at->cmsg_type != SCM_RIGHTS)
            continue;
        for (size_t i = 0; i < (at->cmsg_len - CMSG_LEN(0)) / sizeof(int); i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(at) + i * sizeof fd, sizeof fd);
            if (kept < 0) {
                kept = fd;
            } else {
                close(fd);
                *nonsense = true;
            }
        }
    }
    if (*nonsense && kept >= 0) {
        close(kept);
        kept = -1;
    }
    return kept;
}

/* Take one packet. False: there is none now. A daemon that goes, or talks nonsense, is hung up on. */
static bool receive(void) {
    static union pf_packet packet;
    char control[CMSG_SPACE(MOST_DESCRIPTORS * sizeof(int))];
    struct iovec into = {&packet, sizeof packet};
    struct msghdr message = {.msg_iov = &into, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t bytes = recvmsg(link_fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (bytes < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    if (bytes <= 0) {
        hang_up(greeted, PF_LINK_DOWN);
        return false;
    }
    bool nonsense = (message.msg_flags & MSG_TRUNC) != 0;
    int fd = descriptor_of(&message, &nonsense);
    bool lost = (message.msg_flags & MSG_CTRUNC) != 0, fine = false;
    if (!nonsense && pf_packet_fits(&packet, (size_t)bytes)) {
        if (greeted)
            fine = pf_packet_do(&packet, fd, lost);
        else if (packet.header.type == PF_WELCOME)
            fine = on_welcome(&packet.welcome, fd);
        else if (fd >= 0)
            close(fd);
    } else if (fd >= 0) {
        close(fd);
    }
    if (!fine) {
        if (link_fd >= 0)
            hang_up(false, PF_LINK_DOWN);
        return false;
    }
    return link_fd >= 0;
}

/* Follow what we were told since the last look: end, another daemon. False: end. */
static bool follow_orders(char path[PF_LINK_PATH]) {
    pthread_mutex_lock(&lock);
    bool end = stopping, elsewhere = path_changed;
    path_changed = false;
    memcpy(path, wanted_path, PF_LINK_PATH);
    pthread_mutex_unlock(&lock);
    if (end || elsewhere) {
        hang_up(true, !end && path[0] ? PF_LINK_CONNECTING : PF_LINK_NONE);
        retry_at = 0;
    }
    return !end;
}

/* Milliseconds until something is to be done even if nobody calls; -1: nothing is. */
static int patience(bool wanted) {
    const uint64_t due = link_fd >= 0 ? pf_announce_again() : retry_at, now = pf_now_ms();
    if (link_fd >= 0 ? !due : !wanted)
        return -1;
    return due > now ? (int)(due - now) : 0;
}

static void *link_main(void *nothing) {
    (void)nothing;
    char path[PF_LINK_PATH];
    prctl(PR_SET_NAME, "pagefold-link", 0, 0, 0);
    while (follow_orders(path)) {
        uint64_t now = pf_now_ms();
        if (link_fd < 0 && path[0] && now >= retry_at)
            reach(path);
        struct pollfd on[2] = {{kick_fd, POLLIN, 0}, {link_fd, POLLIN, 0}};
        if (poll(on, link_fd >= 0 ? 2 : 1, patience(path[0])) < 0 && errno != EINTR)
            break; /* no memory for a poll: nothing can be done here any more */
        if (on[0].revents || (greeted && patience(true) == 0)) {
            drain_kicks();
            if (greeted && !(pf_announce() && pf_link_say_syncs()))
                hang_up(true, PF_LINK_DOWN);
        }
        if (link_fd >= 0 && on[1].revents)
            for (int packets = 0; packets < 16 && receive(); packets++)
                ;
    }
    hang_up(true, PF_LINK_NONE);
    return NULL;
}

int pf_link_go(const char *path) {
    if (strlen(path) >= PF_LINK_PATH)
        return -ENAMETOOLONG;
    pthread_mutex_lock(&lock);
    bool same = strcmp(wanted_path, path) == 0 && running;
    if (!same || pf_waiting_phase_now() == PF_LINK_DOWN) { /* asked again: no need to wait for the next try */
        strcpy(wanted_path, path);
        path_changed = true;
        pf_waiting_phase(path[0] ? PF_LINK_CONNECTING : PF_LINK_NONE);
    }
    stopping = false;
    pthread_mutex_unlock(&lock);
    int error = 0;
    if (!running && path[0]) {
        if (kick_fd < 0)
            kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        error = kick_fd < 0 ? -errno : pf_thread_start(&thread, &thread_stack, link_main);
        running = error == 0;
        if (error)
            pf_waiting_phase(PF_LINK_NONE);
    }
    pf_link_kick();
    return error;
}

void pf_link_kick(void) {
    uint64_t one = 1;
    if (running)
        while (write(kick_fd, &one, sizeof one) < 0 && errno == EINTR)
            ; /* EAGAIN: kicked 2^64 times already, which is kicked enough */
}

void pf_link_stop(void) {
    pthread_mutex_lock(&lock);
    stopping = true;
    pthread_mutex_unlock(&lock);
    if (running) {
        pf_link_kick();
        pthread_join(thread, NULL);
        running = false;
    }
    if (kick_fd >= 0)
        close(kick_fd);
    kick_fd = -1;
}

void pf_link_child(void) {
    pthread_mutex_init(&lock, NULL);
    wanted_path[0] = 0;
    path_changed = stopping = greeted = false;
    running = false;
    kick_fd = link_fd = -1;
    daemon_pid = 0;
    retry_at = 0;
    back_off = BACK_OFF_MS;
    pf_waiting_child();
    pf_announce_child();
    pf_extents_child();
}
