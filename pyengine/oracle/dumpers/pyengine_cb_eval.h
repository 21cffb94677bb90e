/* pyengine_cb_eval.h: a trace of llama.cpp, or of a fork of it, by its evaluation callback.  C++ or C99.

   Copy this file and pyengine_trace.h beside your program (examples/eval-callback is a good place):

       #include "ggml.h"
       #include "ggml-backend.h"
       #include "llama.h"
       #include "pyengine_cb_eval.h"

       pt_trace * t = pt_new();
       pt_note(t, "names", "llama.cpp");
       pt_note(t, "arithmetic", "llama.cpp, my fork");
       cparams.cb_eval           = pt_cb_eval;     // llama_context_params, or common_params
       cparams.cb_eval_user_data = t;
       cparams.n_ubatch          = cparams.n_batch; // a step in one piece; common_params: params.warmup = false
       ...
       pt_ids(t, tokens, n_tokens);                // before each llama_decode of one sequence
       llama_decode(ctx, batch);
       ...
       if (pt_save(t, "mine.safetensors")) puts(pt_error(t));

   then: pyengine verify model.gguf mine.safetensors --budget int8-activations
   The names and shapes are llama.cpp's own: `verify` turns them.  Ask for the logits of every token
   (batch.logits[i] = 1), or the last layer is computed for the last token alone.
*/
#ifndef PYENGINE_CB_EVAL_H
#define PYENGINE_CB_EVAL_H

#include "pyengine_trace.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The tensors that are modules' outputs, by their names before "-LAYER". */
static inline int pt_is_module(const char *name) {
    static const char *const whole[] = {"model.input_embed", "model.embed_tokens", "result_norm", "result_output"};
    static const char *const stems[] = {
        "attn_norm", "attn_post_norm", "l_out", "ffn_moe_logits", "ffn_moe_topk", "ffn_moe_weights_norm", "ffn_moe_out",
        "ffn_gate", "ffn_up", "ffn_shexp", "shared_expert_gate", "ffn_out", "linear_attn_qkv_mixed", "z", "beta", "alpha",
        "linear_attn_mixed_qkvz", "linear_attn_mixed_ba", "final_output", "linear_attn_out", "Qcur_full", "Kcur", "Vcur",
        "Qcur_normed", "Kcur_normed", "attn_output"};
    const char *dash = strrchr(name, '-'), *digit;
    size_t i;
    for (i = 0; i < sizeof whole / sizeof *whole; i++)
        if (!strcmp(name, whole[i])) return 1;
    if (!dash || !dash[1]) return 0;
    for (digit = dash + 1; *digit; digit++) /* not "z-0 (reshaped)" */
        if (*digit < '0' || *digit > '9') return 0;
    for (i = 0; i < sizeof stems / sizeof *stems; i++)
        if (strlen(stems[i]) == (size_t)(dash - name) && !strncmp(name, stems[i], (size_t)(dash - name))) return 1;
    return 0;
}

static inline int pt_of_ggml(enum ggml_type type, pt_type *found) {
    switch (type) {
        case GGML_TYPE_F32: *found = PT_F32; return 1;
        case GGML_TYPE_F16: *found = PT_F16; return 1;
        case GGML_TYPE_BF16: *found = PT_BF16; return 1;
        case GGML_TYPE_I32: *found = PT_I32; return 1;
        default: return 0;
    }
}

/* The elements of a tensor of any strides, in C order of ggml's ne reversed. */
static inline unsigned char *pt_elements(const struct ggml_tensor *x, const unsigned char *raw, size_t size) {
    unsigned char *out = (unsigned char *)malloc((size_t)ggml_nelements(x) * size), *at = out;
    int64_t i0, i1, i2, i3;
    if (!out) return NULL;
    for (i3 = 0; i3 < x->ne[3]; i3++)
        for (i2 = 0; i2 < x->ne[2]; i2++)
            for (i1 = 0; i1 < x->ne[1]; i1++)
                for (i0 = 0; i0 < x->ne[0]; i0++, at += size)
                    memcpy(at, raw + (size_t)i0 * x->nb[0] + (size_t)i1 * x->nb[1] + (size_t)i2 * x->nb[2] + (size_t)i3 * x->nb[3], size);
    return out;
}

/* ggml_backend_sched_eval_callback; user_data: a pt_trace.  Of tensors with one name, the first counts. */
static inline bool pt_cb_eval(struct ggml_tensor *x, bool ask, void *user_data) {
    pt_trace *t = (pt_trace *)user_data;
    unsigned char *raw, *elements;
    size_t rows = 1, count;
    pt_type type;
    int axis;
    if (ask) return pt_is_module(x->name) && pt_of_ggml(x->type, &type) && !pt_has(t, x->name);
    if (!pt_of_ggml(x->type, &type)) return true;
    raw = (unsigned char *)malloc(ggml_nbytes(x));
    if (raw) ggml_backend_tensor_get(x, raw, 0, ggml_nbytes(x));
    elements = raw ? pt_elements(x, raw, pt_size(type)) : NULL;
    count = (size_t)ggml_nelements(x);
    for (axis = 3; axis > 0 && x->ne[axis] == 1; axis--) {} /* the slowest axis is that of the tokens */
    if ((size_t)x->ne[axis] == pt_step_tokens(t)) rows = pt_step_tokens(t);
    if (elements) pt_put(t, x->name, type, elements, rows, count / rows);
    else pt_fail(t, "out of memory", x->name);
    free(elements);
    free(raw);
    return true;
}

#ifdef __cplusplus
}
#endif
#endif
