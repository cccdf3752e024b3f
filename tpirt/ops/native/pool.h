/* Threads that share out the rows of a product.
 *
 * The calling thread works too. Pieces are taken from one counter, so that a slow or busy core
 * takes fewer, and none is waited for that has taken none. Workers wait for work spinning for a moment, then asleep.
 */
#pragma once

typedef struct pool pool;
typedef void pool_work(void *arg, long first, long last);

/* ``threads`` includes the caller; NULL if memory or threads are refused. */
pool *pool_new(int threads);
void pool_free(pool *p);
int pool_threads(const pool *p);

/* Run work over [0, count) in fewer than 2^24 - 1024 pieces of ``step``; returns when all are done.
 * Any thread may call it; while another one's call runs, the work is done by the caller alone. */
void pool_run(pool *p, pool_work *work, void *arg, long count, long step);
