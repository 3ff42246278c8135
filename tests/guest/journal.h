// journal DEVICE BLOCKS WORKERS: each worker writes blocks that are numbered and tell their place, around and around a part of
// BLOCKS blocks of its own, with O_DIRECT. Before it writes over a block it reads it: there must be what it wrote a turn before.
// On SIGTERM all workers read all that they wrote last.
#include <signal.h>

static volatile sig_atomic_t journal_ends;

static void end_journal(int number)
{
	(void)number;
	journal_ends = 1;
}

// Block `number` (from 1 on) of a worker; never the same words twice.
static void entry(uint64_t *words, uint64_t worker, uint64_t number)
{
	uint64_t state = worker << 48 | number;
	words[0] = worker;
	words[1] = number;
	for (int i = 2; i < BLOCK / 8; i++)
		words[i] = next(&state);
}

static void expect_entry(int file, uint64_t worker, uint64_t blocks, uint64_t number)
{
	static uint64_t wanted[BLOCK / 8] __attribute__((aligned(BLOCK))), found[BLOCK / 8] __attribute__((aligned(BLOCK)));
	uint64_t place = (worker * blocks + number % blocks) * BLOCK;
	entry(wanted, worker, number);
	if (pread(file, found, BLOCK, place) != BLOCK)
		die("pread");
	if (memcmp(wanted, found, BLOCK)) {
		printf("tool: worker %llu has %llu of worker %llu in place of %llu\n", (unsigned long long)worker,
		       (unsigned long long)found[1], (unsigned long long)found[0], (unsigned long long)number);
		exit(1);
	}
}

static void keep_journal(int file, uint64_t worker, uint64_t blocks, volatile uint64_t *count)
{
	static uint64_t words[BLOCK / 8] __attribute__((aligned(BLOCK)));
	uint64_t number = 0;
	while (!journal_ends) {
		number++;
		if (number > blocks)
			expect_entry(file, worker, blocks, number - blocks);
		entry(words, worker, number);
		if (pwrite(file, words, BLOCK, (worker * blocks + number % blocks) * BLOCK) != BLOCK)
			die("pwrite");
		*count = number;
	}
	for (uint64_t old = number > blocks ? number - blocks + 1 : 1; old <= number; old++)
		expect_entry(file, worker, blocks, old);
	exit(0);
}

static int journal(const char *path, uint64_t blocks, int workers)
{
	int file = open(path, O_RDWR | O_DIRECT);
	volatile uint64_t *counts = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pid_t children[MOST_WORKERS];
	if (file < 0 || counts == MAP_FAILED || workers < 1 || workers > MOST_WORKERS)
		die(path);
	// Without SA_RESTART: the pause below ends at once.
	struct sigaction end = { .sa_handler = end_journal };
	sigaction(SIGTERM, &end, NULL);
	for (int worker = 0; worker < workers; worker++)
		if (!(children[worker] = fork()))
			keep_journal(file, worker, blocks, counts + worker);
	while (!journal_ends)
		pause();
	for (int worker = 0; worker < workers; worker++)
		kill(children[worker], SIGTERM);
	uint64_t all = 0;
	int status, failed = 0;
	while (wait(&status) > 0)
		failed |= status;
	for (int worker = 0; worker < workers; worker++)
		all += counts[worker];
	printf("tool: journal of %s %s after %llu\n", path, failed ? "fails" : "is whole", (unsigned long long)all);
	return failed != 0;
}
