/* Two threads share out work on one pool: every item is done once, in pieces of at most a step. */
#include "pool.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { ITEMS = 600, TURNS = 3000 };

typedef struct {
    unsigned char done[ITEMS];
    long step;
} task;

static void work(void *arg, long first, long last)
{
    task *t = arg;
    if (last - first > t->step) puts("a piece is too long"), exit(1);
    for (long i = first; i < last; i++) t->done[i]++;
}

static void *call(void *p)
{
    for (int turn = 0; turn < TURNS; turn++) {
        const long count = turn * 7 % ITEMS;
        task t = {{0}, 1 + turn % 7};
        pool_run(p, work, &t, count, t.step);
        for (long i = 0; i < ITEMS; i++)
            if (t.done[i] != (i < count)) puts("an item is not done once"), exit(1);
    }
    return NULL;
}

int main(void)
{
    for (int threads = 1; threads <= 4; threads++) {
        pool *p = pool_new(threads);
        pthread_t other;
        if (pthread_create(&other, NULL, call, p)) return 1;
        call(p);
        pthread_join(other, NULL);
        pool_free(p);
    }
    return 0;
}
