/* Own the extents of the daemon's store that this process was given: descriptor, read-only view, and a number of our own.
 * Used by the link's thread only. Must not know messages or windows.
 *
 * A daemon may count its extents like the daemon before it; `where` in the registry outlives daemons. So every extent that
 * arrives gets a number that never comes again in this process, nor in processes forked from it.
 */
#ifndef PF_EXTENTS_H
#define PF_EXTENTS_H

#include <stdbool.h>
#include <stdint.h>

struct pf_extent_view {
    uint32_t theirs; /* the daemon's number */
    uint32_t ours;
    uint32_t slots;
    int fd;               /* -1: it could not be kept (limits); runs to it are answered PF_NO_VMA */
    const uint8_t *bytes; /* all slots, mapped read-only and shared */
    bool looked;          /* at some of it, since pf_extents_drop */
};

/* Take an extent over. The descriptor is ours from now on. -EINVAL: it is no sealed memory file of this size, or the number
 * is taken; the daemon talks nonsense. An extent that only our limits keep out is taken without a view (fd -1). */
int pf_extent_take(uint32_t theirs, uint32_t slots, int fd);
struct pf_extent_view *pf_extent_find(uint32_t theirs);
/* Map slots in the view now, so that a window need not: false where that cannot be (then a window would end in SIGBUS). */
bool pf_extent_look(struct pf_extent_view *extent, uint32_t slot, uint32_t count);
/* Unmap again what was looked at: a client's memory must not count slots that no page of it maps. */
void pf_extents_drop(void);
bool pf_extent_release(uint32_t theirs); /* false: no such extent */
void pf_extents_release_all(void);
void pf_extents_child(void); /* in a forked child: descriptors and views are not there */

#endif
