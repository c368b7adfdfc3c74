/* Causal grouped-query attention over block KV memory: half-precision keys and values, float32 arithmetic.
 *
 * Invariant: a query row sees its keys in order, in steps of 64 inside splits of 1,024 that start at multiples of
 * 1,024; splits are merged in order. So a row's result is the same bit for bit in a prefill chunk of any size, in a
 * decode step, and in any batch. Parallel splits (short queries) and sequential ones (prefill tiles) share that order.
 */
#include <stdlib.h>
#include "evermini.h"
#include "tiles.h"

#define BLOCK 32
#define SPLIT 1024
#define TILE_ROWS 64

typedef struct {
    int32_t seq, head, q0, q1;
    int32_t split;  /* -1: all splits, in order */
    int64_t partial; /* where a split's result goes, in floats */
} Task;

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* What is added to the scores of a sequence's keys: a multiple of STEP of them, nothing to those after. */
typedef struct {
    const float *values;
    int64_t len;
} Bias;

INLINE void add_bias(const float *bias, int64_t rows, float *scores) {
    f32x16 added[4];
    UNROLL for (int c = 0; c < 4; c++) added[c] = loadf(bias + c * 16);
    for (int64_t r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < 4; c++)
            storef(scores + r * STEP + c * 16, loadf(scores + r * STEP + c * 16) + added[c]);
}

/* rows of queries against keys [k0, k1) of one sequence and head. out, max, sum are overwritten. */
static void attend_split(const Shape *s, const int32_t *blocks, Bias bias, int64_t head, const uint16_t *keys,
                         const uint16_t *values, int64_t rows, const float *q, const int64_t *row_pos,
                         int64_t k0, int64_t k1, float *kbuf, float *vbuf, float *scores, float *lane_sums,
                         float *out, float *max, float *sum) {
    const int64_t d = s->head_dim, block_size = d * BLOCK;
    for (int64_t r = 0; r < rows; r++) max[r] = MASKED;
    memset(lane_sums, 0, rows * 16 * sizeof(float));
    memset(out, 0, rows * d * sizeof(float));
    for (int64_t base = k0; base < k1; base += STEP) {
        const int64_t num = min64(k1 - base, STEP);
        for (int64_t half = 0; half < 2; half++) {
            float *kdst = kbuf + half * BLOCK, *vdst = vbuf + half * block_size;
            if (half * BLOCK >= num) { /* past the end: zeros, masked below */
                for (int64_t i = 0; i < d; i++) {
                    storef(kdst + i * STEP, splatf(0));
                    storef(kdst + i * STEP + 16, splatf(0));
                }
                continue;
            }
            const int32_t *block = blocks + base / BLOCK + half;
            const int64_t here = (*block * s->num_kv_heads + head) * block_size;
            /* Blocks lie anywhere: fetch the ones of the next step while this one is computed. */
            const int64_t ahead = base + STEP + half * BLOCK < k1 ? block[2] : *block;
            const int64_t next = (ahead * s->num_kv_heads + head) * block_size;
            for (int64_t i = 0; i < block_size; i += 32) {
                __builtin_prefetch(keys + next + i);
                __builtin_prefetch(values + next + i);
            }
            const uint16_t *k = keys + here, *v = values + here;
            for (int64_t i = 0; i < d; i++) {
                storef(kdst + i * STEP, half_to_float(k + i * BLOCK));
                storef(kdst + i * STEP + 16, half_to_float(k + i * BLOCK + 16));
            }
            const int64_t used = min64(num - half * BLOCK, BLOCK) * d;
            for (int64_t i = 0; i < used; i += 16) storef(vdst + i, half_to_float(v + i));
        }
        all_scores(rows, q, kbuf, d, scores);
        if (base < bias.len) add_bias(bias.values + base, rows, scores);
        for (int64_t r = 0; r < rows; r++)
            softmax_step(scores + r * STEP, min64(row_pos[r] + 1 - base, num), &max[r], lane_sums + r * 16, out + r * d, d);
        all_values(rows, scores, vbuf, num, d, out);
    }
    for (int64_t r = 0; r < rows; r++) sum[r] = reduce_add(loadf(lane_sums + r * 16));
}

/* Add one split's result of a row to the row's total. */
INLINE void merge(float *out, float *max, float *sum, const float *part, float part_max, float part_sum, int64_t d) {
    if (part_max <= MASKED) return; /* nothing visible in this split */
    const float m = part_max > *max ? part_max : *max;
    const float a = exp_nonpositive(splatf(*max - m))[0], b = exp_nonpositive(splatf(part_max - m))[0];
    for (int64_t c = 0; c < d; c += 16) storef(out + c, loadf(out + c) * a + loadf(part + c) * b);
    *sum = *sum * a + part_sum * b;
    *max = m;
}

/* The task's query rows, rotated (rotate-half RoPE) and scaled: row = token * group + head in group. */
static void gather_queries(const Shape *s, const Batch *b, const Task *t, const float *qkv, float *q, int64_t *row_pos) {
    const int64_t d = s->head_dim, group = s->num_heads / s->num_kv_heads;
    const int64_t width = (s->num_heads + 2 * s->num_kv_heads) * d;
    const int64_t start = b->query_start[t->seq], end = b->query_start[t->seq + 1];
    int64_t row = 0;
    for (int64_t i = t->q0; i < t->q1; i++) {
        const float *cos = s->cos + b->positions[start + i] * (d / 2), *sin = s->sin + b->positions[start + i] * (d / 2);
        for (int64_t g = 0; g < group; g++, row++) {
            const float *x = qkv + (start + i) * width + (t->head * group + g) * d;
            float *y = q + row * d;
            row_pos[row] = b->context_lens[t->seq] - (end - start) + i;
            for (int64_t j = 0; j < d / 2; j++) {
                y[j] = (x[j] * cos[j] - x[j + d / 2] * sin[j]) * s->query_scale;
                y[j + d / 2] = (x[j + d / 2] * cos[j] + x[j] * sin[j]) * s->query_scale;
            }
        }
    }
}

static void write_rows(const Shape *s, const Batch *b, const Task *t, int64_t rows, const float *out, const float *sum,
                       float *attn) {
    const int64_t d = s->head_dim, group = s->num_heads / s->num_kv_heads;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = b->query_start[t->seq] + t->q0 + r / group;
        float *y = attn + (token * s->num_heads + t->head * group + r % group) * d;
        for (int64_t c = 0; c < d; c += 16) storef(y + c, loadf(out + r * d + c) / sum[r]);
    }
}

static void run_task(const Shape *s, const Batch *b, const Task *t, const float *qkv, const uint16_t *k,
                     const uint16_t *v, float *attn, float *partial) {
    const int64_t d = s->head_dim, group = s->num_heads / s->num_kv_heads, rows = (t->q1 - t->q0) * group;
    float *mem = thread_scratch(SCRATCH_ATTENTION, rows * 8 + (rows * (3 * d + STEP + 16 + 4) + 2 * STEP * d) * 4);
    int64_t *row_pos = (int64_t *)mem;
    float *q = mem + 2 * rows, *out = q + rows * d, *part = out + rows * d, *scores = part + rows * d;
    float *kbuf = scores + rows * STEP, *vbuf = kbuf + STEP * d, *lane_sums = vbuf + STEP * d;
    float *max = lane_sums + rows * 16, *sum = max + rows, *part_max = sum + rows, *part_sum = part_max + rows;
    const int32_t *blocks = b->block_tables + t->seq * b->max_blocks;
    const Bias bias = b->bias && b->bias[t->seq] ? (Bias){b->bias[t->seq], b->bias_lens[t->seq]} : (Bias){NULL, 0};
    gather_queries(s, b, t, qkv, q, row_pos);
    const int64_t limit = row_pos[rows - 1] + 1;
    if (t->split >= 0) {
        float *dst = partial + t->partial;
        attend_split(s, blocks, bias, t->head, k, v, rows, q, row_pos, (int64_t)t->split * SPLIT,
                     min64(limit, (t->split + 1) * (int64_t)SPLIT), kbuf, vbuf, scores, lane_sums, dst + 2 * rows, dst,
                     dst + rows);
        return;
    }
    for (int64_t r = 0; r < rows; r++) { max[r] = MASKED; sum[r] = 0; }
    memset(out, 0, rows * d * sizeof(float));
    for (int64_t k0 = 0; k0 < limit; k0 += SPLIT) {
        attend_split(s, blocks, bias, t->head, k, v, rows, q, row_pos, k0, min64(limit, k0 + SPLIT), kbuf, vbuf, scores,
                     lane_sums, part, part_max, part_sum);
        for (int64_t r = 0; r < rows; r++) merge(out + r * d, &max[r], &sum[r], part + r * d, part_max[r], part_sum[r], d);
    }
    write_rows(s, b, t, rows, out, sum, attn);
}

/* Merge the parallel splits of one (sequence, head). `first` is its first split task; the others follow. */
static void combine(const Shape *s, const Batch *b, const Task *first, float *attn, const float *partial) {
    const int64_t d = s->head_dim, group = s->num_heads / s->num_kv_heads, rows = (first->q1 - first->q0) * group;
    const int64_t splits = (b->context_lens[first->seq] + SPLIT - 1) / SPLIT;
    float *mem = thread_scratch(SCRATCH_ATTENTION, rows * (d + 2) * 4);
    float *out = mem, *max = out + rows * d, *sum = max + rows;
    for (int64_t r = 0; r < rows; r++) { max[r] = MASKED; sum[r] = 0; }
    memset(out, 0, rows * d * sizeof(float));
    for (int64_t i = 0; i < splits; i++) {
        const float *src = partial + first[i].partial;
        for (int64_t r = 0; r < rows; r++)
            merge(out + r * d, &max[r], &sum[r], src + 2 * rows + r * d, src[r], src[rows + r], d);
    }
    write_rows(s, b, first, rows, out, sum, attn);
}

/* The tasks of a batch. Short queries are cut by splits of keys, long ones into tiles of query rows, longest first. */
int64_t attention_plan(const Shape *s, const Batch *b, void **tasks_out, int64_t *partial_floats) {
    const int64_t group = s->num_heads / s->num_kv_heads, d = s->head_dim;
    const int64_t tile = TILE_ROWS / group > 0 ? TILE_ROWS / group : 1;
    int64_t count = 0, floats = 0;
    for (int64_t i = 0; i < b->num_seqs; i++) {
        const int64_t len = b->query_start[i + 1] - b->query_start[i];
        const int64_t pieces = len <= tile ? (b->context_lens[i] + SPLIT - 1) / SPLIT : (len + tile - 1) / tile;
        count += pieces * s->num_kv_heads;
    }
    Task *tasks = thread_scratch(SCRATCH_TASKS, count * sizeof(Task)), *t = tasks;
    for (int64_t i = 0; i < b->num_seqs; i++) {
        const int64_t len = b->query_start[i + 1] - b->query_start[i];
        for (int64_t h = 0; h < s->num_kv_heads; h++) {
            if (len <= tile) {
                for (int64_t split = 0; split * SPLIT < b->context_lens[i]; split++, t++) {
                    *t = (Task){i, h, 0, len, split, floats};
                    floats += len * group * (d + 2);
                }
            } else {
                for (int64_t q0 = (len - 1) / tile * tile; q0 >= 0; q0 -= tile, t++)
                    *t = (Task){i, h, q0, min64(len, q0 + tile), -1, 0};
            }
        }
    }
    *tasks_out = tasks;
    *partial_floats = floats;
    return count;
}

void attention_team(Team *team, const Shape *s, const Batch *b, const void *plan, int64_t count, const float *qkv,
                    const uint16_t *k, const uint16_t *v, float *attn, float *partial) {
    const Task *tasks = plan;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < count; i++) run_task(s, b, &tasks[i], qkv, k, v, attn, partial);
    team_wait(team);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < count; i++)
        if (tasks[i].split == 0) combine(s, b, &tasks[i], attn, partial);
    team_wait(team);
}
