/* Own the file that holds contents 0 to 3 of every sector: read(2), O_DIRECT and io_uring bring them into the arena from there. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "arena.h"
#include "options.h"
#include "trades.h"
#include "verdict.h"

static char path[4096];
static int direct_works;

static void fill_file(int file) {
    uint64_t block_bytes = (uint64_t)PER_PAGE * FILE_CONTENTS * SECTOR;
    uint8_t *block = malloc(block_bytes);
    for (uint32_t group = 0; group < arena.groups; group++) {
        for (uint32_t sector = 0; sector < PER_PAGE; sector++)
            for (uint32_t content = 0; content < FILE_CONTENTS; content++)
                content_fill(group, sector, content, block + file_offset(0, sector, content));
        if (!block || pwrite(file, block, block_bytes, (off_t)file_offset(group, 0, 0)) != (ssize_t)block_bytes) {
            tell("torture: cannot write in %s: %s; give another --directory", options.directory, strerror(errno));
            exit(2);
        }
    }
    free(block);
    fsync(file);
}

int contents_probe(void) {
    void *probe = NULL;
    snprintf(path, sizeof path, "%s/torture-XXXXXX", options.directory);
    int file = mkstemp(path);
    if (file < 0 || posix_memalign(&probe, PF_PAGE, PF_PAGE))
        return 0;
    unlink(path); /* so that nothing is left, however this ends; it is opened again through /proc */
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    memset(probe, 0, PF_PAGE);
    int direct = pwrite(file, probe, PF_PAGE, 0) == PF_PAGE ? contents_file(O_RDWR | O_DIRECT) : -1;
    direct_works = direct >= 0 && pread(direct, (uint8_t *)probe + SECTOR, SECTOR, SECTOR) == SECTOR;
    if (direct >= 0)
        close(direct);
    free(probe);
    return 1;
}

void contents_open(void) {
    int file = contents_file(O_RDWR);
    fill_file(file);
    close(file);
}

int contents_file(int flags) { return open(path, flags | O_CLOEXEC); }

int contents_direct(void) { return direct_works; }
