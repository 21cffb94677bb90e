// Runs a GGUF with the callback of pyengine_cb_eval.h: MODEL OUT LAST_ALONE SPLIT ID ID ...
#include "ggml.h"
#include "ggml-backend.h"
#include "llama.h"
#include "pyengine_cb_eval.h"

#include <vector>

int main(int argc, char **argv) {
    std::vector<llama_token> ids;
    for (int i = 5; i < argc; i++) ids.push_back(atoi(argv[i]));
    bool last_alone = atoi(argv[3]);
    size_t split = (size_t)atoi(argv[4]);
    pt_trace *t = pt_new();
    pt_note(t, "names", "llama.cpp");
    pt_note(t, "arithmetic", "llama.cpp");
    llama_backend_init();
    llama_model_params mparams = llama_model_default_params();
    mparams.n_gpu_layers = 0;
    llama_model *model = llama_model_load_from_file(argv[1], mparams);
    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx = cparams.n_batch = cparams.n_ubatch = (uint32_t)ids.size();
    cparams.n_threads = cparams.n_threads_batch = 1;
    cparams.cb_eval = pt_cb_eval;
    cparams.cb_eval_user_data = t;
    llama_context *context = llama_init_from_model(model, cparams);
    for (size_t start = 0, n = split; start < ids.size(); start += n, n = ids.size() - start) {
        llama_batch batch = llama_batch_init((int32_t)n, 0, 1);
        batch.n_tokens = (int32_t)n;
        for (size_t i = 0; i < n; i++) {
            batch.token[i] = ids[start + i];
            batch.pos[i] = (llama_pos)(start + i);
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = !last_alone || i + 1 == n;
        }
        pt_ids(t, &ids[start], n);
        if (llama_decode(context, batch)) return 3;
        llama_batch_free(batch);
    }
    if (pt_save(t, argv[2])) return fprintf(stderr, "%s\n", pt_error(t)), 1;
    pt_free(t);
    llama_free(context);
    llama_model_free(model);
    return 0;
}
