/* Own which regions the daemon knows of: says the new ones and those that went, in an order that is always consistent
 * (link.c begins with the argument). Must not know sockets.
 */
#ifndef PF_ANNOUNCE_H
#define PF_ANNOUNCE_H

#include <stdbool.h>
#include <stdint.h>
#include "regions.h"

/* A region is closed and will be removed: to be called between the two, from any thread. Never blocks or fails. */
void pf_announce_gone(int64_t region);

/* From the link's thread: */
bool pf_announce(void);             /* say what is new since the last call; false: the connection must end */
uint64_t pf_announce_again(void);   /* pf_now_ms at which to try again, without a kick; 0: no need */
bool pf_announced(int64_t region);  /* the daemon knows it */
void pf_announce_forget(void);      /* the daemon is gone, and another will know nothing */
void pf_announce_child(void);

/* How it is said: link.c. False: it could not be. */
bool pf_announce_advise(const struct pf_region *region);
bool pf_announce_unadvise(int64_t region);

#endif
