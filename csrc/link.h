/* Own the connection to the daemon: the thread "pagefold-link", what it says and answers, the extents it was given.
 * Must not know how windows work, or the embedded store.
 */
#ifndef PF_LINK_H
#define PF_LINK_H

#include <stdbool.h>
#include <stdint.h>
#include "agent.h"

#define PF_LINK_EXTENTS 0x7fffffffu /* extents of daemons are numbered 1 to this in this process; those above are the embedded store's */
#define PF_LINK_PATH 108u           /* bytes of a socket's path with its end */

/* From the command thread only: */
int pf_link_go(const char *path); /* connect to that daemon from now on; "": to none. 0, or a negative errno */
void pf_link_kick(void);          /* (also from the link's own thread) regions came or went, or someone waits for a merge */
void pf_link_stop(void);          /* end the thread; extents and socket are closed, memory stays as it is */

/* From any thread: */
bool pf_link_connected(void);
/* Have the daemon merge a region now and wait for its report. -ENOTCONN: there is none (or it went), -ETIMEDOUT, -ENOENT:
 * no such region; or what the daemon refused with. No plain swap is under way in the region when this returns. */
int pf_link_merge(int64_t region, uint64_t timeout_ms, struct pf_report *report);
/* In a forked child: there is no thread and no connection. */
void pf_link_child(void);

/* What HELLO says of windows here; agent.c. The second opens the kit with a descriptor of /dev/userfaultfd. */
void pf_agent_kit(uint32_t *windows_safe, int32_t *why_errno, char why[PF_TEXT]);
void pf_agent_open_kit(int device);

#endif
