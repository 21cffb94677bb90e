/* Writes the trace that test_dumpers.py expects: OUT. */
#include "pyengine_trace.h"

int main(int argc, char **argv) {
    int32_t ids[3] = {1, 2, 3}, next = 4;
    float x[6] = {0.5f, 1, 2, 3, 4, 5};
    uint16_t half[4] = {0x3f00, 0x3f80, 0x4000, 0x4040}; /* bfloat16: 0.5 1 2 3 */
    uint16_t f16[3] = {0x3800, 0x3c00, 0x4000};          /* float16: 0.5 1 2 */
    int64_t tokens[2] = {0, 2}, columns[2] = {1, 7};
    int32_t chosen[6] = {3, 1, 2, 0, 1, 2};
    pt_trace *t = pt_new();
    (void)argc;
    pt_note(t, "arithmetic", "float32, by hand");
    pt_ids(t, ids, 3);
    pt_put(t, "model.layers.0", PT_F32, x, 3, 2);
    pt_put(t, "lm_head", PT_F32, x, 1, 2);
    pt_put_part(t, "model.layers.1", PT_BF16, half, 2, 2, tokens, columns);
    pt_put(t, "model.layers.0.mlp.gate.2", PT_I32, chosen, 3, 2);
    pt_put(t, "model.layers.2", PT_F16, f16, 3, 1);
    pt_put_state(t, "model.layers.0.linear_attn.conv_state", PT_F32, x, 6);
    if (!pt_has(t, "lm_head") || pt_has(t, "model.norm")) return 2;
    pt_ids(t, &next, 1);
    pt_put(t, "model.layers.0", PT_F32, x, 1, 2);
    pt_put(t, "lm_head", PT_F32, x, 1, 2);
    x[0] = 9;
    pt_put_state(t, "model.layers.0.linear_attn.conv_state", PT_F32, x, 6);
    if (pt_save(t, argv[1])) {
        puts(pt_error(t));
        pt_free(t);
        return 1;
    }
    if (!pt_put(t, "lm_head", PT_F32, x, 1, 2) || pt_save(t, argv[1]) != -1) return 3; /* twice a step */
    puts(pt_error(t));
    pt_free(t);
    return 0;
}
