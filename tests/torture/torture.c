/* Own the course of the program: set up, let everyone loose, call them home, verify, give everything back, verify again, say so. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "arena.h"
#include "crew.h"
#include "merger.h"
#include "options.h"
#include "tally.h"
#include "trades.h"
#include "verdict.h"

#ifndef PR_SET_PTRACER_ANY
#define PR_SET_PTRACER_ANY ((unsigned long)-1)
#endif

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void asked_to_end(int number) {
    (void)number;
    atomic_store(&crew_ending, 1);
}

static void set_up(void) {
    struct sigaction action = {.sa_handler = asked_to_end};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0); /* the servant writes here; EINVAL without Yama */
    if (verdict_open() || !contents_probe()) {
        tell("torture: no memory, or no file in %s", options.directory);
        exit(2);
    }
    uint32_t owners = writers_number();
    if (arena_open(options.pages, options.copies, owners ? owners : 1, options.huge)) {
        tell("torture: no memory for %u pages", options.pages);
        exit(2);
    }
    contents_open();
    arena_fill();
}

/* Until the time is up, enough is wrong, or someone else says so. */
static double run(void) {
    double began = now(), told = 0;
    while (!atomic_load(&crew_ending)) {
        double since = now() - began;
        if ((options.seconds > 0 && since >= options.seconds) || verdict_enough() || atomic_load(&merger_open) < 0)
            atomic_store(&crew_ending, 1);
        if (since - told >= 0.5) {
            tally_progress(since);
            told = since;
        }
        usleep(20000);
    }
    return now() - began;
}

static void come_home(void) {
    crew_join(trouble_run);
    crew_join(child_run);
    crew_join(reader_run);
    crew_join(writer_run);
    arena_verify("the end, before all is given back", NULL, NULL);
    atomic_store(&merger_finish, 1);
    crew_join(NULL);
    arena_verify("the end, after all was given back", NULL, NULL);
}

int main(int count, char **words) {
    if (count == 4 && !strcmp(words[1], SERVANT))
        return servant_main(atoi(words[2]), atoi(words[3]));
    if (count == 2 && !strcmp(words[1], NOTHING))
        return 0;
    options_read(count, words);
    set_up();
    if (options.daemon || options.embedded)
        client_begin();
    else
        merger_begin();
    crew_watch();
    while (!atomic_load(&merger_open))
        usleep(1000);
    if (atomic_load(&merger_open) > 0) {
        writers_begin();
        readers_begin();
        children_begin();
        trouble_begin();
    }
    double seconds = run();
    come_home();
    crew_watch_end();
    tally_end_progress();
    if (atomic_load(&merger_open) < 0) {
        tell("torture: no window is possible here: %s", merger_why);
        return 4;
    }
    (options.json ? tally_json : tally_table)(seconds);
    return verdict_bad() ? 1 : 0;
}
