/* Own memory for NumPy's arrays (NEP 49; the functions themselves are in agent.h). */
#ifndef PF_ARRAY_H
#define PF_ARRAY_H

#include <stdbool.h>
#include <stdint.h>

/* About once a second, in the command thread: advise what has lived long enough, give back a cache that nobody uses.
 * False: nothing to look after. */
bool pf_array_tick(void);
/* A young block that holds this address becomes a region now: what is asked of it is asked of that one. Command thread only. */
void pf_array_grow_up(uint64_t address);
bool pf_array_any(void); /* there is something to look after, though nobody may have been there to hear it */
void pf_array_before_fork(void);
void pf_array_after_fork(bool child);

/* agent.c: advise memory of which is known that it can be merged; command thread only. */
int64_t pf_agent_advise(uint64_t start, uint64_t bytes, uint32_t quietly, uint32_t vma);

#endif
