/* Own the look at /proc/self/maps: whether the arena is again what it was before anything was merged. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "arena.h"
#include "merger.h"

uint64_t foreign_pages(uint32_t page, uint32_t pages) {
    uint64_t first = (uint64_t)page_at(page), end = (uint64_t)page_at(page + pages), plain = 0, from, to, inode;
    char line[512], access[8];
    FILE *maps = fopen("/proc/thread-self/maps", "re");
    while (maps && fgets(line, sizeof line, maps)) {
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %7s %*x %*s %" SCNu64, &from, &to, access, &inode) != 4)
            continue;
        from = from < first ? first : from;
        to = to > end ? end : to;
        if (from < to && inode == 0 && !strcmp(access, "rw-p"))
            plain += (to - from) / PF_PAGE;
    }
    if (maps)
        fclose(maps);
    return pages - plain;
}
