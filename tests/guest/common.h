// What the parts of the tool share.
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
