// What tests do inside a Linux guest that busybox cannot: vsock, and verified writes to a disk. Static, no dependencies.
#include "common.h"
#include "disk.h"
#include "journal.h"
#include "stream.h"

static uint64_t requests(void)
{
	const char *stat = "/sys/block/vda/stat";
	return counter(stat, 0) + counter(stat, 4);
}

static uint64_t packets(void)
{
	const char *sent = "/sys/class/net/eth0/statistics/tx_packets";
	return counter(sent, 0) + counter("/sys/class/net/eth0/statistics/rx_packets", 0);
}

// Name, microseconds, and requests or packets. Nothing else happens around the line, so that its reader can count exits.
static void report(const char *name, uint64_t us, uint64_t units)
{
	usleep(100000);
	printf("%s=%llu %llu\n", name, (unsigned long long)us, (unsigned long long)units);
	fflush(stdout);
	usleep(100000);
}

static void disk_speed(const char *name, int write_it, size_t size, unsigned count, int at_random)
{
	int file = open("/dev/vda", O_RDWR | O_DIRECT);
	char *buffer = aligned_alloc(4096, size);
	uint64_t state = 7, blocks = 64 * 1048576 / size;
	if (file < 0)
		die("/dev/vda");
	memset(buffer, 1, size);
	uint64_t before = requests(), start = now_us();
	for (unsigned i = 0; i < count; i++) {
		off_t place = (at_random ? next(&state) % blocks : i % blocks) * size;
		ssize_t done = write_it ? pwrite(file, buffer, size, place) : pread(file, buffer, size, place);
		if (done != (ssize_t)size)
			die("disk");
	}
	uint64_t us = now_us() - start;
	report(name, us, requests() - before);
	close(file);
}

static void net_speed(const char *name, int port, int sending, uint64_t bytes)
{
	static char buffer[131072];
	int connection = socket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in host = { .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = inet_addr("10.231.0.1") };
	if (connect(connection, (void *)&host, sizeof host))
		die("connect");
	uint64_t before = packets(), start = now_us();
	for (uint64_t done = 0; sending && done < bytes;) {
		ssize_t part = write(connection, buffer, sizeof buffer);
		if (part < 0)
			die("send");
		done += part;
	}
	if (sending)
		shutdown(connection, SHUT_WR);
	while (read(connection, buffer, sizeof buffer) > 0)
		;
	uint64_t us = now_us() - start;
	report(name, us, packets() - before);
	close(connection);
}

// As a guest's first process: how long some transfers take.
static void speed(void)
{
	mkdir("/dev", 0755);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	mkdir("/sys", 0755);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	report("start", 0, 0);
	report("nothing", 0, 0);
	disk_speed("sequential_read", 0, 1048576, 32, 0);
	disk_speed("random_read", 0, 4096, 500, 1);
	disk_speed("random_write", 1, 4096, 500, 1);
	net_speed("net_send", 5001, 1, 8 << 20);
	net_speed("net_receive", 5002, 0, 8 << 20);
	printf("end\n");
	for (;;)
		pause();
}

// eat MIB: has so much memory at once.
static int eat(size_t mib)
{
	char *memory = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		die("mmap");
	for (size_t at = 0; at < mib << 20; at += 4096)
		memory[at] = 1;
	printf("tool: ate %zu MiB\n", mib);
	return 0;
}

int main(int count, char **words)
{
	if (getpid() == 1)
		speed();
	const char *what = count > 1 ? words[1] : "";
	const char *first = count > 2 ? words[2] : "";
	if (count == 4 && !strcmp(what, "echo"))
		return echo(atoi(first), atoi(words[3]));
	if (count == 4 && !strcmp(what, "send"))
		return send_pattern(atoi(first), strtoull(words[3], NULL, 10));
	if (count == 4 && !strcmp(what, "copy"))
		return copy_all(words[2], words[3]);
	if (count == 5 && !strcmp(what, "behave"))
		return behave_all(!strcmp(first, "from"), atoi(words[3]), atoi(words[4]));
	if (count == 2 && !strcmp(what, "cid"))
		return local_cid();
	if (count == 4 && !strcmp(what, "watch"))
		return watch(first, atoi(words[3]));
	if (count == 6 && !strcmp(what, "verify"))
		return verify(first, strtoull(words[3], NULL, 10), !strcmp(words[4], "direct"), atoi(words[5]));
	if (count == 3 && !strcmp(what, "sum"))
		return sum_file(first);
	if (count == 3 && !strcmp(what, "zeroes"))
		return zeroes(first);
	if (count == 7 && !strcmp(what, "pace"))
		return pace(first, words[3], atoi(words[4]), atoi(words[5]), atoi(words[6]));
	if (count == 5 && !strcmp(what, "journal"))
		return journal(first, strtoull(words[3], NULL, 10), atoi(words[4]));
	if (count == 3 && !strcmp(what, "eat"))
		return eat(atoi(first));
	printf("tool: echo PORT COUNT | send PORT BYTES | copy FROM TO | behave from|to PORT COUNT | cid | watch FILE MS |\n"
	       "verify DEVICE MIB direct|cached WORKERS | sum FILE | zeroes DEVICE | pace read|write FILE SIZE WARM COUNT | eat MIB |\n"
	       "journal DEVICE BLOCKS WORKERS\n");
	return 2;
}
