// Streams: TCP, vsock and files.
#include <linux/sockios.h>
#include <signal.h>
#include <sys/ioctl.h>

static struct sockaddr_vm address(unsigned cid, unsigned port)
{
	return (struct sockaddr_vm){ .svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port };
}

// All of a write, whatever its parts; false when the other end is gone.
static int write_all(int to, const char *bytes, size_t count)
{
	for (size_t done = 0; done < count;) {
		ssize_t part = write(to, bytes + done, count - done);
		if (part < 0)
			return 0;
		done += part;
	}
	return 1;
}

// Until the end; the number of bytes.
static uint64_t copy(int from, int to)
{
	static char buffer[262144];
	uint64_t total = 0;
	ssize_t count;
	for (; (count = read(from, buffer, sizeof buffer)) > 0; total += count)
		if (!write_all(to, buffer, count))
			die("write");
	if (count < 0)
		die("read");
	return total;
}

// Opens `tcp:ADDRESS:PORT`, `vsock:CID:PORT` (with patience: the other end may not listen yet), or a file to read or to write.
static int endpoint(char *name, int writing)
{
	char *kind = strtok(name, ":"), *where = strtok(NULL, ":"), *port = strtok(NULL, ":");
	if (!port) {
		int file = open(kind, writing ? O_WRONLY | O_CREAT | O_TRUNC : O_RDONLY, 0644);
		if (file < 0)
			die(kind);
		return file;
	}
	for (int tries = 0;; tries++) {
		int tcp = !strcmp(kind, "tcp"), connection = socket(tcp ? AF_INET : AF_VSOCK, SOCK_STREAM, 0);
		struct sockaddr_in inet = { .sin_family = AF_INET, .sin_port = htons(atoi(port)), .sin_addr.s_addr = inet_addr(where) };
		struct sockaddr_vm vsock = address(atoi(where), atoi(port));
		int failed = tcp ? connect(connection, (void *)&inet, sizeof inet) : connect(connection, (void *)&vsock, sizeof vsock);
		if (!failed)
			return connection;
		if (tries == 50)
			die("connect");
		close(connection);
		usleep(200000);
	}
}

// copy FROM TO: all of it, until the other end has taken it.
static int copy_all(char *from, char *to)
{
	int source = endpoint(from, 0), sink = endpoint(to, 1);
	uint64_t start = now_us(), bytes = copy(source, sink);
	char byte;
	if (!shutdown(sink, SHUT_WR))
		while (read(sink, &byte, 1) > 0)
			;
	printf("tool: copied %llu bytes in %llu us\n", (unsigned long long)bytes, (unsigned long long)(now_us() - start));
	return 0;
}

enum { SOME = 300000 };

// What a peer asks for by its first byte, to see either end close first:
// c: sends SOME bytes and closes. h: the same, but closes its half and reads. r: reads to the end, then answers.
// x: reads to the end, then writes until that fails. u: writes until that fails. g: leaves what is sent unread, and closes.
static void behave(int connection)
{
	static char bytes[SOME];
	char mode = 0;
	uint64_t got = 0;
	for (int i = 0; i < SOME; i++)
		bytes[i] = i % 251;
	if (read(connection, &mode, 1) != 1)
		die("no mode");
	if (mode == 'c' || mode == 'h')
		if (!write_all(connection, bytes, SOME))
			die("write");
	if (mode == 'h' && shutdown(connection, SHUT_WR))
		die("shutdown");
	if (mode == 'h' || mode == 'r' || mode == 'x') {
		char buffer[65536];
		ssize_t count;
		for (; (count = read(connection, buffer, sizeof buffer)) > 0; got += count)
			for (ssize_t i = 0; i < count; i++)
				if (buffer[i] != (char)((got + i) % 251))
					die("wrong byte");
		if (count < 0)
			die("read");
	}
	if (mode == 'r' && !write_all(connection, bytes, SOME))
		die("write");
	if (mode == 'x' || mode == 'u') {
		while (write_all(connection, bytes, SOME))
			;
		if (errno != EPIPE && errno != ECONNRESET)
			die("the write failed otherwise");
	}
	close(connection);
	printf("tool: %c read %llu\n", mode, (unsigned long long)got);
	fflush(stdout);
}

// behave from|to PORT COUNT: COUNT connections from the host to a port of the guest, or to the host.
static int behave_all(int from, unsigned port, int count)
{
	struct sockaddr_vm own = address(VMADDR_CID_ANY, port), host = address(VMADDR_CID_HOST, port);
	int listener = -1;
	signal(SIGPIPE, SIG_IGN);
	if (from) {
		listener = socket(AF_VSOCK, SOCK_STREAM, 0);
		if (listener < 0 || bind(listener, (void *)&own, sizeof own) || listen(listener, 8))
			die("listen");
		printf("tool: behaving\n");
		fflush(stdout);
	}
	for (int i = 0; i < count; i++) {
		int connection = from ? accept(listener, NULL, NULL) : socket(AF_VSOCK, SOCK_STREAM, 0);
		if (connection < 0 || (!from && connect(connection, (void *)&host, sizeof host)))
			die("connect");
		behave(connection);
	}
	printf("tool: behaved\n");
	return 0;
}

// watch FILE MS: by how much the number in a file grows in that time, behind a second in which it may do what it likes.
static int watch(const char *path, unsigned ms)
{
	usleep(1000000);
	printf("tool: watching\n");
	fflush(stdout);
	uint64_t start = now_us(), before = counter(path, 0);
	usleep(ms * 1000);
	uint64_t grown = counter(path, 0) - before;
	printf("tool: %s grew by %llu in %llu us\n", path, (unsigned long long)grown, (unsigned long long)(now_us() - start));
	return 0;
}

// cid: the guest's own.
static int local_cid(void)
{
	unsigned cid;
	int file = open("/dev/vsock", O_RDONLY);
	if (file < 0 || ioctl(file, IOCTL_VM_SOCKETS_GET_LOCAL_CID, &cid))
		die("/dev/vsock");
	printf("tool: cid %u\n", cid);
	return 0;
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

