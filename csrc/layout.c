/* Own the text that says where every field of every message and public struct lies: Python's tests compare it with theirs. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>

#include "agent.h"
#include "messages.h"

struct place {
    const char *name; /* of a field; of the struct where `offset` is -1 */
    int offset;
    int size;
};

#define STRUCT(type, name) {name, -1, (int)sizeof(struct type)}
#define FIELD(type, field) {#field, (int)offsetof(struct type, field), 0}

static const struct place places[] = {
    STRUCT(pf_header, "header"), FIELD(pf_header, magic), FIELD(pf_header, version), FIELD(pf_header, type),
    FIELD(pf_header, length), FIELD(pf_header, zero),

    STRUCT(pf_hello, "hello"), FIELD(pf_hello, header), FIELD(pf_hello, windows_safe), FIELD(pf_hello, why_errno),
    FIELD(pf_hello, want_device), FIELD(pf_hello, max_map_count), FIELD(pf_hello, why),

    STRUCT(pf_welcome, "welcome"), FIELD(pf_welcome, header), FIELD(pf_welcome, has_device), FIELD(pf_welcome, zero),

    STRUCT(pf_advise_message, "advise_message"), FIELD(pf_advise_message, header), FIELD(pf_advise_message, region),
    FIELD(pf_advise_message, start), FIELD(pf_advise_message, pages), FIELD(pf_advise_message, tracked),
    FIELD(pf_advise_message, quiet),

    STRUCT(pf_unadvise_message, "unadvise_message"), FIELD(pf_unadvise_message, header),
    FIELD(pf_unadvise_message, region),

    STRUCT(pf_run, "run"), FIELD(pf_run, region), FIELD(pf_run, start), FIELD(pf_run, pages), FIELD(pf_run, extent),
    FIELD(pf_run, slot), FIELD(pf_run, zero),

    STRUCT(pf_windows, "windows"), FIELD(pf_windows, header), FIELD(pf_windows, batch), FIELD(pf_windows, count),
    FIELD(pf_windows, plain), FIELD(pf_windows, runs),

    STRUCT(pf_outcome, "outcome"), FIELD(pf_outcome, header), FIELD(pf_outcome, batch), FIELD(pf_outcome, pages),
    FIELD(pf_outcome, zero), FIELD(pf_outcome, status),

    STRUCT(pf_extent, "extent"), FIELD(pf_extent, header), FIELD(pf_extent, extent), FIELD(pf_extent, slots),
    FIELD(pf_extent, node), FIELD(pf_extent, zero),

    STRUCT(pf_release, "release"), FIELD(pf_release, header), FIELD(pf_release, extent), FIELD(pf_release, zero),

    STRUCT(pf_sync, "sync"), FIELD(pf_sync, header), FIELD(pf_sync, token), FIELD(pf_sync, region),

    STRUCT(pf_synced, "synced"), FIELD(pf_synced, header), FIELD(pf_synced, token), FIELD(pf_synced, error),
    FIELD(pf_synced, zero), FIELD(pf_synced, pages), FIELD(pf_synced, by_status), FIELD(pf_synced, zero_pages),
    FIELD(pf_synced, saved_bytes),

    STRUCT(pf_state, "state"), FIELD(pf_state, size), FIELD(pf_state, started), FIELD(pf_state, connected),
    FIELD(pf_state, windows_safe), FIELD(pf_state, why_errno), FIELD(pf_state, regions), FIELD(pf_state, region_pages),
    FIELD(pf_state, windows), FIELD(pf_state, by_status), FIELD(pf_state, restored), FIELD(pf_state, remapped),
    FIELD(pf_state, forks), FIELD(pf_state, why),

    STRUCT(pf_report, "report"), FIELD(pf_report, size), FIELD(pf_report, through_daemon), FIELD(pf_report, pages),
    FIELD(pf_report, by_status), FIELD(pf_report, zero_pages), FIELD(pf_report, saved_bytes),
};

static char text[8192];
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void write_text(void) {
    size_t used = 0;
    for (size_t i = 0; i < sizeof places / sizeof *places && used < sizeof text; i++) {
        const struct place *at = &places[i];
        if (at->offset < 0)
            used += (size_t)snprintf(text + used, sizeof text - used, "%s%s %d", i ? "\n" : "", at->name, at->size);
        else
            used += (size_t)snprintf(text + used, sizeof text - used, " %s:%d", at->name, at->offset);
    }
    if (used < sizeof text)
        snprintf(text + used, sizeof text - used, "\n");
}

const char *pf_layout(void) {
    pthread_once(&once, write_text);
    return text;
}
