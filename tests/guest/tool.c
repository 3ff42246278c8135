// What tests do inside a Linux guest that busybox cannot: vsock, and verified writes to a disk. Static, no dependencies.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void die(const char *what)
{
	printf("tool: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static struct sockaddr_vm address(unsigned cid, unsigned port)
{
	return (struct sockaddr_vm){ .svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port };
}

static void copy(int from, int to)
{
	static char buffer[65536];
	ssize_t count;
	while ((count = read(from, buffer, sizeof buffer)) > 0)
		for (ssize_t done = 0, part; done < count; done += part)
			if ((part = write(to, buffer + done, count - done)) < 0)
				die("write");
	if (count < 0)
		die("read");
}

// echo PORT COUNT: sends back what COUNT connections send, side by side.
static int echo(unsigned port, int count)
{
	int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
	struct sockaddr_vm own = address(VMADDR_CID_ANY, port);
	if (listener < 0 || bind(listener, (void *)&own, sizeof own) || listen(listener, 512))
		die("listen");
	printf("tool: listening\n");
	fflush(stdout);
	for (int i = 0; i < count; i++) {
		int connection = accept(listener, NULL, NULL);
		if (connection < 0)
			die("accept");
		if (fork() == 0) {
			close(listener);
			copy(connection, connection);
			shutdown(connection, SHUT_WR);
			_exit(0);
		}
		close(connection);
	}
	int status, failed = 0;
	while (wait(&status) > 0)
		failed += status != 0;
	printf("tool: echoed %d connections\n", count - failed);
	return failed != 0;
}

// send PORT BYTES: sends a pattern to the host, ends its half, and expects the same back.
static int send_pattern(unsigned port, uint64_t bytes)
{
	int connection = socket(AF_VSOCK, SOCK_STREAM, 0);
	struct sockaddr_vm host = address(VMADDR_CID_HOST, port);
	if (connection < 0 || connect(connection, (void *)&host, sizeof host))
		die("connect");
	pid_t child = fork();
	if (child == 0) {
		uint64_t state = 1, block[1024];
		for (uint64_t done = 0; done < bytes; done += sizeof block) {
			for (int i = 0; i < 1024; i++)
				block[i] = next(&state);
			size_t size = bytes - done < sizeof block ? bytes - done : sizeof block;
			for (size_t at = 0; at < size;) {
				ssize_t part = write(connection, (char *)block + at, size - at);
				if (part < 0)
					die("write");
				at += part;
			}
		}
		shutdown(connection, SHUT_WR);
		_exit(0);
	}
	uint64_t state = 1, word = 0, got = 0;
	static unsigned char buffer[65536];
	ssize_t count;
	while ((count = read(connection, buffer, sizeof buffer)) > 0)
		for (ssize_t i = 0; i < count; i++, got++) {
			if (got % 8 == 0)
				word = next(&state);
			if (buffer[i] != (unsigned char)(word >> got % 8 * 8)) {
				printf("tool: byte %llu is wrong\n", (unsigned long long)got);
				return 1;
			}
		}
	waitpid(child, NULL, 0);
	printf("tool: %llu bytes came back\n", (unsigned long long)got);
	return got != bytes;
}

// verify DEVICE MIB direct|cached: writes blocks of 4 to 64 KiB in random order, each with a pattern of its own, and reads all.
static int verify(const char *path, uint64_t mib, int direct)
{
	enum { UNIT = 65536 };
	int file = open(path, O_RDWR | (direct ? O_DIRECT : 0));
	if (file < 0)
		die(path);
	uint64_t count = mib * 1048576 / UNIT, *order = calloc(count, sizeof *order), state = 42;
	char *buffer = aligned_alloc(4096, UNIT);
	for (uint64_t i = 0; i < count; i++)
		order[i] = i;
	for (uint64_t i = count; i > 1; i--) {
		uint64_t other = next(&state) % i, kept = order[i - 1];
		order[i - 1] = order[other];
		order[other] = kept;
	}
	for (int reading = 0; reading < 2; reading++) {
		for (uint64_t i = 0; i < count; i++) {
			uint64_t own = order[i] + 1, part = 4096 << order[i] % 5;
			for (uint64_t at = 0; at < UNIT; at += part) {
				off_t place = order[i] * UNIT + at;
				if (reading) {
					if (pread(file, buffer, part, place) != (ssize_t)part)
						die("pread");
				}
				for (uint64_t word = 0; word < part / 8; word++) {
					uint64_t value = next(&own);
					if (!reading)
						((uint64_t *)buffer)[word] = value;
					else if (((uint64_t *)buffer)[word] != value) {
						printf("tool: %s differs at %llu\n", path, (unsigned long long)place + word * 8);
						return 1;
					}
				}
				if (!reading && pwrite(file, buffer, part, place) != (ssize_t)part)
					die("pwrite");
			}
		}
		if (!reading && fsync(file))
			die("fsync");
		if (!reading) {
			posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
		}
	}
	printf("tool: %s verified\n", path);
	return 0;
}

static uint64_t now_us(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000ull + time.tv_nsec / 1000;
}

// A number that the kernel shows as the word with this index in a file.
static uint64_t counter(const char *path, int index)
{
	char text[512], *rest = text;
	int file = open(path, O_RDONLY);
	ssize_t count = file < 0 ? -1 : read(file, text, sizeof text - 1);
	if (count < 0)
		die(path);
	close(file);
	text[count] = 0;
	uint64_t value = strtoull(rest, &rest, 10);
	while (index-- > 0)
		value = strtoull(rest, &rest, 10);
	return value;
}

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

int main(int count, char **words)
{
	if (getpid() == 1)
		speed();
	if (count == 4 && !strcmp(words[1], "echo"))
		return echo(atoi(words[2]), atoi(words[3]));
	if (count == 4 && !strcmp(words[1], "send"))
		return send_pattern(atoi(words[2]), strtoull(words[3], NULL, 10));
	if (count == 5 && !strcmp(words[1], "verify"))
		return verify(words[2], strtoull(words[3], NULL, 10), !strcmp(words[4], "direct"));
	printf("tool: echo PORT COUNT | send PORT BYTES | verify DEVICE MIB direct|cached\n");
	return 2;
}
