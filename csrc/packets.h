/* Own what the daemon's packets mean: they are checked here, and done. Must not know how a connection comes and goes. */
#ifndef PF_PACKETS_H
#define PF_PACKETS_H

#include <stdbool.h>
#include <stddef.h>
#include "messages.h"

union pf_packet {
    struct pf_header header;
    struct pf_welcome welcome;
    struct pf_extent extent;
    struct pf_windows windows;
    struct pf_release release;
    struct pf_synced synced;
};

/* Do what a packet that came after WELCOME says; false: whoever sent it is no daemon of this version. `fd` is a descriptor
 * that came along, ours from now on, or -1; `lost`: there were more than could be kept here. */
bool pf_packet_do(const union pf_packet *packet, int fd, bool lost);
/* Whether the header and the size are those of a packet that daemons send. */
bool pf_packet_fits(const union pf_packet *packet, size_t bytes);

/* How it is answered: link.c. Fills in the header. False: it could not be said, the connection must end. */
bool pf_link_say(void *message, uint16_t type, size_t bytes);
/* Ask the daemon for merges that someone waits for; the same. */
bool pf_link_say_syncs(void);

#endif
