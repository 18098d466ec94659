/* Preloaded into the daemon: system calls that are allowed to do less than was asked do less, and the clock jumps.
 *
 * FAULT_SHORT=N     every N-th read or write of a regular file carries half of the bytes
 * FAULT_CLOCK=FILE  the wall clock is off by the seconds in FILE, a signed number of 8 bytes that may change at any time
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static long every;
static const volatile int64_t *offset;
static atomic_long calls, shortened;
static const char *report;

__attribute__((constructor)) static void begin(void) {
    const char *value = getenv("FAULT_SHORT");
    every = value ? atol(value) : 0;
    report = getenv("FAULT_REPORT");
    value = getenv("FAULT_CLOCK");
    if (value) {
        int fd = open(value, O_RDONLY | O_CLOEXEC);
        void *at = mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, fd, 0);
        if (fd < 0 || at == MAP_FAILED) abort();
        offset = at;
        close(fd);
    }
}

/* How often it did so, one byte a time. */
static void tell(void) {
    static atomic_int fd = -2;
    if (!report) return;
    if (fd == -2) fd = open(report, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    static ssize_t (*plain)(int, const void *, size_t);
    if (!plain) plain = dlsym(RTLD_NEXT, "write");
    if (fd >= 0) (void)!plain(fd, ".", 1);
}

static size_t less(int fd, size_t bytes) {
    struct stat facts;
    if (!every || bytes < 2 || atomic_fetch_add(&calls, 1) % every || fstat(fd, &facts) || !S_ISREG(facts.st_mode))
        return bytes;
    if (atomic_fetch_add(&shortened, 1) < 100000) tell();
    return bytes / 2;
}

#define SHORTENED(name, buffer)                                                        \
    ssize_t name(int fd, buffer at, size_t bytes, off_t where) {                       \
        static ssize_t (*next)(int, buffer, size_t, off_t);                            \
        if (!next) next = dlsym(RTLD_NEXT, #name);                                     \
        return next(fd, at, less(fd, bytes), where);                                   \
    }
SHORTENED(pread, void *)
SHORTENED(pread64, void *)
SHORTENED(pwrite, const void *)
SHORTENED(pwrite64, const void *)

ssize_t write(int fd, const void *at, size_t bytes) {
    static ssize_t (*next)(int, const void *, size_t);
    if (!next) next = dlsym(RTLD_NEXT, "write");
    return next(fd, at, less(fd, bytes));
}

ssize_t read(int fd, void *at, size_t bytes) {
    static ssize_t (*next)(int, void *, size_t);
    if (!next) next = dlsym(RTLD_NEXT, "read");
    return next(fd, at, less(fd, bytes));
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*next)(clockid_t, struct timespec *);
    if (!next) next = dlsym(RTLD_NEXT, "clock_gettime");
    int result = next(clock, now);
    if (!result && clock == CLOCK_REALTIME && offset) now->tv_sec += *offset;
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    (void)zone;
    struct timespec exact;
    if (clock_gettime(CLOCK_REALTIME, &exact)) return -1;
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (at) *at = exact.tv_sec;
    return exact.tv_sec;
}
