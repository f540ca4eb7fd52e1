/* Own the thread that reads the events of the hold userfaultfd while memory is given back: see 5 in restore.c. Must not know
 * regions or slots.
 *
 * It runs only during a pf_restore, works with a descriptor of its own (the kit may be closed meanwhile), and makes nothing
 * but system calls.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <unistd.h>
#include "kit.h"

/* Read events, which lets mremap return. Faults are read too, and waited for nowhere: the end of the registration wakes
 * their threads. */
static void *listen_on(void *argument) {
    const struct pf_listener *listener = argument;
    struct pollfd ready[2] = {{.fd = listener->uffd, .events = POLLIN}, {.fd = listener->stop[0], .events = POLLIN}};
    uint64_t message[4]; /* struct uffd_msg: 32 bytes */
    while (!ready[1].revents)
        if (poll(ready, 2, -1) > 0 && ready[0].revents && read(listener->uffd, message, sizeof message) < 0)
            continue; /* somebody was quicker, or a signal; ending here would leave mremap waiting */
    return NULL;
}

static void close_all(const struct pf_listener *listener) {
    close(listener->uffd);
    close(listener->stop[0]);
    close(listener->stop[1]);
}

void pf_listener_start(struct pf_listener *listener) {
    pthread_attr_t attributes;
    pf_w_lock();
    listener->kit = pf_kit.number;
    listener->uffd = pf_kit.ready ? dup(pf_kit.hold) : -1;
    pf_w_unlock();
    listener->runs = false;
    if (listener->uffd < 0)
        return;
    if (pipe(listener->stop)) {
        close(listener->uffd);
        return;
    }
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 256 * 1024);
    listener->runs = !pthread_create(&listener->thread, &attributes, listen_on, listener);
    pthread_attr_destroy(&attributes);
    if (!listener->runs)
        close_all(listener);
}

void pf_listener_stop(struct pf_listener *listener) {
    if (!listener->runs)
        return;
    while (write(listener->stop[1], "", 1) < 0 && errno == EINTR)
        ;
    pthread_join(listener->thread, NULL);
    close_all(listener);
    listener->runs = false;
}

bool pf_listener_serves(const struct pf_listener *listener) {
    return listener->runs && pf_kit.ready && listener->kit == pf_kit.number;
}
