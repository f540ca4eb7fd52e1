/* Own the hostile world for the agent's C files: compiled with -include adverse.h (build/torture-adverse) their system calls
 * pass through here, where they are held up, refused, or done and then lied about. All of it a kernel may do. */
#ifndef TORTURE_ADVERSE_H
#define TORTURE_ADVERSE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* From when, and until when, the options --delay, --lie and --refuse count; chance by `seed`. */
void adverse_begin(uint64_t seed);
void adverse_end(void);
/* Whether this program was built so that the options do anything. */
int adverse_built(void);

#ifdef TORTURE_ADVERSE
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
int adverse_ioctl(int file, unsigned long request, ...);
void *adverse_mmap(void *address, size_t bytes, int protection, int flags, int file, off_t offset);
int adverse_munmap(void *address, size_t bytes);
void *adverse_mremap(void *address, size_t bytes, size_t more, int flags, ...);
int adverse_madvise(void *address, size_t bytes, int advice);
int adverse_memcmp(const void *one, const void *other, size_t bytes);
#define ioctl adverse_ioctl
#define mmap adverse_mmap
#define munmap adverse_munmap
#define mremap adverse_mremap
#define madvise adverse_madvise
#define memcmp adverse_memcmp
#endif

#endif
