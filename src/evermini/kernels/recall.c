/* Softmax mass of queries over very many int8 keys, in blocks: the scan behind a question to a long context.
 *
 * A run is a stretch of keys of one (layer, kv head) in one segment chunk, cut into blocks of at most 32 keys.
 * For each block b and query i, with s = q_i . k_j over the block's keys j:
 *
 *     block_max[b][i] = max_j s        block_sum[b][i] = sum_j exp(s - block_max[b][i])
 *
 * from which softmax over all keys of all runs follows exactly, in one pass. Queries lie in lanes (linear.c's 8-bit
 * layout, unsigned with an offset of 128), so neither maximum nor sum crosses lanes. No result depends on the threads.
 */
#include <stdlib.h>
#include "evermini.h"

#define BLOCK 32
#define PANEL 64

typedef struct {
    const int8_t *keys;  /* (num_keys, head_dim) */
    const float *scales; /* (num_keys) */
    const int32_t *starts; /* (num_blocks + 1) the first key of each block; last, the number of keys */
    int64_t num_blocks, first_block;
} Run;

/* scores[rows][PANEL] of `rows` (constant) keys. */
INLINE void key_tile(int rows, const uint8_t *panel, const int8_t *keys, const float *key_scales, const float *scales,
                     int64_t d, float *scores) {
    i32x16 acc[4][4], sum[4];
    const i32x16 ones = splati(0x01010101);
    UNROLL for (int r = 0; r < rows; r++) {
        sum[r] = splati(0);
        UNROLL for (int z = 0; z < 4; z++) acc[r][z] = splati(0);
    }
    for (int64_t i = 0; i < d; i += 4) {
        i32x16 q[4];
        UNROLL for (int z = 0; z < 4; z++) q[z] = loadi(panel + i * PANEL + z * 64);
        UNROLL for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, keys + r * d + i, 4);
            const i32x16 k = splati(four);
            sum[r] = dot4(sum[r], ones, k);
            UNROLL for (int z = 0; z < 4; z++) acc[r][z] = dot4(acc[r][z], q[z], k);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int z = 0; z < 4; z++)
            storef(scores + r * PANEL + z * 16,
                   to_float(acc[r][z] - 128 * sum[r]) * (loadf(scales + z * 16) * key_scales[r]));
}

static void scan_block(const uint8_t *panel, const float *scales, const int8_t *keys, const float *key_scales,
                       int64_t num, int64_t d, float *block_max, float *block_sum) {
    float scores[BLOCK * PANEL] __attribute__((aligned(64)));
    int64_t r = 0;
    for (; r + 4 <= num; r += 4) key_tile(4, panel, keys + r * d, key_scales + r, scales, d, scores + r * PANEL);
    for (; r < num; r++) key_tile(1, panel, keys + r * d, key_scales + r, scales, d, scores + r * PANEL);
    for (int z = 0; z < PANEL; z += 16) {
        f32x16 max = loadf(scores + z), sum = splatf(0);
        for (r = 1; r < num; r++) max = maxf(max, loadf(scores + r * PANEL + z));
        for (r = 0; r < num; r++) sum += exp_nonpositive(loadf(scores + r * PANEL + z) - max);
        storef(block_max + z, max);
        storef(block_sum + z, sum);
    }
}

/* num_queries is a multiple of 64; queries (num_queries / 64, head_dim / 4, 64, 4), scales (num_queries) with the
 * softmax's 1 / sqrt(head_dim) in them. block_max, block_sum: (blocks, num_queries). head_dim is a multiple of 4. */
void em_scan(const Run *runs, int64_t num_runs, int64_t d, const uint8_t *queries, const float *scales,
             int64_t num_queries, float *block_max, float *block_sum) {
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_runs; i++) {
        const Run *run = &runs[i];
        for (int64_t b = 0; b < run->num_blocks; b++) {
            const int64_t key = run->starts[b], num = run->starts[b + 1] - key;
            const int64_t out = (run->first_block + b) * num_queries;
            for (int64_t p = 0; p < num_queries; p += PANEL)
                scan_block(queries + p * d, scales + p, run->keys + key * d, run->scales + key, num, d,
                           block_max + out + p, block_sum + out + p);
        }
    }
}
