/* Own merging without a daemon. A region is gone through in strips of 64 pages; for each strip:
 *  1. Look: which pages are private, present, not known to be zeros; copy their bytes; hash them.
 *  2. Ask the index (locked): the hash has a slot; or a page is known that may be equal, of this process (a twin) or of
 *     another; or it is new, and is remembered.
 *  3. Compare with twins (not locked: reading a page may take long).
 *  4. Make slots (locked) for those that have a twin, or another process's page to be; from the copies of step 1, so that
 *     what is written is what was hashed.
 *  5. Windows (not locked): the strip's pages, then the twins; they compare the bytes anew, with nobody able to write. Another
 *     process's page follows at its own next merge.
 * Nothing of that is more than a hint until step 5, so pages may be written, unmapped or merged by others at any moment.
 */
#define _GNU_SOURCE
#include "embedded.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "chunks.h"
#include "command.h"
#include "fault.h"
#include "index.h"
#include "regions.h"
#include "strip.h"
#include "window.h"

/* The end of the last run that was mapped: the next one may join it. */
struct tail {
    uint64_t end;
    uint32_t chunk, slot;
};

struct merge {
    int64_t region;
    struct pf_region about;
    struct pf_report *report;
    uint64_t first; /* page of the strip */
    uint32_t count; /* pages of the strip */
    uint64_t windows_left; /* that may make new mappings, within the budget */
    struct tail tail, twin_tail;
    struct pf_page pages[PF_STRIP];
};

static uint8_t bytes[PF_STRIP * PF_PAGE], twin_bytes[PF_STRIP * PF_PAGE];
/* Whether an entry may still be of use, for the index when it makes room. */
static bool keep(const struct pf_entry *entry) {
    if (entry->kind == PF_ENTRY_SLOT)
        return true; /* whether its chunk is there is seen when it is looked up */
    struct pf_region region;
    pid_t process = (pid_t)entry->place[0];
    if (process == getpid())
        return pf_region_get(entry->place[1], &region) && !region.closing && entry->place[2] < region.pages;
    return process > 0 && (kill(process, 0) == 0 || errno != ESRCH);
}

/* Step 2 for one page; `family` is locked. */
static void ask(struct merge *merge, struct pf_family *family, uint32_t i) {
    struct pf_page *page = &merge->pages[i];
    uint32_t self[3] = {(uint32_t)getpid(), (uint32_t)merge->region, (uint32_t)(merge->first + i)};
    struct pf_entry *entry = pf_index_find(page->hash);
    page->plan = PF_PLAN_NOTHING;
    if (entry == NULL) {
        pf_index_add(page->hash, PF_ENTRY_PAGE, self[0], self[1], self[2], keep);
        return;
    }
    uint32_t place[3] = {entry->place[0], entry->place[1], entry->place[2]};
    if (entry->kind == PF_ENTRY_SLOT) {
        if (place[1] < PF_CHUNK_PAGES && pf_chunk_usable(family, place[0])) {
            page->plan = PF_PLAN_SLOT;
            page->chunk = place[0];
            page->slot = place[1];
        } else {
            pf_entry_set(entry, PF_ENTRY_PAGE, self[0], self[1], self[2]);
        }
    } else if (memcmp(place, self, sizeof self) == 0) {
        return;
    } else if (!keep(entry)) {
        pf_entry_set(entry, PF_ENTRY_PAGE, self[0], self[1], self[2]);
    } else if (place[0] == self[0]) {
        page->plan = PF_PLAN_TWIN;
        page->twin = place[1];
        page->twin_page = place[2];
    } else {
        page->plan = PF_PLAN_FOREIGN;
    }
}

/* Step 3: neighbours with neighbouring twins are compared in one go. A twin that is another by now gives its place to us. */
static uint32_t twins_in_a_row(const struct merge *merge, uint32_t i) {
    uint32_t n = 1;
    const struct pf_page *first = &merge->pages[i];
    while (i + n < merge->count && merge->pages[i + n].plan == PF_PLAN_TWIN && merge->pages[i + n].twin == first->twin &&
           merge->pages[i + n].twin_page == first->twin_page + n)
        n++;
    return n;
}

static void compare_twins(struct merge *merge) {
    for (uint32_t i = 0, n; i < merge->count; i += n) {
        struct pf_page *page = &merge->pages[i];
        struct pf_region region;
        n = 1;
        if (page->plan != PF_PLAN_TWIN)
            continue;
        n = twins_in_a_row(merge, i);
        if (!pf_region_get(page->twin, &region) || page->twin_page + n > region.pages)
            continue;
        bool there = pf_strip_copy(region.start + page->twin_page * PF_PAGE, twin_bytes, n);
        for (uint32_t k = 0; there && k < n; k++)
            merge->pages[i + k].twin_fits =
                memcmp(twin_bytes + k * PF_PAGE, bytes + (i + k) * PF_PAGE, PF_PAGE) == 0;
    }
}

/* A page of the strip before this one that gets a slot and has its bytes; or this one. */
static uint32_t equal_before(const struct merge *merge, const bool *make, uint32_t i) {
    for (uint32_t k = 0; k < i; k++)
        if (make[k] && merge->pages[k].hash == merge->pages[i].hash &&
            memcmp(bytes + k * PF_PAGE, bytes + i * PF_PAGE, PF_PAGE) == 0)
            return k;
    return i;
}

/* Step 4; `family` is locked. Someone else may have made a slot meanwhile: then that one will do. */
static void make_slots(struct merge *merge, struct pf_family *family) {
    bool make[PF_STRIP] = {false};
    uint32_t same[PF_STRIP];
    for (uint32_t i = 0; i < merge->count; i++) {
        struct pf_page *page = &merge->pages[i];
        same[i] = i;
        if (page->plan == PF_PLAN_TWIN && !page->twin_fits) {
            struct pf_entry *entry = pf_index_find(page->hash);
            if (entry && entry->kind == PF_ENTRY_PAGE)
                pf_entry_set(entry, PF_ENTRY_PAGE, (uint32_t)getpid(), (uint32_t)merge->region,
                             (uint32_t)(merge->first + i));
            page->plan = PF_PLAN_NOTHING;
        } else if (page->plan == PF_PLAN_TWIN || page->plan == PF_PLAN_FOREIGN) {
            struct pf_page before = *page;
            ask(merge, family, i);
            make[i] = page->plan == PF_PLAN_TWIN || page->plan == PF_PLAN_FOREIGN;
            if (before.plan == PF_PLAN_TWIN && page->plan == PF_PLAN_SLOT) /* the twin can have that slot too */
                page->twin = before.twin, page->twin_page = before.twin_page, page->twin_fits = true;
            same[i] = make[i] ? equal_before(merge, make, i) : i;
            make[i] &= same[i] == i;
        }
    }
    for (uint32_t i = 0, n; i < merge->count; i += n) {
        uint32_t number, slot;
        for (n = 0; i + n < merge->count && make[i + n]; n++)
            ;
        if (n == 0) {
            n = 1;
            continue;
        }
        n = pf_chunk_write(family, bytes + i * PF_PAGE, n, &number, &slot);
        if (n == 0) { /* no memory: nothing of the rest either */
            for (; i < merge->count; i++)
                if (make[i]) {
                    merge->pages[i].plan = PF_PLAN_NOTHING;
                    merge->pages[i].status = PF_NO_VMA;
                }
            break;
        }
        merge->report->saved_bytes -= (uint64_t)n * PF_PAGE; /* the slots; made good by the pages that go */
        for (uint32_t k = 0; k < n; k++) {
            struct pf_page *page = &merge->pages[i + k];
            struct pf_entry *entry = pf_index_find(page->hash);
            page->chunk = number;
            page->slot = slot + k;
            page->plan = PF_PLAN_SLOT;
            if (entry)
                pf_entry_set(entry, PF_ENTRY_SLOT, number, slot + k, 0);
            PF_FAULT(PF_FAULT_STORE, 4);
        }
    }
    for (uint32_t i = 0; i < merge->count; i++) {
        const struct pf_page *first = &merge->pages[same[i]];
        if (same[i] == i)
            continue;
        merge->pages[i].plan = first->plan;
        merge->pages[i].status = first->status;
        merge->pages[i].chunk = first->chunk;
        merge->pages[i].slot = first->slot;
        merge->pages[i].twin_fits = false; /* the first brings it along */
    }
}

/* Whether a run begins a new mapping, or goes on where the last one of its kind ended; and note where this one ends. */
static bool new_mapping(struct tail *tail, uint64_t start, const struct pf_page *page, uint32_t n) {
    bool goes_on = tail->end == start && tail->chunk == page->chunk && tail->slot == page->slot;
    *tail = (struct tail){start + (uint64_t)n * PF_PAGE, page->chunk, page->slot + n};
    return !goes_on;
}

static void swap_strip(struct merge *merge) {
    uint8_t status[PF_STRIP];
    uint64_t start = merge->about.start + merge->first * PF_PAGE;
    for (uint32_t i = 0, n; i < merge->count; i += n) {
        struct pf_page *page = &merge->pages[i];
        for (n = 1; i + n < merge->count && merge->pages[i + n].plan == page->plan; n++)
            if (page->plan == PF_PLAN_SLOT &&
                (merge->pages[i + n].chunk != page->chunk || merge->pages[i + n].slot != page->slot + n))
                break;
        if (page->plan == PF_PLAN_NOTHING)
            continue;
        if (page->plan == PF_PLAN_SLOT && merge->windows_left == 0) {
            for (uint32_t k = 0; k < n; k++)
                merge->pages[i + k].status = PF_NO_VMA;
            continue;
        }
        struct pf_target target = {.extent = 0, .fd = -1};
        if (page->plan == PF_PLAN_SLOT) {
            target = pf_chunk_target(page->chunk, page->slot, n);
            if (target.extent == 0)
                continue; /* cannot be: it was made usable a moment ago */
            merge->windows_left -= new_mapping(&merge->tail, start + (uint64_t)i * PF_PAGE, page, n);
        }
        pf_window(merge->region, start + (uint64_t)i * PF_PAGE, n, &target, 1, status);
        for (uint32_t k = 0; k < n; k++) {
            merge->pages[i + k].status = status[k];
            if (status[k] == PF_MERGED) {
                merge->report->zero_pages += page->plan == PF_PLAN_ZERO;
                if (merge->pages[i + k].alone)
                    merge->report->saved_bytes += PF_PAGE;
            }
        }
    }
}

/* The twins get the same slots. Not plainly: nobody promised anything for them; where windows are not safe, they follow at
 * their own next merge. */
static void swap_twins(struct merge *merge) {
    uint8_t status[PF_STRIP];
    bool alone[PF_STRIP];
    if (!pf_kit_ready())
        return;
    for (uint32_t i = 0, n; i < merge->count; i += n) {
        struct pf_page *page = &merge->pages[i];
        struct pf_region region;
        n = 1;
        if (page->plan != PF_PLAN_SLOT || !page->twin_fits)
            continue;
        while (i + n < merge->count && merge->pages[i + n].plan == PF_PLAN_SLOT && merge->pages[i + n].twin_fits &&
               merge->pages[i + n].twin == page->twin && merge->pages[i + n].twin_page == page->twin_page + n &&
               merge->pages[i + n].chunk == page->chunk && merge->pages[i + n].slot == page->slot + n)
            n++;
        struct pf_target target = pf_chunk_target(page->chunk, page->slot, n);
        if (target.extent == 0 || merge->windows_left == 0 || !pf_region_get(page->twin, &region))
            continue;
        uint64_t start = region.start + page->twin_page * PF_PAGE;
        pf_strip_alone(start, n, alone);
        merge->windows_left -= new_mapping(&merge->twin_tail, start, page, n);
        pf_window(page->twin, start, n, &target, 0, status);
        for (uint32_t k = 0; k < n; k++) {
            uint64_t which = page->twin_page + k;
            if (status[k] != PF_MERGED)
                continue;
            if (alone[k])
                merge->report->saved_bytes += PF_PAGE;
            if (page->twin != merge->region)
                continue;
            if (which >= merge->first && which < merge->first + merge->count) {
                merge->pages[which - merge->first].status = PF_MERGED;
            } else if (which < merge->first) { /* counted as unknown when its strip was done */
                merge->report->by_status[PF_UNKNOWN]--;
                merge->report->by_status[PF_MERGED]++;
            }
        }
    }
}

static void do_strip(struct merge *merge) {
    pf_strip_look(&merge->about, merge->first, merge->count, merge->pages, bytes);
    struct pf_family *family = NULL;
    bool some = false, make = false;
    for (uint32_t i = 0; i < merge->count; i++)
        some |= merge->pages[i].status == PF_UNKNOWN && merge->pages[i].plan != PF_PLAN_ZERO;
    if (some) {
        family = pf_index_lock();
        for (uint32_t i = 0; i < merge->count; i++) {
            struct pf_page *page = &merge->pages[i];
            if (page->status != PF_UNKNOWN || page->plan == PF_PLAN_ZERO)
                continue;
            if (family)
                ask(merge, family, i);
            else
                page->status = PF_BUSY;
            make |= page->plan == PF_PLAN_TWIN || page->plan == PF_PLAN_FOREIGN;
        }
        PF_FAULT(PF_FAULT_STORE, 1);
        if (family)
            pf_index_unlock();
    }
    if (make) {
        compare_twins(merge);
        family = pf_index_lock();
        if (family) {
            make_slots(merge, family);
            PF_FAULT(PF_FAULT_STORE, 5);
            pf_index_unlock();
        } else {
            for (uint32_t i = 0; i < merge->count; i++)
                if (merge->pages[i].plan == PF_PLAN_TWIN || merge->pages[i].plan == PF_PLAN_FOREIGN)
                    merge->pages[i].plan = PF_PLAN_NOTHING;
        }
    }
    swap_strip(merge);
    swap_twins(merge);
}

/* Mappings are counted a few times a second at most: many regions are merged one after the other, and half of what is allowed
 * is left to the program anyway. */
static uint64_t budget, budget_until;

int pf_embedded_merge(int64_t region, struct pf_report *report) {
    static struct merge merge;
    merge = (struct merge){.region = region, .report = report};
    if (!pf_region_get(region, &merge.about) || merge.about.closing)
        return -ENOENT;
    if (pf_now_ms() >= budget_until) {
        budget = pf_strip_budget();
        budget_until = pf_now_ms() + 200;
    }
    merge.windows_left = budget;
    while (merge.first < merge.about.pages) {
        uint64_t left = merge.about.pages - merge.first;
        merge.count = left < PF_STRIP ? (uint32_t)left : PF_STRIP;
        if (!pf_command_breathe()) {
            report->by_status[PF_BUSY] += left;
            report->pages += left;
            break;
        }
        do_strip(&merge);
        for (uint32_t i = 0; i < merge.count; i++)
            report->by_status[merge.pages[i].status % PF_STATUSES]++;
        report->pages += merge.count;
        merge.first += merge.count;
    }
    budget = merge.windows_left;
    pf_window_drop();
    pf_chunks_drop();
    if ((int64_t)report->saved_bytes < 0)
        report->saved_bytes = 0;
    return 0;
}

void pf_embedded_collect(void) {
    if (!pf_chunks_any())
        return;
    pf_chunks_mark(); /* reads all of `where`: not under the lock of the family */
    struct pf_family *family = pf_index_lock();
    if (family) {
        pf_chunks_collect(family);
        pf_index_unlock();
    }
}

void pf_embedded_close(void) {
    struct pf_family *family = pf_chunks_any() ? pf_index_lock() : NULL;
    pf_chunks_shut();
    if (family) {
        pf_chunks_leave(family);
        pf_index_unlock();
    }
    pf_strip_close();
}

void pf_embedded_child(void) {
    pf_strip_child();
    pf_chunks_child();
}
