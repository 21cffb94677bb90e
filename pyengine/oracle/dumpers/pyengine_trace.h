/* pyengine_trace.h: writes a trace that `pyengine verify` reads.  C99 and C++, no other file is needed.

   Copy this file into your program.  Apache-2.0, as the project pyengine.

       #include "pyengine_trace.h"

       pt_trace *t = pt_new();
       pt_note(t, "arithmetic", "float32, CUDA");
       pt_ids(t, ids, 20);                                  // the prompt: int32_t ids
       ... in the forward pass, with row i for token i of these 20:
       pt_put(t, "model.layers.0", PT_F32, hidden, 20, 2048);
       pt_ids(t, &next, 1);                                 // a decode step on an id of your choice
       pt_put(t, "model.layers.0", PT_F32, hidden, 1, 2048);
       if (pt_save(t, "mine.safetensors")) puts(pt_error(t));
       pt_free(t);

   Names are Hugging Face's module paths: `pyengine verify --help` and pyengine/oracle/trace.py list them.
   Data is copied when it is put, and the file is written by pt_save, whole or not at all.  Every function
   but pt_new returns 0, or -1 with a text in pt_error; after an error the others do nothing.
   Not for several threads at once.

   `pyengine bisect` runs a program with these variables in its environment:
       PYENGINE_IDS      the ids, between spaces        pt_env_ids
       PYENGINE_TENSORS  the names, between newlines    pt_wanted
       PYENGINE_TRACE    the file to write              pt_save(t, NULL)
*/
#ifndef PYENGINE_TRACE_H
#define PYENGINE_TRACE_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { PT_F32, PT_F16, PT_BF16, PT_F64, PT_I32, PT_I64, PT_U32 } pt_type;

typedef struct {
    char *name;
    pt_type type;
    int is_state;      /* one row, of the last step */
    size_t rows, features;
    int64_t *tokens;   /* [rows], the token of each */
    int64_t *columns;  /* [features], or NULL: all */
    unsigned char *data;
    size_t step;       /* in which it was put last, from 1 on */
} pt_tensor;

typedef struct {
    int64_t *ids;
    size_t n_ids, step_start, n_steps;
    size_t *steps;
    pt_tensor *tensors;
    size_t n_tensors;
    char *notes; /* JSON members */
    char error[256];
} pt_trace;

static inline size_t pt_size(pt_type type) {
    static const size_t sizes[] = {4, 2, 2, 8, 4, 8, 4};
    return sizes[type];
}

static inline const char *pt_type_name(pt_type type) {
    static const char *const names[] = {"F32", "F16", "BF16", "F64", "I32", "I64", "U32"};
    return names[type];
}

static inline int pt_fail(pt_trace *t, const char *what, const char *name) {
    if (!t->error[0]) snprintf(t->error, sizeof t->error, "pyengine_trace: %s%s%.120s", what, name ? ": " : "", name ? name : "");
    return -1;
}

/* The first error, or an empty text. */
static inline const char *pt_error(const pt_trace *t) { return t->error; }

/* NULL: out of memory. */
static inline pt_trace *pt_new(void) { return (pt_trace *)calloc(1, sizeof(pt_trace)); }

static inline void pt_free(pt_trace *t) {
    size_t i;
    if (!t) return;
    for (i = 0; i < t->n_tensors; i++) {
        free(t->tensors[i].name);
        free(t->tensors[i].tokens);
        free(t->tensors[i].columns);
        free(t->tensors[i].data);
    }
    free(t->tensors);
    free(t->ids);
    free(t->steps);
    free(t->notes);
    free(t);
}

static inline void *pt_grown(void *old, size_t count, size_t size) {
    if (size && count > SIZE_MAX / size) return NULL;
    return realloc(old, count && size ? count * size : 1);
}

/* Only printable ASCII without quotes and backslashes goes into the header as it is. */
static inline int pt_plain(const char *text) {
    for (; *text; text++)
        if ((unsigned char)*text < 32 || (unsigned char)*text > 126 || *text == '"' || *text == '\\') return 0;
    return 1;
}

/* A note in the metadata: "arithmetic", in your own words; "names", whose names the tensors have. */
static inline int pt_note(pt_trace *t, const char *key, const char *value) {
    size_t old = t->notes ? strlen(t->notes) : 0, more = strlen(key) + strlen(value) + 8;
    char *notes;
    if (t->error[0]) return -1;
    if (!pt_plain(key) || !pt_plain(value)) return pt_fail(t, "want plain ASCII without quotes in a note", key);
    notes = (char *)pt_grown(t->notes, old + more, 1);
    if (!notes) return pt_fail(t, "out of memory", NULL);
    snprintf(notes + old, more, ",\"%s\":\"%s\"", key, value);
    t->notes = notes;
    return 0;
}

/* Begin a step on these ids: the prompt, a piece of it, or a token that is decoded. */
static inline int pt_ids(pt_trace *t, const int32_t *ids, size_t n) {
    int64_t *all;
    size_t i, *steps;
    if (t->error[0]) return -1;
    if (!n) return pt_fail(t, "want ids, got none", NULL);
    all = (int64_t *)pt_grown(t->ids, t->n_ids + n, sizeof *all);
    if (all) t->ids = all;
    steps = (size_t *)pt_grown(t->steps, t->n_steps + 1, sizeof *steps);
    if (steps) t->steps = steps;
    if (!all || !steps) return pt_fail(t, "out of memory", NULL);
    for (i = 0; i < n; i++) all[t->n_ids + i] = ids[i];
    steps[t->n_steps++] = n;
    t->step_start = t->n_ids;
    t->n_ids += n;
    return 0;
}

/* How many ids the step has. */
static inline size_t pt_step_tokens(const pt_trace *t) { return t->n_ids - t->step_start; }

static inline pt_tensor *pt_find(pt_trace *t, const char *name) {
    size_t i;
    for (i = 0; i < t->n_tensors; i++)
        if (!strcmp(t->tensors[i].name, name)) return &t->tensors[i];
    return NULL;
}

/* Whether the step has the tensor already. */
static inline int pt_has(pt_trace *t, const char *name) {
    pt_tensor *tensor = pt_find(t, name);
    return tensor && tensor->step == t->n_steps;
}

static inline pt_tensor *pt_added(pt_trace *t, const char *name, pt_type type, size_t features) {
    pt_tensor *all = (pt_tensor *)pt_grown(t->tensors, t->n_tensors + 1, sizeof *all), *tensor;
    if (!all) return NULL;
    t->tensors = all;
    tensor = &all[t->n_tensors];
    memset(tensor, 0, sizeof *tensor);
    tensor->name = (char *)malloc(strlen(name) + 1);
    if (!tensor->name) return NULL;
    strcpy(tensor->name, name);
    tensor->type = type;
    tensor->features = features;
    t->n_tensors++;
    return tensor;
}

/* Part of a tensor: `data` is [rows, features] in C order; `tokens` [rows]: the token of each row in this
   step, rising from 0; `columns` [features]: which features they are, rising, or NULL: all. */
static inline int pt_put_part(pt_trace *t, const char *name, pt_type type, const void *data, size_t rows,
                              size_t features, const int64_t *tokens, const int64_t *columns) {
    pt_tensor *tensor = pt_find(t, name);
    size_t bytes = pt_size(type), i, old;
    unsigned char *grown;
    int64_t *places;
    if (t->error[0]) return -1;
    if (!t->n_ids) return pt_fail(t, "want pt_ids before the tensors", name);
    if (!pt_plain(name) || !*name || strchr(name, '@')) return pt_fail(t, "want a module path, got", name);
    if (!rows || !features) return pt_fail(t, "want values, got none", name);
    if (tensor && tensor->step == t->n_steps) return pt_fail(t, "want a tensor once a step, got it twice", name);
    if (tensor && (tensor->type != type || tensor->features != features))
        return pt_fail(t, "want the type and the features of the step before", name);
    for (i = 0; i < rows; i++)
        if (tokens[i] < (i ? tokens[i - 1] + 1 : 0) || tokens[i] >= (int64_t)pt_step_tokens(t))
            return pt_fail(t, "want rising tokens of this step", name);
    if (!tensor && !(tensor = pt_added(t, name, type, features))) return pt_fail(t, "out of memory", name);
    if (features > SIZE_MAX / bytes / (tensor->rows + rows)) return pt_fail(t, "out of memory", name);
    bytes *= features;
    old = tensor->rows;
    grown = (unsigned char *)pt_grown(tensor->data, old + rows, bytes);
    if (grown) tensor->data = grown;
    places = (int64_t *)pt_grown(tensor->tokens, old + rows, sizeof *places);
    if (places) tensor->tokens = places;
    if (!grown || !places) return pt_fail(t, "out of memory", name);
    if (columns && !tensor->columns) {
        tensor->columns = (int64_t *)pt_grown(NULL, features, sizeof *columns);
        if (!tensor->columns) return pt_fail(t, "out of memory", name);
        memcpy(tensor->columns, columns, features * sizeof *columns);
    }
    memcpy(grown + old * bytes, data, rows * bytes);
    for (i = 0; i < rows; i++) places[old + i] = (int64_t)t->step_start + tokens[i];
    tensor->rows = old + rows;
    tensor->step = t->n_steps;
    return 0;
}

/* `data` is [rows, features] in C order.  rows: as many as the step has ids, or 1: the last token's. */
static inline int pt_put(pt_trace *t, const char *name, pt_type type, const void *data, size_t rows, size_t features) {
    int64_t *tokens;
    size_t i;
    int status;
    if (t->error[0]) return -1;
    if (rows != pt_step_tokens(t) && rows != 1) return pt_fail(t, "want a row for each id of the step, or the last one's", name);
    tokens = (int64_t *)pt_grown(NULL, rows, sizeof *tokens);
    if (!tokens) return pt_fail(t, "out of memory", name);
    for (i = 0; i < rows; i++) tokens[i] = (int64_t)(pt_step_tokens(t) - rows + i);
    status = pt_put_part(t, name, type, data, rows, features, tokens, NULL);
    free(tokens);
    return status;
}

/* A memory of a layer after this step, `count` values: the one of the last step is kept. */
static inline int pt_put_state(pt_trace *t, const char *name, pt_type type, const void *data, size_t count) {
    pt_tensor *tensor = pt_find(t, name);
    if (tensor && tensor->step != t->n_steps) tensor->rows = 0;
    if (pt_put(t, name, type, data, 1, count)) return -1;
    pt_find(t, name)->is_state = 1;
    return 0;
}

/* ---- pyengine bisect ---- */

/* Whether PYENGINE_TENSORS asks for a tensor; without the variable every one is wanted. */
static inline int pt_wanted(const char *name) {
    const char *list = getenv("PYENGINE_TENSORS"), *at;
    size_t length = strlen(name);
    if (!list) return 1;
    for (at = list; (at = strstr(at, name)) != NULL; at++)
        if ((at == list || at[-1] == '\n') && (at[length] == '\n' || !at[length])) return 1;
    return 0;
}

/* PYENGINE_IDS -> at most `most` ids; returns their count, 0 without the variable. */
static inline size_t pt_env_ids(int32_t *ids, size_t most) {
    const char *text = getenv("PYENGINE_IDS");
    size_t n = 0;
    char *end;
    while (text && *text && n < most) {
        long id = strtol(text, &end, 10);
        if (end == text) break;
        ids[n++] = (int32_t)id;
        text = end;
    }
    return n;
}

/* ---- the file ---- */

typedef struct {
    char *text;
    size_t length, room;
    int failed;
} pt_text;

static inline void pt_add(pt_text *h, const char *more) {
    size_t n = strlen(more);
    if (h->length + n + 1 > h->room) {
        size_t room = 2 * (h->length + n + 64);
        char *grown = (char *)realloc(h->text, room);
        if (!grown) {
            h->failed = 1;
            return;
        }
        h->text = grown;
        h->room = room;
    }
    memcpy(h->text + h->length, more, n + 1);
    h->length += n;
}

static inline void pt_add_entry(pt_text *h, const char *name, const char *suffix, const char *type, size_t rows,
                                size_t features, size_t bytes, unsigned long long *at) {
    char numbers[160];
    pt_add(h, ",\"");
    pt_add(h, name);
    pt_add(h, suffix);
    if (features)
        snprintf(numbers, sizeof numbers, "\":{\"dtype\":\"%s\",\"shape\":[%llu,%llu],\"data_offsets\":[%llu,%llu]}", type,
                 (unsigned long long)rows, (unsigned long long)features, *at, *at + bytes);
    else
        snprintf(numbers, sizeof numbers, "\":{\"dtype\":\"%s\",\"shape\":[%llu],\"data_offsets\":[%llu,%llu]}", type,
                 (unsigned long long)rows, *at, *at + bytes);
    pt_add(h, numbers);
    *at += bytes;
}

/* Whether a tensor lacks tokens: its @rows are written then. */
static inline int pt_has_rows(const pt_trace *t, const pt_tensor *tensor) { return !tensor->is_state && tensor->rows != t->n_ids; }

static inline void pt_header(const pt_trace *t, pt_text *h) {
    unsigned long long at = 0;
    char number[32];
    size_t i;
    pt_add(h, "{\"__metadata__\":{\"format\":\"pyengine-trace-1\",\"order\":\"[");
    for (i = 0; i < t->n_tensors; i++) {
        pt_add(h, i ? ",\\\"" : "\\\"");
        pt_add(h, t->tensors[i].name);
        pt_add(h, "\\\"");
    }
    pt_add(h, "]\",\"steps\":\"[");
    for (i = 0; i < t->n_steps; i++) {
        snprintf(number, sizeof number, i ? ",%llu" : "%llu", (unsigned long long)t->steps[i]);
        pt_add(h, number);
    }
    pt_add(h, "]\"");
    if (t->notes) pt_add(h, t->notes);
    pt_add(h, "}");
    pt_add_entry(h, "input_ids", "", "I64", t->n_ids, 0, t->n_ids * 8, &at);
    for (i = 0; i < t->n_tensors; i++) {
        const pt_tensor *x = &t->tensors[i];
        pt_add_entry(h, x->name, "", pt_type_name(x->type), x->rows, x->features, x->rows * x->features * pt_size(x->type), &at);
        if (pt_has_rows(t, x)) pt_add_entry(h, x->name, "@rows", "I64", x->rows, 0, x->rows * 8, &at);
        if (x->columns) pt_add_entry(h, x->name, "@columns", "I64", x->features, 0, x->features * 8, &at);
    }
    pt_add(h, "}");
    while (!h->failed && h->length % 8) pt_add(h, " ");
}

static inline int pt_write(const pt_trace *t, FILE *file, const pt_text *h) {
    unsigned char length[8];
    size_t i;
    for (i = 0; i < 8; i++) length[i] = (unsigned char)((unsigned long long)h->length >> (8 * i));
    if (fwrite(length, 1, 8, file) != 8 || fwrite(h->text, 1, h->length, file) != h->length) return -1;
    if (fwrite(t->ids, 8, t->n_ids, file) != t->n_ids) return -1;
    for (i = 0; i < t->n_tensors; i++) {
        const pt_tensor *x = &t->tensors[i];
        size_t row = x->features * pt_size(x->type);
        if (fwrite(x->data, row, x->rows, file) != x->rows) return -1;
        if (pt_has_rows(t, x) && fwrite(x->tokens, 8, x->rows, file) != x->rows) return -1;
        if (x->columns && fwrite(x->columns, 8, x->features, file) != x->features) return -1;
    }
    return 0;
}

/* path NULL: the one of PYENGINE_TRACE.  The file appears when it is complete. */
static inline int pt_save(pt_trace *t, const char *path) {
    const uint16_t one = 1;
    pt_text header = {NULL, 0, 0, 0};
    char *partial;
    FILE *file;
    int status;
    if (t->error[0]) return -1;
    if (!path) path = getenv("PYENGINE_TRACE");
    if (!path) return pt_fail(t, "want a path, or PYENGINE_TRACE in the environment", NULL);
    if (*(const unsigned char *)&one != 1) return pt_fail(t, "want a little-endian machine", NULL);
    if (!t->n_ids || !t->n_tensors) return pt_fail(t, "want ids and tensors, got none", NULL);
    partial = (char *)malloc(strlen(path) + 9);
    pt_header(t, &header);
    if (!partial || header.failed) {
        free(partial);
        free(header.text);
        return pt_fail(t, "out of memory", NULL);
    }
    strcat(strcpy(partial, path), ".partial");
    file = fopen(partial, "wb");
    status = file ? pt_write(t, file, &header) : -1;
    if (file && fclose(file)) status = -1;
    if (file && !status) status = rename(partial, path);
    if (file && status) remove(partial);
    if (status) pt_fail(t, "cannot be written", path);
    free(header.text);
    free(partial);
    return status ? -1 : 0;
}

#ifdef __cplusplus
}
#endif
#endif
