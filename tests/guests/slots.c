/* The program inside the "slots" guest: it writes disks and memory and checks itself.
 *
 * Process 1 of the guest, once ./init has loaded the drivers; speaks to the serial console. Kernel command line:
 *
 *   slots.memory_mib=N     size of the memory that is being dirtied (default 16)
 *   slots.dirty_mib_s=N    how fast it is dirtied, MiB/s; 0: not at all (default 0)
 *   slots.disk_pause_us=N  pause after each disk write (default 0)
 *   slots.sign_ms=N        time between signs of life (default 500)
 *   slots.flush=N          1: flush a disk when it was walked over, before that is told (default 0)
 *
 * What it prints, one line each:
 *
 *   READY <disks> <slots per disk> <pages>
 *   OK <ms since boot> <disk writes> <memory generation> <disk rounds>   a sign of life
 *   LOST   <disk> <slot> <seq on disk> <seq in memory>   the disk is older than memory
 *   FUTURE <disk> <slot> <seq on disk> <seq in memory>   the disk is newer than memory
 *   TORN   <disk> <slot>                                 the slot is not what anybody wrote
 *   TORN   mem <page> <found> <expected>                 a page of another time than the rest
 *   ERROR  <disk> <slot> <errno>                         the disk failed
 *
 * Memory remembers the sequence number of every disk slot. A checkpoint whose disk and
 * memory are not of one instant therefore shows as LOST or FUTURE as soon as the slot is
 * read again. Each complaint is made once: the disk's view is then taken over.
 * "Rounds" and "generation" count complete walks over all slots of every disk, and over
 * all pages: two more of both than at a restore, and everything has been looked at.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE_BYTES = 4096, SLOT_BYTES = 4096, SLOTS = 256, DISKS_LIMIT = 16 };

/* Odd, so that stepping by it visits each of the 2^n slots once a round, in a scrambled order. */
enum { SLOT_STEP = 101 };

struct slot {
    uint64_t magic;
    uint64_t disk;
    uint64_t slot;
    uint64_t seq;
    uint64_t filler[SLOT_BYTES / 8 - 5]; /* differs from write to write */
    uint64_t checksum;                   /* of all that comes before */
};

struct page {
    uint64_t index, generation;
    uint64_t untouched[PAGE_BYTES / 8 - 4];
    uint64_t index_again, generation_again;
};

struct disk {
    char name[16];
    int fd;
    unsigned number;
    uint64_t stride_bytes;     /* slots are spread over the whole disk */
    uint64_t seq[SLOTS];       /* what memory believes the disk to hold */
    _Atomic uint64_t writes;
    struct slot *buffer;       /* aligned for O_DIRECT */
};

static const uint64_t MAGIC = 0x51534e4150534c54; /* "QSNAPSLT" */

static struct disk disks[DISKS_LIMIT];
static unsigned disk_count;
static _Atomic uint64_t generation;
static uint64_t page_count;
static unsigned long memory_mib = 16, dirty_mib_s, disk_pause_us, sign_ms = 500, flush;

/* One line, one write: lines of different threads must not mix. */
__attribute__((format(printf, 1, 2)))
static void say(const char *format, ...)
{
    char line[160];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    if (length > (int)sizeof line - 2)
        length = sizeof line - 2;
    line[length] = '\n';
    if (write(STDOUT_FILENO, line, length + 1) < 0)
        abort();
}

static uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * UINT64_C(1000000) + now.tv_nsec / 1000;
}

static uint64_t checksum_of(const struct slot *slot) /* FNV-1a, by words */
{
    const uint64_t *words = (const uint64_t *)slot;
    uint64_t sum = 0xcbf29ce484222325;
    for (unsigned i = 0; i < SLOT_BYTES / 8 - 1; i++)
        sum = (sum ^ words[i]) * 0x100000001b3;
    return sum;
}

static void write_slot(struct disk *disk, unsigned slot, uint64_t seq)
{
    struct slot *buffer = disk->buffer;
    *buffer = (struct slot){MAGIC, disk->number, slot, seq, {0}, 0};
    for (unsigned i = 0; i < sizeof buffer->filler / 8; i++)
        buffer->filler[i] = seq * 0x9e3779b97f4a7c15 + i;
    buffer->checksum = checksum_of(buffer);
    if (pwrite(disk->fd, buffer, SLOT_BYTES, slot * disk->stride_bytes) != SLOT_BYTES)
        say("ERROR %s %u %d", disk->name, slot, errno);
    disk->seq[slot] = seq;
}

static void flush_disk(struct disk *disk)
{
    if (flush && fsync(disk->fd))
        say("ERROR %s flush %d", disk->name, errno);
}

static void check_slot(struct disk *disk, unsigned slot)
{
    struct slot *found = disk->buffer;
    if (pread(disk->fd, found, SLOT_BYTES, slot * disk->stride_bytes) != SLOT_BYTES) {
        say("ERROR %s %u %d", disk->name, slot, errno);
        return;
    }
    if (found->magic != MAGIC || found->disk != disk->number || found->slot != slot
        || found->checksum != checksum_of(found)) {
        say("TORN %s %u", disk->name, slot);
        return;
    }
    if (found->seq == disk->seq[slot])
        return;
    say("%s %s %u %lu %lu", found->seq < disk->seq[slot] ? "LOST" : "FUTURE", disk->name, slot,
        found->seq, disk->seq[slot]);
    disk->seq[slot] = found->seq;
}

static void *write_disk(void *argument)
{
    struct disk *disk = argument;
    for (unsigned slot = 0;; slot = (slot + SLOT_STEP) % SLOTS) {
        check_slot(disk, slot);
        write_slot(disk, slot, disk->seq[slot] + 1);
        if (atomic_load(&disk->writes) % SLOTS == SLOTS - 1)
            flush_disk(disk);
        atomic_fetch_add(&disk->writes, 1);
        if (disk_pause_us)
            usleep(disk_pause_us);
    }
    return NULL;
}

static void check_page(const struct page *page, uint64_t index, uint64_t expected)
{
    if (page->index != index || page->index_again != index)
        say("TORN mem %lu index %lu/%lu", index, page->index, page->index_again);
    else if (page->generation != expected || page->generation_again != expected)
        say("TORN mem %lu %lu/%lu %lu", index, page->generation, page->generation_again, expected);
}

static void *dirty_memory(void *argument)
{
    struct page *pages = argument;
    const uint64_t pages_per_s = dirty_mib_s * (1024 * 1024 / PAGE_BYTES);
    uint64_t begin_us = now_us(), done_pages = 0;
    for (uint64_t next = 1;; next++) {
        for (uint64_t i = 0; i < page_count; i++) {
            /* Every 64 pages: are we ahead of the rate? What was missed is not caught up. */
            if (done_pages++ % 64 == 0) {
                uint64_t due_us = begin_us + done_pages * 1000000 / pages_per_s, now = now_us();
                if (due_us > now + 500)
                    usleep(due_us - now);
                else if (due_us + 100000 < now)
                    begin_us = now, done_pages = 1;
            }
            check_page(&pages[i], i, next - 1);
            pages[i].index = pages[i].index_again = i;
            pages[i].generation = pages[i].generation_again = next;
        }
        atomic_store(&generation, next);
    }
    return NULL;
}

/* Opens /dev/NAME as the next disk, unless it is absent, read-only or too small. */
static void add_disk(const char *name)
{
    struct disk *disk = &disks[disk_count];
    char path[32];
    uint64_t size_bytes = 0;
    int read_only = 0;
    snprintf(path, sizeof path, "/dev/%s", name);
    int fd = open(path, O_RDWR | O_DIRECT);
    if (fd < 0 || ioctl(fd, BLKROGET, &read_only) || read_only
        || ioctl(fd, BLKGETSIZE64, &size_bytes) || size_bytes < SLOTS * SLOT_BYTES) {
        if (fd >= 0)
            close(fd);
        return;
    }
    disk->fd = fd;
    disk->number = disk_count++;
    disk->stride_bytes = size_bytes / SLOTS / SLOT_BYTES * SLOT_BYTES;
    snprintf(disk->name, sizeof disk->name, "%s", name);
    if (posix_memalign((void **)&disk->buffer, PAGE_BYTES, SLOT_BYTES))
        abort();
    for (unsigned slot = 0; slot < SLOTS; slot++)
        write_slot(disk, slot, 0);
    flush_disk(disk);
}

static void read_command_line(void)
{
    char line[4096] = "";
    int fd = open("/proc/cmdline", O_RDONLY);
    if (fd < 0 || read(fd, line, sizeof line - 1) < 0)
        abort();
    close(fd);
    for (char *word = strtok(line, " \n"); word; word = strtok(NULL, " \n")) {
        sscanf(word, "slots.memory_mib=%lu", &memory_mib);
        sscanf(word, "slots.dirty_mib_s=%lu", &dirty_mib_s);
        sscanf(word, "slots.disk_pause_us=%lu", &disk_pause_us);
        sscanf(word, "slots.sign_ms=%lu", &sign_ms);
        sscanf(word, "slots.flush=%lu", &flush);
    }
}

static void start(void *(*routine)(void *), void *argument)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, routine, argument))
        abort();
}

int main(void)
{
    read_command_line();
    for (const char *kind = "vs"; *kind; kind++)
        for (char letter = 'a'; letter <= 'z' && disk_count < DISKS_LIMIT; letter++)
            add_disk((char[]){*kind, 'd', letter, 0});

    page_count = memory_mib * (1024 * 1024 / PAGE_BYTES);
    struct page *pages = mmap(NULL, page_count * PAGE_BYTES + 1, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED)
        abort();
    for (uint64_t i = 0; i < page_count; i++)
        pages[i].index = pages[i].index_again = i;

    say("READY %u %d %lu", disk_count, SLOTS, page_count);
    for (unsigned i = 0; i < disk_count; i++)
        start(write_disk, &disks[i]);
    if (dirty_mib_s && page_count)
        start(dirty_memory, pages);

    for (;;) {
        usleep(sign_ms * 1000);
        uint64_t writes = 0, rounds = disk_count ? UINT64_MAX : 0;
        for (unsigned i = 0; i < disk_count; i++) {
            uint64_t mine = atomic_load(&disks[i].writes);
            writes += mine;
            if (mine / SLOTS < rounds)
                rounds = mine / SLOTS;
        }
        say("OK %lu %lu %lu %lu", now_us() / 1000, writes, atomic_load(&generation), rounds);
    }
}
