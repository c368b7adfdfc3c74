/* The decoder layer around the linear layers and attention. One call runs one layer over the whole batch. */
#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdlib.h>
#include "evermini.h"

static _Thread_local struct { void *p; size_t size; } scratch[SCRATCH_COUNT];

void *thread_scratch(int which, size_t bytes) {
    if (scratch[which].size < bytes) {
        free(scratch[which].p);
        bytes = (bytes + 4095) & ~(size_t)4095;
        scratch[which].p = aligned_alloc(4096, bytes);
        if (!scratch[which].p) abort();
        scratch[which].size = bytes;
    }
    return scratch[which].p;
}

/* One butterfly stage inside a vector: lanes i and i ^ H become their sum and difference. */
#define LANE_STAGE(v, H) \
    ((v) * (f32x16){LANE_SIGNS_##H} + __builtin_shufflevector(v, v, LANE_ORDER_##H))
#define LANE_SIGNS_1 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1
#define LANE_SIGNS_2 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1
#define LANE_SIGNS_4 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1
#define LANE_SIGNS_8 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1
#define LANE_ORDER_1 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14
#define LANE_ORDER_2 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13
#define LANE_ORDER_4 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11
#define LANE_ORDER_8 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7

/* In place: each run of 128 inputs (or of the largest power of two from 16 that divides k) times a Hadamard matrix.
 * It spreads outliers over the run, so that one int8 scale serves the row; weights are rotated alike when packed. */
static void hadamard_row(float *x, int64_t k) {
    int64_t run = 128;
    while (run > 1 && k % run) run /= 2;
    if (run < 16) return; /* no rotation, here and in the packing */
    const int64_t vectors = run / 16;
    const float norm = 1.0f / sqrtf((float)run);
    for (float *v = x; v < x + k; v += run) {
        f32x16 r[8];
        for (int64_t i = 0; i < vectors; i++) {
            f32x16 a = loadf(v + i * 16) * norm;
            a = LANE_STAGE(a, 1);
            a = LANE_STAGE(a, 2);
            a = LANE_STAGE(a, 4);
            r[i] = LANE_STAGE(a, 8);
        }
        for (int64_t h = 1; h < vectors; h *= 2)
            for (int64_t i = 0; i < vectors; i++)
                if (!(i & h)) {
                    f32x16 a = r[i], b = r[i + h];
                    r[i] = a + b;
                    r[i + h] = a - b;
                }
        for (int64_t i = 0; i < vectors; i++) storef(v + i * 16, r[i]);
    }
}

void quantize_row(float *x, int64_t k, const Activation *out, int64_t row) {
    const int64_t k_padded = (k + 31) / 32 * 32, groups = k_padded / 32;
    for (int64_t i = k; i < k_padded; i++) x[i] = 0;
    hadamard_row(x, k);
    f32x16 peak = splatf(0);
    for (int64_t i = 0; i < k_padded; i += 16) {
        peak = maxf(peak, absf(loadf(x + i)));
    }
    const float absmax = reduce_max(peak), inverse = absmax > 0 ? 127.0f / absmax : 0;
    int8_t *q = out->q + row * k_padded;
    int32_t *sums = out->group_sums + row * (groups + 1), total = 0;
    out->scale[row] = absmax / 127.0f;
    for (int64_t g = 0; g < groups; g++) {
        const i32x16 a = round_to_int(loadf(x + g * 32) * inverse);
        const i32x16 b = round_to_int(loadf(x + g * 32 + 16) * inverse);
        store_bytes(q + g * 32, a);
        store_bytes(q + g * 32 + 16, b);
        total += sums[g] = reduce_addi(a + b);
    }
    sums[groups] = total;
}

void rms_norm_row(const float *x, const float *weight, int64_t n, float eps, float *y) {
    f32x16 sum = splatf(0);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) { f32x16 v = loadf(x + i); sum += v * v; }
    float total = reduce_add(sum);
    for (; i < n; i++) total += x[i] * x[i];
    const float scale = 1.0f / sqrtf(total / (float)n + eps);
    for (i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

/* Rows with adapters leave their inputs in lora->x, too. */
static void norm_quantize_team(Team *team, const float *x, const float *weight, int64_t m, int64_t k, float eps, const Activation *out,
                               const Lora *lora) {
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < m; r++) {
        float *tmp = thread_scratch(SCRATCH_ROW, padded(k) * 4);
        rms_norm_row(x + r * k, weight, k, eps, tmp);
        if (lora && r >= lora->first) {
            float *kept = lora->x + (r - lora->first) * padded(k);
            memcpy(kept, tmp, k * 4);
            memset(kept + k, 0, (padded(k) - k) * 4);
        }
        quantize_row(tmp, k, out, r);
    }
    team_wait(team);
}

void quantize_team(Team *team, const float *x, int64_t m, int64_t ldx, int64_t k, const Activation *out) {
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < m; r++) {
        float *tmp = thread_scratch(SCRATCH_ROW, padded(k) * 4);
        memcpy(tmp, x + r * ldx, k * 4);
        quantize_row(tmp, k, out, r);
    }
    team_wait(team);
}

/* Write rotated keys and plain values to KV memory; queries and keys in qkv stay unrotated. */
static void store_kv_team(Team *team, const Shape *s, const Batch *b, float *qkv, const float *q_norm, const float *k_norm,
                          uint16_t *k_cache, uint16_t *v_cache) {
    const int64_t d = s->head_dim, width = (s->num_heads + 2 * s->num_kv_heads) * d;
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < b->num_tokens; t++) {
        float *q = qkv + t * width, *k = q + s->num_heads * d, *v = k + s->num_kv_heads * d;
        if (q_norm) {
            for (int64_t h = 0; h < s->num_heads; h++) rms_norm_row(q + h * d, q_norm, d, s->rms_eps, q + h * d);
            for (int64_t h = 0; h < s->num_kv_heads; h++) rms_norm_row(k + h * d, k_norm, d, s->rms_eps, k + h * d);
        }
        const float *cos = s->cos + b->positions[t] * (d / 2), *sin = s->sin + b->positions[t] * (d / 2);
        const int64_t block = b->slots[t] / 32, offset = b->slots[t] % 32;
        for (int64_t h = 0; h < s->num_kv_heads; h++) {
            uint16_t *kd = k_cache + (block * s->num_kv_heads + h) * d * 32 + offset;
            uint16_t *vd = v_cache + ((block * s->num_kv_heads + h) * 32 + offset) * d;
            for (int64_t j = 0; j < d / 2; j++) {
                const float a = k[h * d + j], c = k[h * d + j + d / 2];
                kd[j * 32] = float_to_half(a * cos[j] - c * sin[j]);
                kd[(j + d / 2) * 32] = float_to_half(c * cos[j] + a * sin[j]);
            }
            for (int64_t j = 0; j < d; j += 16) store_half(vd + j, loadf(v + h * d + j));
        }
    }
    team_wait(team);
}

void team_wait(Team *team) {
    const int phase = __atomic_load_n(&team->phase, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&team->arrived, 1, __ATOMIC_ACQ_REL) == team->threads) {
        team->arrived = 0;
        __atomic_store_n(&team->phase, phase + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&team->phase, __ATOMIC_ACQUIRE) == phase; spins++) {
        if (spins < 2000) {
            spin_pause();
        } else {
            sched_yield();
        }
    }
}

/* `count` layers. hidden (T, hidden_size) float32 is updated in place; ws->qkv is left holding the last layer's
 * unrotated q, k, v. k_caches and v_caches point at each layer's KV memory. */
void em_layers(const Shape *s, const Layer *layers, int64_t count, const Batch *b, const Workspace *ws, float *hidden,
               uint16_t *const *k_caches, uint16_t *const *v_caches) {
    const int64_t m = b->num_tokens, hidden_size = s->hidden_size, attn_size = s->num_heads * s->head_dim;
    const int64_t kv_size = s->num_kv_heads * s->head_dim;
    int64_t partial_floats;
    void *plan;
    const int64_t tasks = attention_plan(s, b, &plan, &partial_floats);
    float *partial = thread_scratch(SCRATCH_PARTIAL, partial_floats * sizeof(float));
    const Lora *lora = b->lora;
    const int64_t first = lora ? lora->first : m;
    Team state = {0}, *team = &state;
#pragma omp parallel
    {
        TEAM_START(state);
        for (int64_t i = 0; i < count; i++) {
            const Layer *layer = &layers[i];
            const int64_t gated_size = layer->gate_up.n / 2;
            const LoraCall calls[] = {
                {lora, i, LORA_Q, 3, {attn_size, kv_size, kv_size}},
                {lora, i, LORA_O, 1, {hidden_size}},
                {lora, i, LORA_GATE, 2, {gated_size, gated_size}},
                {lora, i, LORA_DOWN, 1, {hidden_size}},
            };
            const LoraCall *qkv = lora ? &calls[0] : NULL, *o = lora ? &calls[1] : NULL;
            const LoraCall *gate_up = lora ? &calls[2] : NULL, *down = lora ? &calls[3] : NULL;
            norm_quantize_team(team, hidden, layer->input_norm, m, hidden_size, s->rms_eps, &ws->act, lora);
            if (lora) lora_team(team, qkv, lora->x, padded(hidden_size), hidden_size);
            linear_team(team, &layer->qkv, &ws->act, m, ws->qkv, layer->qkv.n, STORE, qkv);
            store_kv_team(team, s, b, ws->qkv, layer->q_norm, layer->k_norm, k_caches[i], v_caches[i]);
            attention_team(team, s, b, plan, tasks, ws->qkv, k_caches[i], v_caches[i], ws->attn, partial);
            quantize_team(team, ws->attn, m, attn_size, attn_size, &ws->act);
            if (lora) lora_team(team, o, ws->attn + first * attn_size, attn_size, attn_size);
            linear_team(team, &layer->o, &ws->act, m, hidden, hidden_size, ADD, o);
            norm_quantize_team(team, hidden, layer->post_norm, m, hidden_size, s->rms_eps, &ws->act, lora);
            if (lora) lora_team(team, gate_up, lora->x, padded(hidden_size), hidden_size);
            linear_team(team, &layer->gate_up, &ws->act, m, ws->gated, gated_size, GATE, gate_up);
            quantize_team(team, ws->gated, m, gated_size, s->intermediate_size, &ws->act);
            if (lora) lora_team(team, down, ws->gated + first * gated_size, gated_size, s->intermediate_size);
            linear_team(team, &layer->down, &ws->act, m, hidden, hidden_size, ADD, down);
        }
    }
}

/* Only the unrotated q, k, v of a layer, into ws->qkv: all that retrieval needs of the last layer it reads. */
void em_qkv(const Shape *s, const Layer *layer, const Workspace *ws, const float *hidden, int64_t m) {
    const int64_t d = s->head_dim, heads = s->num_heads + s->num_kv_heads;
    Team state = {0}, *team = &state;
#pragma omp parallel
    {
        TEAM_START(state);
        norm_quantize_team(team, hidden, layer->input_norm, m, s->hidden_size, s->rms_eps, &ws->act, NULL);
        linear_team(team, &layer->qkv, &ws->act, m, ws->qkv, layer->qkv.n, STORE, NULL);
        if (layer->q_norm) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < m; t++)
                for (int64_t h = 0; h < heads; h++) {
                    float *x = ws->qkv + t * layer->qkv.n + h * d;
                    rms_norm_row(x, h < s->num_heads ? layer->q_norm : layer->k_norm, d, s->rms_eps, x);
                }
        }
    }
}

/* Final norm and output projection: logits (m, vocabulary). */
void em_logits(const Shape *s, const float *norm, const Linear *head, const Workspace *ws, const float *hidden, int64_t m,
               float *logits) {
    Team state = {0}, *team = &state;
#pragma omp parallel
    {
        TEAM_START(state);
        norm_quantize_team(team, hidden, norm, m, s->hidden_size, s->rms_eps, &ws->act, NULL);
        linear_team(team, head, &ws->act, m, logits, head->n, STORE, NULL);
    }
}

/* A quantised linear layer on its own (tests, adapters): x (m, k) float32 -> y (m, n). */
void em_linear(const Linear *w, const Activation *act, const float *x, int64_t m, float *y) {
    Team state = {0}, *team = &state;
#pragma omp parallel
    {
        TEAM_START(state);
        quantize_team(team, x, m, w->k, w->k, act);
        linear_team(team, w, act, m, y, w->n, STORE, NULL);
    }
}
