/* Own the raw kernel interface: userfaultfd, pagemap, PAGEMAP_SCAN, and the constants newer than the headers we build with.
 * Must not know regions, slots or windows.
 *
 * All functions return 0 or more, or a negative errno. None allocates, locks or prints, so all may be used in a window.
 */
#ifndef PF_KERNEL_H
#define PF_KERNEL_H

#include <stdbool.h>
#include <stdint.h>
#include "agent.h"

/* Values of the kernel's userfaultfd interface (Documentation/admin-guide/mm/userfaultfd.rst, ioctl_userfaultfd(2)). */
#define PF_UFFD_MISSING 1ull /* registration modes */
#define PF_UFFD_WP 2ull
#define PF_UFFD_FEATURE_PAGEFAULT_FLAG_WP (1ull << 0)
#define PF_UFFD_FEATURE_EVENT_REMAP (1ull << 2)
#define PF_UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1ull << 12)
#define PF_UFFD_FEATURE_WP_UNPOPULATED (1ull << 13)
#define PF_UFFD_FEATURE_WP_ASYNC (1ull << 15)
#define PF_UFFD_FEATURE_MOVE (1ull << 16)

/* Whether this system call may be tried: a seccomp filter may end the process for it, as systemd's do. Only a process with
 * a filter pays for the answer: a child that shares its memory tries first, with arguments that are refused. */
bool pf_call_allowed(long number);

/* Open a userfaultfd that also serves faults in kernel mode, non-blocking, with these features: by userfaultfd(2), by
 * /dev/userfaultfd, or by `device` (an open /dev/userfaultfd, or -1). `why` says what was missing (PF_TEXT bytes). */
int pf_uffd_open(int device, uint64_t features, char *why);
int pf_uffd_register(int uffd, uint64_t start, uint64_t bytes, uint64_t mode);
/* And wake all who wait there. The kernel does that itself, but 6.18 was seen to leave one waiting for ever, after a window of
 * zeros in one of 1,500 runs of `window_driver steps window`; it may be that a fault, which takes the lock of its mapping
 * alone, comes between the kernel's wake and the end of the registration. Woken after the end, none was left in 21,000. */
int pf_uffd_unregister(int uffd, uint64_t start, uint64_t bytes);
/* One try; what it returns does not say what was moved (6.18 reports EEXIST after all had moved): ask pagemap. */
int pf_uffd_move(int uffd, uint64_t to, uint64_t from, uint64_t bytes);
/* Fill missing pages by copying; wakes nobody. */
int pf_uffd_copy(int uffd, uint64_t to, const void *from, uint64_t bytes);
/* protect: set the write protection, else take it (and PTE markers) away; wakes nobody. */
int pf_uffd_protect(int uffd, uint64_t start, uint64_t bytes, bool protect);
int pf_uffd_wake(int uffd, uint64_t start, uint64_t bytes);

/* Bits of a pagemap entry (Documentation/admin-guide/mm/pagemap.rst). */
#define PF_PM_EXCLUSIVE (1ull << 56) /* mapped once */
#define PF_PM_UFFD_WP (1ull << 57)
#define PF_PM_FILE (1ull << 61) /* not anonymous: in our file mappings, the slot itself */
#define PF_PM_SWAP (1ull << 62) /* swapped, being migrated, or a marker of userfaultfd */
#define PF_PM_PRESENT (1ull << 63)
int pf_pagemap_open(void);
/* Read the entries of `pages` pages. */
int pf_pagemap_read(int pagemap, uint64_t start, uint32_t pages, uint64_t *entries);
/* zero[i] = 1 where the page of zeros is mapped, which takes no memory. -ENOTTY or so before Linux 6.7. */
int pf_pagemap_zeros(int pagemap, uint64_t start, uint32_t pages, uint8_t *zero);

/* After a mapping could not be put in a place: whether that left a hole there, which some kernels do for want of the smallest bit
 * of memory (in mmap before Linux 6.12). Then it waits a moment, up to `tries` times, and says that it is worth to try again. */
bool pf_hole(uint64_t start, uint32_t pages, uint32_t *tries);

/* madvise(2) advice newer than some headers. */
#define PF_MADV_POPULATE_READ 22
#define PF_MADV_POPULATE_WRITE 23

/* Where this thread's new pages come from. pf_node_free: the machine has several nodes and no policy rules this thread, so
 * that a node may be preferred. pf_node_of touches the page and says where it is, or a negative errno. */
bool pf_node_free(void);
int pf_node_of(uint64_t address);
void pf_node_prefer(int node); /* negative: none again */

/* A child of raw clone(2) that shares nothing but open files' descriptions, does nothing and ends with its parent: see
 * restore.c for what it is good for. No atfork handler runs, its end sends no signal, and wait(2) without __WALL does not
 * see it. Returns 0 in the parent. */
struct pf_twin {
    int pid;
    int pipe; /* write end: closing it ends the twin */
};
int pf_twin_start(struct pf_twin *twin);
void pf_twin_end(struct pf_twin *twin);

/* Write text, cut to PF_TEXT, ended by 0. A small sprintf: %s and %d only. */
void pf_text(char *text, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
