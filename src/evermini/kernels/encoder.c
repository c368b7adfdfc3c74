/* The layers of a vision encoder: norm, attention, norm, MLP, over rows (patches of an image) in spans. A row sees all
 * rows of its span, and no others; there is no order and no cache.
 *
 * A layer is computed in pieces of rows, so that a caller can stop, or let others go first, between two of them:
 *
 *   em_encoder_keys   the piece's q, k, v: rotated, cut into heads
 *   em_encoder_rows   once all pieces of a span have their keys: attention and all that follows, added to hidden
 *
 * A row sees its keys in order, in steps of 64, so its result is the same bit for bit however the rows are cut.
 *
 *   q: (heads, rows, d)          d: head_dim rounded up to 16, the rest is 0; scaled by 1 / sqrt(head_dim)
 *   k: (blocks, heads, d, 64)    transposed inside a block; a span begins with a block of its own
 *   v: (blocks, heads, 64, d)
 */
#include <math.h>
#include <omp.h>
#include "evermini.h"
#include "tiles.h"

#define TILE_ROWS 64

/* up is gates and factors in turns (see GATE), or has a GELU behind it. Norms without a bias are RMS norms. */
typedef struct {
    Linear qkv, o, up, down;
    const float *norm1, *bias1, *norm2, *bias2;
} EncoderLayer;

typedef struct {
    int64_t hidden_size, num_heads, head_dim, is_gated;
    float eps;
} EncoderShape;

typedef struct {
    int64_t num_rows;
    const int32_t *span_of_row; /* (rows) */
    const int32_t *starts;      /* (spans + 1) first rows, the last one the number of rows */
    const int32_t *blocks;      /* (spans) first blocks of keys */
    const float *cos, *sin;     /* (rows, head_dim / 2); NULL: no rotation */
    float *hidden;              /* (rows, hidden_size) */
    float *q, *k, *v;
    Activation act;             /* from here on room for one piece: act for the widest input, */
    float *wide;                /* (piece, the wider one of qkv.n and the MLP's inner size) */
    float *attn;                /* (piece, hidden_size) */
} EncoderBatch;

typedef struct {
    int64_t head, first, end; /* query rows, of one span */
} Tile;

static void layer_norm_row(const float *x, const float *weight, const float *bias, int64_t n, float eps, float *y) {
    f32x16 sum = splatf(0);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) sum += loadf(x + i);
    float mean = reduce_add(sum);
    for (; i < n; i++) mean += x[i];
    mean /= (float)n;
    sum = splatf(0);
    for (i = 0; i + 16 <= n; i += 16) {
        const f32x16 v = loadf(x + i) - mean;
        sum += v * v;
    }
    float square = reduce_add(sum);
    for (; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / sqrtf(square / (float)n + eps);
    for (i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

static void norm_team(Team *team, const float *x, const float *weight, const float *bias, int64_t m, int64_t k,
                      float eps, const Activation *out) {
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < m; r++) {
        float *row = thread_scratch(SCRATCH_ROW, padded(k) * 4);
        if (bias) {
            layer_norm_row(x + r * k, weight, bias, k, eps, row);
        } else {
            rms_norm_row(x + r * k, weight, k, eps, row);
        }
        quantize_row(row, k, out, r);
    }
    team_wait(team);
}

/* Cut the piece's rows of q, k, v into heads, rotated (rotate-half). */
static void scatter_team(Team *team, const EncoderShape *s, const EncoderBatch *b, int64_t first, int64_t end) {
    const int64_t heads = s->num_heads, size = s->head_dim, half = size / 2, d = (size + 15) / 16 * 16;
    const int64_t groups = (end - first + TILE_ROWS - 1) / TILE_ROWS;
    const float scale = 1.0f / sqrtf((float)size);
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < groups * heads; task++) { /* a head's rows together: their keys share cache lines */
        const int64_t h = task % heads, r0 = first + task / heads * TILE_ROWS;
        const int64_t r1 = r0 + TILE_ROWS < end ? r0 + TILE_ROWS : end;
        for (int64_t r = r0; r < r1; r++) {
            const int64_t span = b->span_of_row[r], slot = r - b->starts[span];
            const int64_t block = (b->blocks[span] + slot / STEP) * heads + h, offset = slot % STEP;
            const float *x = b->wide + ((r - first) * 3 * heads + h) * size;
            float *q = b->q + (h * b->num_rows + r) * d, *v = b->v + (block * STEP + offset) * d;
            float *k = b->k + block * d * STEP + offset;
            const float *xk = x + heads * size, *xv = xk + heads * size;
            if (b->cos) {
                const float *cos = b->cos + r * half, *sin = b->sin + r * half;
                for (int64_t i = 0; i < half; i++) {
                    q[i] = (x[i] * cos[i] - x[i + half] * sin[i]) * scale;
                    q[i + half] = (x[i + half] * cos[i] + x[i] * sin[i]) * scale;
                    k[i * STEP] = xk[i] * cos[i] - xk[i + half] * sin[i];
                    k[(i + half) * STEP] = xk[i + half] * cos[i] + xk[i] * sin[i];
                }
            } else {
                for (int64_t i = 0; i < size; i++) {
                    q[i] = x[i] * scale;
                    k[i * STEP] = xk[i];
                }
            }
            memcpy(v, xv, size * sizeof(float));
            for (int64_t i = size; i < d; i++) q[i] = k[i * STEP] = v[i] = 0;
        }
    }
    team_wait(team);
}

static void attend_tile(const EncoderShape *s, const EncoderBatch *b, const Tile *t, int64_t first) {
    const int64_t heads = s->num_heads, size = s->head_dim, d = (size + 15) / 16 * 16, rows = t->end - t->first;
    const int64_t span = b->span_of_row[t->first], keys = b->starts[span + 1] - b->starts[span];
    float *out = thread_scratch(SCRATCH_ATTENTION, rows * (d + STEP + 16 + 1) * sizeof(float));
    float *scores = out + rows * d, *lane_sums = scores + rows * STEP, *max = lane_sums + rows * 16;
    memset(out, 0, rows * d * sizeof(float));
    memset(lane_sums, 0, rows * 16 * sizeof(float));
    for (int64_t r = 0; r < rows; r++) max[r] = MASKED;
    for (int64_t base = 0; base < keys; base += STEP) {
        const int64_t block = (b->blocks[span] + base / STEP) * heads + t->head;
        const int64_t visible = keys - base < STEP ? keys - base : STEP;
        all_scores(rows, b->q + (t->head * b->num_rows + t->first) * d, b->k + block * d * STEP, d, scores);
        for (int64_t r = 0; r < rows; r++)
            softmax_step(scores + r * STEP, visible, &max[r], lane_sums + r * 16, out + r * d, d);
        all_values(rows, scores, b->v + block * STEP * d, visible, d, out);
    }
    for (int64_t r = 0; r < rows; r++) {
        const float inverse = 1.0f / reduce_add(loadf(lane_sums + r * 16));
        float *y = b->attn + ((t->first - first + r) * heads + t->head) * size;
        for (int64_t i = 0; i < size; i++) y[i] = out[r * d + i] * inverse;
    }
}

/* Tiles of query rows [first, end) for every head. */
static int64_t plan(const EncoderShape *s, const EncoderBatch *b, int64_t first, int64_t end, Tile **tiles) {
    const int64_t spans = b->span_of_row[end - 1] - b->span_of_row[first] + 1;
    Tile *t = thread_scratch(SCRATCH_TASKS, ((end - first) / TILE_ROWS + spans) * s->num_heads * sizeof(Tile));
    *tiles = t;
    for (int64_t r0 = first, r1; r0 < end; r0 = r1) {
        r1 = b->starts[b->span_of_row[r0] + 1];
        if (r1 > end) r1 = end;
        if (r1 > r0 + TILE_ROWS) r1 = r0 + TILE_ROWS;
        for (int64_t h = 0; h < s->num_heads; h++) *t++ = (Tile){h, r0, r1};
    }
    return t - *tiles;
}

/* Rows [first, end) of q, k and v. */
void em_encoder_keys(const EncoderShape *s, const EncoderLayer *layer, const EncoderBatch *b, int64_t first, int64_t end) {
    const int64_t m = end - first, k = s->hidden_size;
    Team state = {0}, *team = &state;
#pragma omp parallel
    {
        TEAM_START(state);
        norm_team(team, b->hidden + first * k, layer->norm1, layer->bias1, m, k, s->eps, &b->act);
        linear_team(team, &layer->qkv, &b->act, m, b->wide, layer->qkv.n, STORE, NULL);
        scatter_team(team, s, b, first, end);
    }
}

/* Rows [first, end) of hidden through the layer, in place. */
void em_encoder_rows(const EncoderShape *s, const EncoderLayer *layer, const EncoderBatch *b, int64_t first, int64_t end) {
    const int64_t m = end - first, k = s->hidden_size;
    const int64_t inner = layer->down.k, width = s->num_heads * s->head_dim;
    float *hidden = b->hidden + first * k;
    Tile *tiles;
    const int64_t count = plan(s, b, first, end, &tiles);
    Team state = {0}, *team = &state;
#pragma omp parallel
    {
        TEAM_START(state);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < count; i++) attend_tile(s, b, &tiles[i], first);
        team_wait(team);
        quantize_team(team, b->attn, m, width, width, &b->act);
        linear_team(team, &layer->o, &b->act, m, hidden, k, ADD, NULL);
        norm_team(team, hidden, layer->norm2, layer->bias2, m, k, s->eps, &b->act);
        linear_team(team, &layer->up, &b->act, m, b->wide, inner, s->is_gated ? GATE : GELU, NULL);
        quantize_team(team, b->wide, m, inner, inner, &b->act);
        linear_team(team, &layer->down, &b->act, m, hidden, k, ADD, NULL);
    }
}
