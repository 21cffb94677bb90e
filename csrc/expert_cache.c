/* expert_cache.c - see "experts that are read when they are chosen" in pyengine.h.
 *
 * Threads of the cache wait in reads; the caller of pe_experts computes meanwhile.  One lock guards
 * everything: a token takes it a few hundred times, and a read takes a thousand times as long.
 */
#define _GNU_SOURCE
#include "kernels.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 64
#define HUGE_PAGE (2 << 20)
#define NONE (-1)

enum { ABSENT, LOADING, READY };

typedef struct {
    int64_t slot; /* or NONE */
    int64_t heat;
    int64_t used;    /* number of the call that last chose it */
    int64_t pending; /* reads that have not ended */
    int8_t state;
    int8_t pinned;  /* chosen by the current call and not computed yet */
    int8_t checked; /* its words were not refused */
} expert;

typedef struct {
    int64_t expert; /* layer * experts + expert */
    const pe_expert_read *read;
} request;

struct pe_expert_cache {
    int64_t layers, experts, slots, slot_bytes;
    int64_t limit; /* slots that may hold an expert */
    const pe_expert_layer *layer;
    const int32_t *files;
    int32_t past_cache;
    pid_t owner; /* threads do not survive a fork: in another process the caller reads */

    expert *all;      /* [layers, experts] */
    int64_t *tokens;  /* [layers] since the last halving */
    int64_t *time;    /* [layers] what the heat would be of an expert that every token chose */
    int64_t *spare;   /* [slots] the slots without an expert, n_spare of them */
    int64_t n_spare;
    char *memory;     /* [slots, slot_bytes] */
    void *mapping;    /* what it lies in */
    size_t mapping_bytes;

    /* The current call. */
    int64_t at; /* the layer's first expert */
    const int32_t *order;
    int64_t n, issued, computed; /* all, those that were asked for, those that were released */
    int64_t calls;

    request *queue; /* of one call at most */
    int64_t first, last;
    int64_t reading; /* requests that a thread works on */
    int32_t status;
    int64_t refused;
    pe_expert_counts counts;

    pthread_mutex_t mutex;
    pthread_cond_t work, done;
    int stop;
    int32_t threads;
    pthread_t thread[MAX_THREADS];
};

/* ---- reading ---------------------------------------------------------------------------------- */

/* Whole pages; the last one may end with the file. */
static int32_t read_pages(const pe_expert_cache *c, const pe_expert_read *r, char *slot)
{
    const int64_t skip = r->offset % PE_PAGE, begin = r->offset - skip;
    const int64_t whole = (skip + r->nbytes + PE_PAGE - 1) / PE_PAGE * PE_PAGE;
    const int fd = c->files[r->file];
    for (int64_t done = 0; done < skip + r->nbytes;) {
        ssize_t n = pread(fd, slot + r->at + done, (size_t)(whole - done), begin + done);
        if (n <= 0)
            return PE_ERROR_READ;
        done += n;
    }
#if defined(POSIX_FADV_DONTNEED)
    if (!c->past_cache)
        posix_fadvise(fd, begin, whole, POSIX_FADV_DONTNEED);
#endif
    return PE_OK;
}

/* PE_ERROR_NONFINITE if a word of the expert is refused. */
static int32_t check_words(const pe_expert_cache *c, int64_t which, const char *slot)
{
    const pe_expert_layer *layer = &c->layer[which / c->experts];
    const int64_t *places = layer->places + which % c->experts * 6;
    for (int64_t i = 0; i < layer->n_words; i++) {
        const pe_scale_words *w = &layer->words[i];
        if (pe_first_refused(slot + places[w->part] + w->offset, w->count, w->stride,
                             (int32_t)w->bytes, (uint32_t)w->bits) >= 0)
            return PE_ERROR_NONFINITE;
    }
    return PE_OK;
}

/* Takes the first request and serves it; the lock is held before and after. */
static void serve(pe_expert_cache *c)
{
    const request r = c->queue[c->first++];
    expert *e = &c->all[r.expert];
    char *slot = c->memory + e->slot * c->slot_bytes;
    c->reading++;
    pthread_mutex_unlock(&c->mutex);
    int32_t status = read_pages(c, r.read, slot);
    pthread_mutex_lock(&c->mutex);
    if (--e->pending == 0 && !status && !c->status && !e->checked) {
        pthread_mutex_unlock(&c->mutex);
        status = check_words(c, r.expert, slot);
        pthread_mutex_lock(&c->mutex);
        if (status)
            c->refused = r.expert;
        e->checked = !status;
    }
    c->reading--;
    if (status > c->status)
        c->status = status;
    if (e->pending == 0 && !c->status)
        e->state = READY;
    pthread_cond_signal(&c->done);
}

static void *read_requests(void *arg)
{
    pe_expert_cache *c = arg;
    pthread_mutex_lock(&c->mutex);
    while (!c->stop) {
        if (c->first < c->last)
            serve(c);
        else
            pthread_cond_wait(&c->work, &c->mutex);
    }
    pthread_mutex_unlock(&c->mutex);
    return NULL;
}

/* ---- slots ------------------------------------------------------------------------------------ */

/* An expert of a layer that has seen `time` gives up its slot before b, of b_time. */
static int gives_up_before(const expert *a, int64_t time, const expert *b, int64_t b_time)
{
    const int64_t mine = a->heat * b_time, other = b->heat * time; /* heat / time, without a quotient */
    return mine < other || (mine == other && a->used < b->used);
}

static void drop(pe_expert_cache *c, expert *e)
{
    c->spare[c->n_spare++] = e->slot;
    c->counts.resident--;
    e->slot = NONE;
    e->state = ABSENT;
}

/* The expert that gives up its slot before all others, or NULL.  Among equals it is the first. */
static expert *least_needed(pe_expert_cache *c)
{
    expert *victim = NULL;
    int64_t victim_time = 0;
    for (int64_t layer = 0; layer < c->layers; layer++) {
        expert *e = c->all + layer * c->experts;
        const int64_t time = c->time[layer];
        for (const expert *end = e + c->experts; e < end; e++) {
            if (e->slot != NONE && !e->pinned &&
                (!victim || gives_up_before(e, time, victim, victim_time))) {
                victim = e;
                victim_time = time;
            }
        }
    }
    return victim;
}

static int64_t slots_used(const pe_expert_cache *c) { return c->slots - c->n_spare; }

/* A slot that may be overwritten, or NONE. */
static int64_t free_slot(pe_expert_cache *c)
{
    if (slots_used(c) >= c->limit) {
        expert *victim = least_needed(c);
        if (!victim)
            return NONE;
        drop(c, victim);
    }
    return c->spare[--c->n_spare];
}

/* Asks for the call's experts in order, as far as there are slots. */
static void issue(pe_expert_cache *c)
{
    const int64_t before = c->last;
    for (; c->issued < pe_min(c->n, c->computed + PE_AHEAD) && !c->status; c->issued++) {
        const int64_t which = c->at + c->order[c->issued];
        const pe_expert_layer *layer = &c->layer[which / c->experts];
        expert *e = &c->all[which];
        const int64_t slot = free_slot(c);
        if (slot == NONE)
            break;
        c->counts.resident++;
        c->counts.misses++;
        e->slot = slot;
        e->state = LOADING;
        e->pinned = 1;
        e->pending = layer->n_reads;
        for (int64_t i = 0; i < layer->n_reads; i++) {
            const pe_expert_read *r = &layer->reads[which % c->experts * layer->n_reads + i];
            const int64_t end = r->offset % PE_PAGE + r->nbytes;
            c->counts.asked_bytes += r->nbytes;
            c->counts.read_bytes += (end + PE_PAGE - 1) / PE_PAGE * PE_PAGE;
            c->queue[c->last++] = (request){which, r};
        }
    }
    if (c->last > before)
        pthread_cond_broadcast(&c->work);
}

/* ---- one call of pe_experts -------------------------------------------------------------------- */

static void count_tokens(pe_expert_cache *c, int64_t layer, int64_t tokens)
{
    expert *e = c->all + layer * c->experts;
    c->tokens[layer] += tokens;
    for (int64_t k = 0; c->tokens[layer] >= PE_HALF_LIFE; k++) {
        c->tokens[layer] -= PE_HALF_LIFE;
        c->time[layer] >>= 1;
        for (int64_t i = 0; i < c->experts && k < 62; i++)
            e[i].heat >>= 1;
    }
    c->time[layer] += tokens * PE_HEAT;
}

int64_t pe_expert_cache_begin(pe_expert_cache *c, int64_t layer, int64_t tokens,
                              const int64_t *uses, int32_t *order, int64_t *n)
{
    pthread_mutex_lock(&c->mutex);
    c->at = layer * c->experts;
    c->calls++;
    c->first = c->last = 0;
    count_tokens(c, layer, tokens);
    *n = 0;
    for (int want_ready = 1; want_ready >= 0; want_ready--) {
        for (int64_t i = 0; i < c->experts; i++) {
            expert *e = &c->all[c->at + i];
            if (!uses[i] || (e->state == READY) != want_ready)
                continue;
            e->heat += uses[i] * PE_HEAT;
            e->used = c->calls;
            e->pinned = (int8_t)want_ready;
            order[(*n)++] = (int32_t)i;
        }
        if (want_ready)
            c->issued = *n;
    }
    const int64_t hits = c->issued;
    c->counts.hits += hits;
    c->computed = hits;
    c->order = order;
    c->n = *n;
    issue(c);
    pthread_mutex_unlock(&c->mutex);
    return hits;
}

static int64_t nanoseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int32_t pe_expert_cache_wait(pe_expert_cache *c, int64_t from, int64_t *to)
{
    const int64_t began = nanoseconds();
    const int alone = c->owner != getpid();
    pthread_mutex_lock(&c->mutex);
    while (!c->status && c->all[c->at + c->order[from]].state != READY) {
        if (alone && c->first < c->last)
            serve(c);
        else if (alone)
            c->status = PE_ERROR_READ;
        else
            pthread_cond_wait(&c->done, &c->mutex);
    }
    for (*to = from; *to < c->issued && c->all[c->at + c->order[*to]].state == READY;)
        ++*to;
    c->counts.wait_ns += nanoseconds() - began;
    const int32_t status = c->status;
    pthread_mutex_unlock(&c->mutex);
    return status;
}

void pe_expert_cache_release(pe_expert_cache *c, int64_t from, int64_t to)
{
    pthread_mutex_lock(&c->mutex);
    for (int64_t p = from; p < to; p++) { /* one by one: who gives up a slot is no matter of time */
        c->all[c->at + c->order[p]].pinned = 0;
        c->computed = p >= c->computed ? p + 1 : c->computed;
        issue(c);
    }
    pthread_mutex_unlock(&c->mutex);
}

void pe_expert_cache_end(pe_expert_cache *c)
{
    pthread_mutex_lock(&c->mutex);
    c->first = c->last; /* what no thread has begun */
    while (c->reading > 0)
        pthread_cond_wait(&c->done, &c->mutex);
    for (int64_t p = 0; p < c->issued; p++) {
        expert *e = &c->all[c->at + c->order[p]];
        e->pinned = 0;
        if (e->state == LOADING)
            drop(c, e);
    }
    c->n = c->issued = 0;
    c->status = PE_OK;
    pthread_mutex_unlock(&c->mutex);
}

pe_expert_place pe_expert_cache_place(const pe_expert_cache *c, int64_t layer, int64_t expert)
{
    const int64_t *at = c->layer[layer].places + expert * 6;
    const char *slot = c->memory + c->all[layer * c->experts + expert].slot * c->slot_bytes;
    pe_expert_place place;
    for (int i = 0; i < 3; i++) {
        place.data[i] = slot + at[i];
        place.scales[i] = at[3 + i] < 0 ? NULL : (const uint16_t *)(const void *)(slot + at[3 + i]);
    }
    return place;
}

/* ---- the cache -------------------------------------------------------------------------------- */

/* Of the largest call: every expert of the layer with the most reads. */
static int64_t most_requests(int64_t layers, int64_t experts, const pe_expert_layer *layer)
{
    int64_t most = 0;
    for (int64_t i = 0; i < layers; i++)
        most = layer[i].n_reads > most ? layer[i].n_reads : most;
    return most * experts;
}

/* Addresses for all slots, which cost nothing until a slot is filled: the limit bounds the memory. */
static int reserve(pe_expert_cache *c)
{
    c->mapping_bytes = (size_t)(c->slots * c->slot_bytes) + HUGE_PAGE;
    c->mapping = mmap(NULL, c->mapping_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (c->mapping == MAP_FAILED) {
        c->mapping = NULL;
        return -1;
    }
    c->memory = (char *)c->mapping + (HUGE_PAGE - (uintptr_t)c->mapping % HUGE_PAGE) % HUGE_PAGE;
#if defined(MADV_HUGEPAGE)
    madvise(c->memory, (size_t)(c->slots * c->slot_bytes), MADV_HUGEPAGE);
#endif
    return 0;
}

static int allocate(pe_expert_cache *c)
{
    c->all = calloc((size_t)(c->layers * c->experts), sizeof *c->all);
    c->tokens = calloc((size_t)c->layers, sizeof *c->tokens);
    c->time = calloc((size_t)c->layers, sizeof *c->time);
    c->spare = calloc((size_t)c->slots, sizeof *c->spare);
    c->queue =
        calloc((size_t)most_requests(c->layers, c->experts, c->layer) + 1, sizeof *c->queue);
    if (!c->all || !c->tokens || !c->time || !c->spare || !c->queue || reserve(c))
        return -1;
    for (int64_t i = 0; i < c->layers * c->experts; i++)
        c->all[i].slot = NONE;
    for (c->n_spare = 0; c->n_spare < c->slots; c->n_spare++) /* the first slot is taken first */
        c->spare[c->n_spare] = c->slots - 1 - c->n_spare;
    return 0;
}

pe_expert_cache *pe_expert_cache_new(int64_t layers, int64_t experts, const pe_expert_layer *layer,
                                     int64_t slots, int64_t slot_bytes, const int32_t *files,
                                     int32_t past_cache, int32_t threads)
{
    if (layers < 1 || experts < 1 || slots < 1 || slot_bytes < PE_PAGE || slot_bytes % PE_PAGE ||
        threads < 1 || threads > MAX_THREADS)
        return NULL;
    pe_expert_cache *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    c->layers = layers;
    c->experts = experts;
    c->layer = layer;
    c->slots = c->limit = pe_min(slots, layers * experts);
    c->slot_bytes = slot_bytes;
    c->files = files;
    c->past_cache = past_cache;
    c->owner = getpid();
    c->refused = NONE;
    pthread_mutex_init(&c->mutex, NULL);
    pthread_cond_init(&c->work, NULL);
    pthread_cond_init(&c->done, NULL);
    int failed = allocate(c);
    for (; !failed && c->threads < threads; c->threads += !failed)
        failed = pthread_create(&c->thread[c->threads], NULL, read_requests, c);
    if (failed) {
        pe_expert_cache_free(c);
        return NULL;
    }
    return c;
}

void pe_expert_cache_free(pe_expert_cache *c)
{
    if (!c)
        return;
    if (c->owner == getpid()) {
        pthread_mutex_lock(&c->mutex);
        c->stop = 1;
        pthread_cond_broadcast(&c->work);
        pthread_mutex_unlock(&c->mutex);
        for (int32_t i = 0; i < c->threads; i++)
            pthread_join(c->thread[i], NULL);
        pthread_cond_destroy(&c->work);
        pthread_cond_destroy(&c->done);
        pthread_mutex_destroy(&c->mutex);
    }
    if (c->mapping)
        munmap(c->mapping, c->mapping_bytes);
    free(c->queue);
    free(c->spare);
    free(c->time);
    free(c->tokens);
    free(c->all);
    free(c);
}

void pe_expert_cache_limit(pe_expert_cache *c, int64_t slots)
{
    pthread_mutex_lock(&c->mutex);
    c->limit = slots < 1 ? 1 : pe_min(slots, c->slots);
    while (slots_used(c) > c->limit) {
        drop(c, least_needed(c));
#if defined(MADV_DONTNEED)
        char *slot = c->memory + c->spare[c->n_spare - 1] * c->slot_bytes;
        madvise(slot, (size_t)c->slot_bytes, MADV_DONTNEED);
#endif
    }
    pthread_mutex_unlock(&c->mutex);
}

void pe_expert_cache_counts(pe_expert_cache *c, pe_expert_counts *counts)
{
    pthread_mutex_lock(&c->mutex);
    *counts = c->counts;
    pthread_mutex_unlock(&c->mutex);
}

void pe_expert_cache_resident(pe_expert_cache *c, uint8_t *resident)
{
    pthread_mutex_lock(&c->mutex);
    for (int64_t i = 0; i < c->layers * c->experts; i++)
        resident[i] = c->all[i].state == READY;
    pthread_mutex_unlock(&c->mutex);
}

int64_t pe_expert_cache_refused(pe_expert_cache *c)
{
    pthread_mutex_lock(&c->mutex);
    const int64_t refused = c->refused;
    pthread_mutex_unlock(&c->mutex);
    return refused;
}
