/* Own the figures: the line of progress, the table at the end, the same as JSON. */
#ifndef TORTURE_TALLY_H
#define TORTURE_TALLY_H

#include <stdint.h>

void tally_progress(double seconds);
void tally_end_progress(void);
void tally_table(double seconds);
void tally_json(double seconds);

#endif
