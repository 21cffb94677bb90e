/* pool.c - threads that spin for a moment, then sleep; see pe_pool_run in kernels.h.
 *
 * Threads claim parts from a counter, large parts first, so that a thread that the system suspends
 * or slows down does not delay the others for long.  The thread that computes a part has no
 * influence on the result: parts are whole output elements.
 */
#define _GNU_SOURCE
#include "kernels.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Pauses before a waiting thread sleeps: about 50 to 200 microseconds, by the length of a pause.
 * This is longer than the time between two operations of one token, so that a thread does not sleep
 * there, and much shorter than a time slice of the system.  The value is not tuned any further. */
#define SPINS 4000

/* A part is 1 / (SHARES * threads) of the work that is left.  With 1, the first part of each thread
 * would be its equal share, and one slow thread would delay the end.  With 2, the largest part is
 * half an equal share, and the number of claims still grows only with the logarithm of the work. */
#define SHARES 2
#define MAX_THREADS 1024

struct pe_pool {
    int32_t n;
    int32_t pin;
    pid_t owner; /* threads do not survive a fork: in another process the caller works alone */
    pthread_t threads[MAX_THREADS];
    void *scratch;
    size_t scratch_bytes;
    void *split;

    pe_task *task;
    void *arg;
    int64_t items, grain;
    atomic_int_fast64_t next;
    atomic_int_fast32_t status;
    atomic_int_fast32_t working; /* helpers that have not finished the current job */

    atomic_uint_fast32_t job; /* counts jobs; helpers wait for it to change */
    int stop;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    atomic_int_fast32_t sleeping;
};

typedef struct {
    pe_pool *pool;
    int32_t index;
} helper_start;

/* ---- the floating-point environment ---------------------------------------------------------- */

/* Rounding and subnormals as IEEE 754 defines them, for any setting of the host program (a library
 * built with -ffast-math may switch subnormals off for the whole thread). */
#if defined(__x86_64__)
typedef unsigned int fp_state;
static fp_state fp_enter(void)
{
    fp_state old = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return old;
}
static void fp_leave(fp_state old) { _mm_setcsr(old); }
#elif defined(__aarch64__)
typedef uint64_t fp_state;
static fp_state fp_enter(void)
{
    fp_state old;
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    __asm__ volatile("msr fpcr, %0" : : "r"((fp_state)0));
    return old;
}
static void fp_leave(fp_state old) { __asm__ volatile("msr fpcr, %0" : : "r"(old)); }
#else
typedef int fp_state;
static fp_state fp_enter(void) { return 0; }
static void fp_leave(fp_state old) { (void)old; }
#endif

/* ---- one job --------------------------------------------------------------------------------- */

static void relax(void)
{
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void raise_status(pe_pool *pool, int32_t status)
{
    int_fast32_t seen = atomic_load(&pool->status);
    while (status > seen && !atomic_compare_exchange_weak(&pool->status, &seen, status))
        ;
}

/* Claims [*begin, *end); 0 when nothing is left. */
static int claim(pe_pool *pool, int64_t *begin, int64_t *end)
{
    int_fast64_t next = atomic_load(&pool->next), part;
    do {
        if (next >= pool->items)
            return 0;
        part = (pool->items - next) / (pool->n * SHARES) / pool->grain * pool->grain;
        part = part > pool->grain ? part : pool->grain;
    } while (!atomic_compare_exchange_weak(&pool->next, &next, next + part));
    *begin = next;
    *end = pe_min(next + part, pool->items);
    return 1;
}

static void work(pe_pool *pool)
{
    fp_state old = fp_enter();
    for (int64_t begin, end; claim(pool, &begin, &end);) {
        int32_t status = pool->task(pool->arg, begin, end);
        if (status)
            raise_status(pool, status);
    }
    fp_leave(old);
}

/* Waits for a job other than seen; spins first, because the next job usually comes within the
 * spins. */
static uint_fast32_t wait_for_job(pe_pool *pool, uint_fast32_t seen)
{
    for (int i = 0; i < SPINS; i++) {
        uint_fast32_t job = atomic_load(&pool->job);
        if (job != seen)
            return job;
        relax();
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleeping, 1);
    while (atomic_load(&pool->job) == seen)
        pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->sleeping, 1);
    pthread_mutex_unlock(&pool->mutex);
    return atomic_load(&pool->job);
}

static void announce(pe_pool *pool)
{
    atomic_fetch_add(&pool->job, 1);
    if (atomic_load(&pool->sleeping) > 0) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
}

static void wait_for_helpers(pe_pool *pool)
{
    for (int64_t i = 0; atomic_load(&pool->working) > 0; i++) {
        if (i < SPINS)
            relax();
        else
            sched_yield();
    }
}

int32_t pe_run_alone(pe_task *task, void *arg, int64_t items)
{
    fp_state old = fp_enter();
    int32_t status = task(arg, 0, items);
    fp_leave(old);
    return status;
}

int32_t pe_pool_run(pe_pool *pool, pe_task *task, void *arg, int64_t items, int64_t grain)
{
    if (items <= 0)
        return PE_OK;
    if (pool->n == 1 || items <= grain || pool->owner != getpid())
        return pe_run_alone(task, arg, items);
    pool->grain = grain;
    pool->task = task;
    pool->arg = arg;
    pool->items = items;
    atomic_store(&pool->next, 0);
    atomic_store(&pool->status, PE_OK);
    atomic_store(&pool->working, pool->n - 1);
    announce(pool);
    work(pool);
    wait_for_helpers(pool);
    return (int32_t)atomic_load(&pool->status);
}

/* ---- threads --------------------------------------------------------------------------------- */

/* Binds the calling thread to the index-th processor that the process may use; best effort. */
static void pin_thread(int32_t index)
{
#if defined(__linux__)
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof allowed, &allowed))
        return;
    for (int cpu = 0, seen = 0; cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, &allowed) && seen++ == index) {
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            pthread_setaffinity_np(pthread_self(), sizeof one, &one);
            return;
        }
    }
#else
    (void)index;
#endif
}

static void *help(void *arg)
{
    helper_start start = *(helper_start *)arg;
    pe_pool *pool = start.pool;
    free(arg);
    if (pool->pin)
        pin_thread(start.index);
    for (uint_fast32_t seen = 0;;) {
        seen = wait_for_job(pool, seen);
        if (pool->stop)
            return NULL;
        work(pool);
        atomic_fetch_sub(&pool->working, 1);
    }
}

static int start_helper(pe_pool *pool, int32_t index)
{
    helper_start *start = malloc(sizeof *start);
    if (!start)
        return -1;
    *start = (helper_start){pool, index};
    if (pthread_create(&pool->threads[index], NULL, help, start)) {
        free(start);
        return -1;
    }
    return 0;
}

pe_pool *pe_pool_new(int32_t n, int32_t pin)
{
    if (n < 1 || n > MAX_THREADS)
        return NULL;
    pe_pool *pool = calloc(1, sizeof *pool);
    if (!pool)
        return NULL;
    pool->n = 1;
    pool->pin = pin;
    pool->owner = getpid();
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    for (; pool->n < n; pool->n++) {
        if (start_helper(pool, pool->n)) {
            pe_pool_free(pool);
            return NULL;
        }
    }
    return pool;
}

void pe_pool_free(pe_pool *pool)
{
    if (!pool)
        return;
    if (pool->owner == getpid()) {
        pool->stop = 1;
        announce(pool);
        for (int32_t i = 1; i < pool->n; i++)
            pthread_join(pool->threads[i], NULL);
        pthread_cond_destroy(&pool->wake);
        pthread_mutex_destroy(&pool->mutex);
    }
    free(pool->scratch);
    free(pool->split);
    free(pool);
}

int32_t pe_pool_threads(const pe_pool *pool) { return pool->n; }

void *pe_pool_scratch(pe_pool *pool, size_t bytes)
{
    if (bytes > pool->scratch_bytes) {
        void *block;
        free(pool->scratch);
        pool->scratch = NULL;
        pool->scratch_bytes = 0;
        if (posix_memalign(&block, 64, bytes))
            return NULL;
        pool->scratch = block;
        pool->scratch_bytes = bytes;
    }
    return pool->scratch;
}

void *pe_pool_split(pe_pool *pool)
{
    if (!pool->split && posix_memalign(&pool->split, 64, PE_POOL_SPLIT))
        pool->split = NULL;
    return pool->split;
}

int64_t pe_pool_scratch_bytes(const pe_pool *pool) { return (int64_t)pool->scratch_bytes; }
