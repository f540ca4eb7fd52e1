/* Own who waits for the daemon: callers of pf_merge, and whether there is a daemon to wait for. Must not know sockets.
 *
 * A plain swap (without windows) is allowed only while someone waits for that region's merge: he promised that nobody writes
 * to it until he is answered. So he is not answered, and does not give up, while one is under way.
 */
#ifndef PF_WAITING_H
#define PF_WAITING_H

#include <stdbool.h>
#include <stdint.h>
#include "messages.h"

enum pf_link_phase { PF_LINK_NONE, PF_LINK_CONNECTING, PF_LINK_UP, PF_LINK_DOWN };

void pf_waiting_phase(enum pf_link_phase phase);
enum pf_link_phase pf_waiting_phase_now(void);
/* The connection is lost: all who wait for an answer are told. */
void pf_waiting_lost(enum pf_link_phase next);

/* From the link's thread: */
/* Take the next merge that the daemon was not asked for yet; false: none, or it was asked for enough at a time. `known`
 * says whether the daemon knows the region. If not, it will be told of it (and this is asked again then), or the region went,
 * and then the caller is answered. */
bool pf_waiting_next(bool (*known)(int64_t region), uint64_t *token, int64_t *region);
void pf_waiting_answer(const struct pf_synced *synced);
/* Begin a plain swap in a region; false: nobody promised anything. */
bool pf_waiting_begin_plain(int64_t region);
void pf_waiting_end_plain(void);

void pf_waiting_child(void);

#endif
