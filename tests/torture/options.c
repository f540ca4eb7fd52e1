/* Own the reading of the command line. */
#include "options.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "adverse.h"
#include "door.h"

struct options options;

static const char usage[] =
    "Usage: torture [OPTION]...\n"
    "Write and verify memory in every way there is while it is merged, given back, advised and un-advised.\n\n"
    "  --seconds S     end after S seconds (10; 0: only by --windows)\n"
    "  --windows N     end after N windows\n"
    "  --pages N       pages of the arena (4096)\n"
    "  --run N         most pages of a window (64)\n"
    "  --copies N      pages of equal content (2)\n"
    "  --threads N     writers (two that store, one of each other kind)\n"
    "  --kinds LIST    what runs, commas between; with '-' in front: all but these (all but rawfork and limit)\n"
    "                  writers:  store read pipe direct uring mem vm remote\n"
    "                  readers:  look write vmread memread directwrite uringwrite\n"
    "                  children: fork forkmerge vfork spawn exec rawfork\n"
    "                  trouble:  churn signal scan advice migrate huge limit\n"
    "  --seed N        of all chance\n"
    "  --spread P      percent of the writes that go anywhere, not to the hot place\n"
    "  --calm P        percent of the time in which writers and readers sleep (50)\n"
    "  --fork-pause M  most milliseconds between two children (60)\n"
    "  --windows-by D  agent, none, or specimen:FAULT (a window broken on purpose)\n"
    "  --daemon PATH   through the agent and the daemon at this socket\n"
    "  --embedded      through the agent and its embedded store\n"
    "  --huge          huge pages\n"
    "  --directory D   for files that are read with O_DIRECT (.)\n"
    "  --delay U       hold the window up at its system calls, at most U microseconds\n"
    "  --lie N         tell one of N complete moves as failed\n"
    "  --refuse N      let one of N of the window's system calls fail\n"
    "  --until-wrong   end as soon as something is wrong\n"
    "  --hang S        a thread that does nothing for S seconds hangs (60)\n"
    "  --json          the result as JSON     --quiet  no progress\n\n"
    "Ends with 0, with 1 if a byte was wrong or a call failed, 2 on bad usage, 3 if something hangs, 4 if no window is possible.\n";

static void mistaken(const char *text, const char *value) {
    fprintf(stderr, "torture: %s%s%s; see --help\n", text, value ? ": " : "", value ? value : "");
    exit(2);
}

static double number(const char *text, double least, double most) {
    char *end;
    errno = 0;
    double value = strtod(text, &end);
    if (end == text || *end || errno || !(value >= least && value <= most))
        mistaken("not a number that can be used here", text);
    return value;
}

static int listed(const char *list, const char *name) {
    size_t length = strlen(name);
    for (const char *at = list; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        if (!strncmp(at, name, length) && (at[length] == ',' || !at[length]))
            return 1;
    return 0;
}

int options_kind(const char *name) {
    int special = !strcmp(name, "rawfork") || !strcmp(name, "limit"); /* only when asked for: windows cannot stand the one */
    if (!options.kinds)
        return !special;
    if (options.kinds[0] == '-')
        return !special && !listed(options.kinds + 1, name);
    return listed(options.kinds, name);
}

static const char *const all_kinds[] = {
    "store", "read",  "pipe",      "direct", "uring", "mem",     "vm",          "remote",     /* writers */
    "look",  "write", "vmread",    "memread", "directwrite", "uringwrite",                    /* readers */
    "fork",  "vfork", "forkmerge", "spawn",  "exec",  "rawfork",                              /* children */
    "churn", "signal", "huge",     "limit",  "scan",  "advice",  "migrate",                   /* trouble */
};

int options_memory_may_fail(void) { return options.refuse || options_kind("limit"); }

static void check_kinds(void) {
    char *list = strdup(options.kinds + (options.kinds[0] == '-'));
    for (char *name = strtok(list, ","); name; name = strtok(NULL, ",")) {
        int known = 0;
        for (size_t kind = 0; kind < sizeof all_kinds / sizeof *all_kinds; kind++)
            known |= !strcmp(all_kinds[kind], name);
        if (!known)
            mistaken("no such kind", name);
    }
    free(list);
}

static void check(void) {
    if (options.kinds)
        check_kinds();
    if (!strncmp(options.windows_by, "specimen:", 9)) {
        if (specimen_choose(options.windows_by + 9))
            mistaken("no such fault", options.windows_by + 9);
    } else if (strcmp(options.windows_by, "agent") && strcmp(options.windows_by, "none"))
        mistaken("no such windows", options.windows_by);
    if ((options.delay || options.lie || options.refuse) && !adverse_built())
        mistaken("--delay, --lie and --refuse need the program torture-adverse", NULL);
    options.pages -= options.pages % (options.copies * 128);
    if (!options.pages)
        mistaken("too few pages for so many copies", NULL);
    int direct_mode = !options.daemon && !options.embedded;
    options.spread = options.spread < 0 ? (direct_mode ? 5 : 0.2) : options.spread;
    options.calm = options.calm < 0 ? 50 : options.calm;
}

enum {
    SECONDS = 1, WINDOWS, PAGES, RUN, COPIES, THREADS, KINDS, SEED, SPREAD, CALM, FORK_PAUSE, BY, DAEMON, DIRECTORY, DELAY, LIE,
    REFUSE, HANG, HELP
};

static const struct option words[] = {{"seconds", 1, 0, SECONDS},
                                      {"windows", 1, 0, WINDOWS},
                                      {"pages", 1, 0, PAGES},
                                      {"run", 1, 0, RUN},
                                      {"copies", 1, 0, COPIES},
                                      {"threads", 1, 0, THREADS},
                                      {"kinds", 1, 0, KINDS},
                                      {"seed", 1, 0, SEED},
                                      {"spread", 1, 0, SPREAD},
                                      {"calm", 1, 0, CALM},
                                      {"fork-pause", 1, 0, FORK_PAUSE},
                                      {"windows-by", 1, 0, BY},
                                      {"daemon", 1, 0, DAEMON},
                                      {"directory", 1, 0, DIRECTORY},
                                      {"delay", 1, 0, DELAY},
                                      {"lie", 1, 0, LIE},
                                      {"refuse", 1, 0, REFUSE},
                                      {"hang", 1, 0, HANG},
                                      {"embedded", 0, &options.embedded, 1},
                                      {"json", 0, &options.json, 1},
                                      {"huge", 0, &options.huge, 1},
                                      {"quiet", 0, &options.quiet, 1},
                                      {"until-wrong", 0, &options.until_wrong, 1},
                                      {"help", 0, 0, HELP},
                                      {0}};

void options_read(int count, char **arguments) {
    int word;
    options = (struct options){.seconds = 10, .pages = 4096, .run = 64, .copies = 2, .spread = -1, .calm = -1,
                               .fork_pause = 60, .hang = 60,
                               .windows_by = "agent", .directory = ".", .seed = (uint64_t)time(NULL) % 1000000};
    while ((word = getopt_long(count, arguments, "", words, NULL)) != -1)
        switch (word) {
        case SECONDS: options.seconds = number(optarg, 0, 1e9); break;
        case WINDOWS: options.windows = (uint64_t)number(optarg, 0, 1e15); break;
        case PAGES: options.pages = (uint32_t)number(optarg, 1, 1 << 20); break;
        case RUN: options.run = (uint32_t)number(optarg, 1, 64); break;
        case COPIES: options.copies = (uint32_t)number(optarg, 1, 8); break;
        case THREADS: options.threads = (uint32_t)number(optarg, 1, 40); break;
        case KINDS: options.kinds = optarg; break;
        case SEED: options.seed = (uint64_t)number(optarg, 0, 1e15); break;
        case SPREAD: options.spread = number(optarg, 0, 100); break;
        case CALM: options.calm = number(optarg, 0, 99); break;
        case FORK_PAUSE: options.fork_pause = (uint32_t)number(optarg, 0, 60000); break;
        case BY: options.windows_by = optarg; break;
        case DAEMON: options.daemon = optarg; break;
        case DIRECTORY: options.directory = optarg; break;
        case DELAY: options.delay = (uint32_t)number(optarg, 0, 1000000); break;
        case LIE: options.lie = (uint32_t)number(optarg, 0, 1e9); break;
        case REFUSE: options.refuse = (uint32_t)number(optarg, 0, 1e9); break;
        case HANG: options.hang = (uint32_t)number(optarg, 1, 100000); break;
        case HELP: fputs(usage, stdout); exit(0);
        case 0: break;
        default: exit(2);
        }
    if (optind < count)
        mistaken("no such argument", arguments[optind]);
    if (!options.seconds && !options.windows)
        mistaken("it would never end: give --seconds or --windows", NULL);
    check();
}
