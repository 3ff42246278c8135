// Disks: verified writes, checksums, zeroes, and how fast a limit lets them be.
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

enum { BLOCK = 4096, UNIT = 131072, MOST_WORKERS = 64 };

// What a block adds to a checksum: its words, their order and its place count, the order of blocks does not.
static uint64_t block_sum(const uint64_t *words, uint64_t place)
{
	uint64_t sum = (place / BLOCK + 1) * 0x9e3779b97f4a7c15;
	for (int i = 0; i < BLOCK / 8; i++) {
		sum = (sum ^ words[i]) * 0xff51afd7ed558ccd;
		sum ^= sum >> 32;
	}
	return sum;
}

// A part of the disk that one request writes: a whole number of blocks.
struct extent {
	uint64_t place, size;
};

// All of a disk in extents of 4 to 128 KiB, in random order.
static struct extent *extents(uint64_t bytes, uint64_t *count)
{
	struct extent *all = calloc(bytes / BLOCK, sizeof *all);
	// Of the disk, most is in large ones; of the requests, most are small.
	static const char shifts[] = { 0, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, 5 };
	uint64_t state = 42;
	*count = 0;
	for (uint64_t unit = 0; unit < bytes; unit += UNIT) {
		uint64_t size = (uint64_t)BLOCK << shifts[next(&state) % sizeof shifts];
		for (uint64_t at = 0; at < UNIT; at += size)
			all[(*count)++] = (struct extent){ unit + at, size };
	}
	for (uint64_t i = *count; i > 1; i--) {
		uint64_t other = next(&state) % i;
		struct extent kept = all[i - 1];
		all[i - 1] = all[other];
		all[other] = kept;
	}
	return all;
}

static void fill(uint64_t *words, struct extent extent)
{
	// No two words of a disk are the same.
	uint64_t first = extent.place / 8 + 1;
	for (uint64_t i = 0; i < extent.size / 8; i++)
		words[i] = (first + i) * 0x9e3779b97f4a7c15;
}

// One worker's extents, written or compared; the sum of the checksums of what was read.
static uint64_t work(int file, const char *path, const struct extent *all, uint64_t count, int reading)
{
	uint64_t *buffer = aligned_alloc(BLOCK, UNIT), *wanted = aligned_alloc(BLOCK, UNIT), sum = 0;
	for (uint64_t i = 0; i < count; i++) {
		struct extent extent = all[i];
		fill(wanted, extent);
		if (!reading) {
			if (pwrite(file, wanted, extent.size, extent.place) != (ssize_t)extent.size)
				die("pwrite");
			continue;
		}
		if (pread(file, buffer, extent.size, extent.place) != (ssize_t)extent.size)
			die("pread");
		if (memcmp(buffer, wanted, extent.size)) {
			printf("tool: %s differs at %llu\n", path, (unsigned long long)extent.place);
			exit(1);
		}
		for (uint64_t at = 0; at < extent.size; at += BLOCK)
			sum += block_sum(buffer + at / 8, extent.place + at);
	}
	return sum;
}

// verify DEVICE MIB direct|cached WORKERS: writes all of so many MiB in random order, in requests of 4 to 128 KiB with a
// pattern of their own each, then reads and compares them. Worker N is on processor N, as far as there are so many.
static int verify(const char *path, uint64_t mib, int direct, int workers)
{
	int file = open(path, O_RDWR | (direct ? O_DIRECT : 0));
	if (file < 0)
		die(path);
	uint64_t count, sum = 0;
	struct extent *all = extents(mib << 20, &count);
	uint64_t *sums = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (workers < 1 || workers > MOST_WORKERS || sums == MAP_FAILED)
		die("workers");
	for (int reading = 0; reading < 2; reading++) {
		for (int worker = 0; worker < workers; worker++) {
			if (fork())
				continue;
			cpu_set_t set;
			CPU_ZERO(&set);
			CPU_SET(worker % sysconf(_SC_NPROCESSORS_ONLN), &set);
			sched_setaffinity(0, sizeof set, &set);
			uint64_t from = count * worker / workers, to = count * (worker + 1) / workers;
			sums[worker] = work(file, path, all + from, to - from, reading);
			exit(0);
		}
		int status;
		while (wait(&status) > 0)
			if (status)
				return 1;
		if (!reading && fsync(file))
			die("fsync");
		// So that reads are requests.
		posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
	}
	for (int worker = 0; worker < workers; worker++)
		sum += sums[worker];
	printf("tool: %s verified, %016llx\n", path, (unsigned long long)sum);
	return 0;
}

// sum FILE: the checksum of all whole blocks of a file.
static int sum_file(const char *path)
{
	int file = open(path, O_RDONLY);
	if (file < 0)
		die(path);
	static uint64_t buffer[UNIT / 8];
	uint64_t place = 0, sum = 0;
	ssize_t got;
	while ((got = read(file, buffer, sizeof buffer)) > 0) {
		for (ssize_t at = 0; at + BLOCK <= got; at += BLOCK)
			sum += block_sum(buffer + at / 8, place + at);
		place += got;
	}
	if (got < 0)
		die("read");
	printf("tool: sum of %s %016llx\n", path, (unsigned long long)sum);
	return 0;
}

// zeroes DEVICE: fills 8 MiB, has the second MiB zeroed in place and the fifth and sixth given back, and reads all.
static int zeroes(const char *path)
{
	enum { MIB = 1 << 20 };
	int file = open(path, O_RDWR | O_DIRECT);
	unsigned char *buffer = aligned_alloc(BLOCK, 8 * MIB);
	uint64_t range[2] = { MIB, MIB };
	if (file < 0)
		die(path);
	memset(buffer, 0xa5, 8 * MIB);
	if (pwrite(file, buffer, 8 * MIB, 0) != 8 * MIB)
		die("pwrite");
	if (ioctl(file, BLKZEROOUT, range))
		die("BLKZEROOUT");
	if (fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4 * MIB, 2 * MIB))
		die("fallocate");
	if (pread(file, buffer, 8 * MIB, 0) != 8 * MIB)
		die("pread");
	for (int at = 0; at < 8 * MIB; at++) {
		int mib = at / MIB, empty = mib == 1 || mib == 4 || mib == 5;
		if (buffer[at] != (empty ? 0 : 0xa5)) {
			printf("tool: byte %d is %#x\n", at, buffer[at]);
			return 1;
		}
	}
	printf("tool: %s has its zeroes\n", path);
	return 0;
}

// pace read|write FILE SIZE WARM COUNT: how long COUNT requests take, one after the other, behind WARM that are not timed.
static int pace(const char *how, const char *path, size_t size, int warm, int count)
{
	int writing = !strcmp(how, "write");
	int file = open(path, (writing ? O_RDWR : O_RDONLY) | (strstr(path, "/dev/v") ? O_DIRECT : 0));
	char *buffer = aligned_alloc(BLOCK, size < BLOCK ? BLOCK : size);
	if (file < 0)
		die(path);
	memset(buffer, 1, size);
	uint64_t start = now_us();
	for (int i = -warm; i < count; i++) {
		if (i == 0) {
			printf("tool: pacing\n");
			fflush(stdout);
			start = now_us();
		}
		for (size_t at = 0; at < size;) {
			ssize_t part = writing ? write(file, buffer + at, size - at) : read(file, buffer + at, size - at);
			if (part <= 0)
				die(how);
			at += part;
		}
	}
	printf("tool: paced %s of %s: %llu us\n", how, path, (unsigned long long)(now_us() - start));
	return 0;
}
