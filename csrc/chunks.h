/* Own the embedded store: memory files ("chunks") that a family of processes fills together, one slot per page.
 * Of the command thread. Must not know regions or hashes.
 *
 * A chunk is never punched and no slot is used twice. Its memory goes when no process maps it and none has it open; so each
 * process closes the chunks that none of its pages maps, and the kernel does the counting, also for forks it was not told of.
 * A forked child has the mappings but not the descriptors (they are in its parent's private table): it opens them through
 * /proc/PID/task/TID/fd of whoever in the family has them. If nobody has, that chunk is not filled or mapped any more.
 */
#ifndef PF_CHUNKS_H
#define PF_CHUNKS_H

#include <stdbool.h>
#include <stdint.h>
#include "index.h"
#include "window.h"

/* With the index locked: give out up to `count` neighbouring slots, write `bytes` into them, and return how many were (0:
 * no memory, or no descriptors). They are `number`, `slot` and following. */
uint32_t pf_chunk_write(struct pf_family *family, const uint8_t *bytes, uint32_t count, uint32_t *number, uint32_t *slot);
/* With the index locked: true if slots of that chunk can be mapped here; opens it if need be. */
bool pf_chunk_usable(struct pf_family *family, uint32_t number);
/* Without it: what a window needs. Only after pf_chunk_usable or pf_chunk_write said so. */
struct pf_target pf_chunk_target(uint32_t number, uint32_t slot, uint32_t count);
/* Unmap again what was looked at. */
void pf_chunks_drop(void);
/* Find out which chunks pages of this process map; then, with the index locked, close the others. */
void pf_chunks_mark(void);
void pf_chunks_collect(struct pf_family *family);
/* Close all; then, with the index locked, leave the family's list. */
void pf_chunks_shut(void);
void pf_chunks_leave(struct pf_family *family);
bool pf_chunks_any(void); /* some are open here */
void pf_chunks_child(void);

#endif
