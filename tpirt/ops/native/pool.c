#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

/* As long as waking a thread takes. Between two products of a token it is less than that. */
#define SPIN_NS 30000

struct pool {
    int threads;
    pthread_t *workers;
    pthread_mutex_t callers; /* held by the one whose work is shared out */
    pthread_mutex_t mutex;
    pthread_cond_t started;
    atomic_int sleeping;
    atomic_int ended;
    /* The turn (16 bits), its pieces (24) and the next one (24), in one word: a worker that comes
     * late to a turn that is over learns that from the word which it counted up. */
    atomic_ullong turn;
    atomic_long done; /* pieces of this turn */
    /* Of this turn; they change only when all of its pieces are done. */
    pool_work *work;
    void *arg;
    long count, step;
};

#define PIECES_BITS 24
#define NUMBER ((1ull << PIECES_BITS) - 1)

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static long now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void take_pieces(pool *p)
{
    for (;;) {
        const unsigned long long turn = atomic_fetch_add(&p->turn, 1);
        const long piece = turn & NUMBER;
        if (piece >= (long)(turn >> PIECES_BITS & NUMBER)) return;
        const long first = piece * p->step, last = first + p->step;
        p->work(p->arg, first, last < p->count ? last : p->count);
        atomic_fetch_add_explicit(&p->done, 1, memory_order_release);
    }
}

static unsigned number_of(unsigned long long turn) { return turn >> (2 * PIECES_BITS); }

static unsigned current(pool *p)
{
    return number_of(atomic_load_explicit(&p->turn, memory_order_acquire));
}

/* Wait until there is another turn than ``seen``. */
static unsigned await_turn(pool *p, unsigned seen)
{
    unsigned turn;
    const long until = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 64; i++) {
            if ((turn = current(p)) != seen) return turn;
            relax();
        }
    } while (now_ns() < until);
    pthread_mutex_lock(&p->mutex);
    atomic_fetch_add(&p->sleeping, 1);
    while ((turn = number_of(atomic_load(&p->turn))) == seen && !atomic_load(&p->ended))
        pthread_cond_wait(&p->started, &p->mutex);
    atomic_fetch_sub(&p->sleeping, 1);
    pthread_mutex_unlock(&p->mutex);
    return turn;
}

static void begin_turn(pool *p, unsigned long long pieces)
{
    const unsigned long long next = (number_of(atomic_load(&p->turn)) + 1) & 0xffff;
    atomic_store(&p->turn, next << (2 * PIECES_BITS) | pieces << PIECES_BITS);
    if (atomic_load(&p->sleeping)) {
        pthread_mutex_lock(&p->mutex);
        pthread_cond_broadcast(&p->started);
        pthread_mutex_unlock(&p->mutex);
    }
}

static void *serve(void *arg)
{
    pool *p = arg;
    for (unsigned turn = 0;;) {
        turn = await_turn(p, turn);
        if (atomic_load(&p->ended)) return NULL;
        take_pieces(p);
    }
}

void pool_free(pool *p)
{
    atomic_store(&p->ended, 1);
    begin_turn(p, 0);
    for (int i = 0; i < p->threads - 1; i++) pthread_join(p->workers[i], NULL);
    pthread_cond_destroy(&p->started);
    pthread_mutex_destroy(&p->mutex);
    pthread_mutex_destroy(&p->callers);
    free(p->workers);
    free(p);
}

pool *pool_new(int threads)
{
    pool *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    pthread_mutex_init(&p->callers, NULL);
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->started, NULL);
    p->threads = 1;
    p->workers = calloc(threads > 1 ? threads - 1 : 1, sizeof *p->workers);
    while (p->workers && p->threads < threads) {
        if (pthread_create(&p->workers[p->threads - 1], NULL, serve, p)) break;
        p->threads++;
    }
    return p;
}

int pool_threads(const pool *p) { return p->threads; }

void pool_run(pool *p, pool_work *work, void *arg, long count, long step)
{
    if (p->threads == 1 || count <= step || pthread_mutex_trylock(&p->callers)) {
        for (long first = 0; first < count; first += step)
            work(arg, first, count - first < step ? count : first + step);
        return;
    }
    const long pieces = (count + step - 1) / step;
    p->work = work, p->arg = arg, p->count = count, p->step = step;
    atomic_store(&p->done, 0);
    begin_turn(p, pieces);
    take_pieces(p);
    for (int i = 0; atomic_load_explicit(&p->done, memory_order_acquire) < pieces; i++) {
        if (i < 4096) relax();
        else sched_yield(); /* a worker's core is busy with something else */
    }
    pthread_mutex_unlock(&p->callers);
}
