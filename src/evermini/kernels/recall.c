/* Softmax mass of queries over very many int8 keys, in blocks: the scan behind a question to a long context.
 *
 * A run is a stretch of keys of one (layer, kv head) in one segment chunk, cut into blocks of at most 32 keys.
 * For each block b and query i, with s = q_i . k_j over the block's keys j:
 *
 *     block_max[b][i] = max_j s        block_sum[b][i] = sum_j exp(s - block_max[b][i])
 *
 * from which softmax over all keys of all runs follows exactly, in one pass. Queries lie in lanes, 16
 * to a panel, so neither maximum nor sum crosses lanes, and no panel is computed that holds no query. No result
 * depends on the threads.
 */
#include <stdlib.h>
#include "evermini.h"

#define BLOCK 32
#define LANES 16
#define MAX_PANELS 4

typedef struct {
    const int8_t *keys;  /* (num_keys, head_dim) */
    const float *scales; /* (num_keys) */
    const int32_t *starts; /* (num_blocks + 1) the first key of each block; last, the number of keys */
    int64_t num_blocks, first_block;
} Run;

/* Up to four panels of 16 queries each, scored together. */
typedef struct {
    const int8_t *queries;  /* (panels, head_dim / 4, 16, 4) */
    const int32_t *offsets; /* (panels, 16) 128 times the sum of a query, which the keys' offset adds to each product */
    const float *scales;    /* (panels, 16) */
    int64_t head_dim;
} Panels;

/* scores[rows][panels][LANES] of `rows` (constant) keys and `panels` (constant) panels of queries. */
INLINE void key_tile(int rows, int panels, const Panels *p, const int8_t *keys, const float *key_scales, float *scores) {
    i32x16 acc[8][MAX_PANELS];
    const int64_t d = p->head_dim;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int z = 0; z < panels; z++) acc[r][z] = splati(0);
    for (int64_t i = 0; i < d; i += 4) {
        i32x16 q[MAX_PANELS];
        UNROLL for (int z = 0; z < panels; z++) q[z] = loadi(p->queries + (z * d + i) * LANES);
        UNROLL for (int r = 0; r < rows; r++) {
            uint32_t four;
            memcpy(&four, keys + r * d + i, 4);
            const i32x16 k = splati((int32_t)(four ^ 0x80808080u)); /* unsigned, with an offset of 128 */
            UNROLL for (int z = 0; z < panels; z++) acc[r][z] = dot4(acc[r][z], k, q[z]);
        }
    }
    UNROLL for (int z = 0; z < panels; z++) {
        const i32x16 offset = loadi(p->offsets + z * LANES);
        const f32x16 scale = loadf(p->scales + z * LANES);
        UNROLL for (int r = 0; r < rows; r++)
            storef(scores + (r * panels + z) * LANES, to_float(acc[r][z] - offset) * (scale * key_scales[r]));
    }
}

/* `panels` is constant; one or two take more keys at a time, for enough independent sums. */
INLINE void scan_block(int panels, const Panels *p, const int8_t *keys, const float *key_scales, int64_t num,
                       float *block_max, float *block_sum) {
    float scores[BLOCK * MAX_PANELS * LANES] __attribute__((aligned(64)));
    const int many = panels > 2 ? 4 : 8;
    const int64_t d = p->head_dim, width = panels * LANES;
    int64_t r = 0;
    for (; r + many <= num; r += many) key_tile(many, panels, p, keys + r * d, key_scales + r, scores + r * width);
    for (; r < num; r++) key_tile(1, panels, p, keys + r * d, key_scales + r, scores + r * width);
    UNROLL for (int z = 0; z < panels; z++) {
        const float *own = scores + z * LANES;
        f32x16 max = loadf(own), sum = splatf(0);
        for (r = 1; r < num; r++) max = maxf(max, loadf(own + r * width));
        for (r = 0; r < num; r++) sum += exp_nonpositive(loadf(own + r * width) - max);
        storef(block_max + z * LANES, max);
        storef(block_sum + z * LANES, sum);
    }
}

/* num_queries is a multiple of 16; queries (num_queries / 16, head_dim / 4, 16, 4), scales (num_queries) with the
 * softmax's 1 / sqrt(head_dim) in them, offsets as in Panels. block_max, block_sum: (blocks, num_queries). head_dim is
 * a multiple of 4. */
void em_scan(const Run *runs, int64_t num_runs, int64_t d, const int8_t *queries, const int32_t *offsets,
             const float *scales, int64_t num_queries, float *block_max, float *block_sum) {
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_runs; i++) {
        const Run *run = &runs[i];
        for (int64_t b = 0; b < run->num_blocks; b++) {
            const int64_t key = run->starts[b], num = run->starts[b + 1] - key;
            const int64_t out = (run->first_block + b) * num_queries;
            const int8_t *keys = run->keys + key * d;
            const float *key_scales = run->scales + key;
            for (int64_t q = 0; q < num_queries; q += MAX_PANELS * LANES) {
                const Panels p = {queries + q * d, offsets + q, scales + q, d};
                float *max = block_max + out + q, *sum = block_sum + out + q;
                switch ((num_queries - q) / LANES) {
                case 1: scan_block(1, &p, keys, key_scales, num, max, sum); break;
                case 2: scan_block(2, &p, keys, key_scales, num, max, sum); break;
                case 3: scan_block(3, &p, keys, key_scales, num, max, sum); break;
                default: scan_block(4, &p, keys, key_scales, num, max, sum);
                }
            }
        }
    }
}
