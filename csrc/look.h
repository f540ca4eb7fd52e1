/* Own when the mappings of regions are looked at: those that were added unseen, all in one reading of smaps, as late as
 * can be. Until then, and for ever if they do not suit, nothing touches them: no tracking, no window, no word to the daemon.
 * So a program may advise thousands of arrays, one after the other, for the price of a few readings.
 *
 * Call these from the agent's own threads only: they open files.
 */
#ifndef PF_LOOK_H
#define PF_LOOK_H

#include <stdint.h>

/* Look at the regions that are unseen now, up to some thousands, and track those that suit. 0; or a negative errno why it could
 * not be done, which passes: they stay unseen. */
int pf_look(void);
/* Look until this region was seen: 0 it suits, else a negative errno of pf_suitable; -ENOENT. Or what pf_look returns. */
int pf_look_at(int64_t region);
/* In a forked child. */
void pf_look_child(void);

#endif
