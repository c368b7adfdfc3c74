/* Types shared by the kernels. Functions named em_* are called from Python; *_team ones by all threads of a team, and
 * all threads' work is done when they return. */
#ifndef EVERMINI_H
#define EVERMINI_H
#include "simd.h"

/* A packed weight matrix (n x k); see linear.c. scale and bias hold n rounded up to 64; bias may be NULL. */
typedef struct {
    const uint8_t *data;
    const float *scale;
    const float *bias;
    int64_t n, k, k_padded; /* k_padded: k rounded up to 32 */
    int64_t bits;
} Linear;

/* int8 rows: value = q * scale; group_sums holds each 32-run's sum and, last, the row's. Padding is 0. */
typedef struct {
    int8_t *q;           /* (m, k_padded) */
    float *scale;        /* (m) */
    int32_t *group_sums; /* (m, k_padded / 32 + 1) */
} Activation;

enum { SCRATCH_PANEL, SCRATCH_ATTENTION, SCRATCH_ROW, SCRATCH_TASKS, SCRATCH_PARTIAL, SCRATCH_COUNT };
/* Grow-only, page-aligned memory of the calling thread, one piece per purpose. */
void *thread_scratch(int which, size_t bytes);

/* The threads of one parallel region. Between two pieces of work they meet in team_wait, which spins for some
 * microseconds and then gives its core away: OpenMP's own barriers spin on, which halts a machine with busy cores. */
typedef struct {
    int threads;
    _Alignas(64) int arrived;
    _Alignas(64) int phase;
} Team;
void team_wait(Team *team);

/* What an adapter adds to one linear layer: y += scale * (x a^T) b^T, in half precision; rank 0: nothing. `start` is
 * the place of its x a^T in a row of Lora.t, behind those of the layers that are fused with it. */
typedef struct {
    const uint16_t *a; /* (rank, inputs rounded up to 16) */
    const uint16_t *b; /* (outputs / 16, rank, 16) */
    float scale;
    int64_t rank, start;
} LoraFactors;

enum { LORA_Q, LORA_K, LORA_V, LORA_O, LORA_GATE, LORA_UP, LORA_DOWN, LORA_PARTS };
typedef struct {
    LoraFactors part[LORA_PARTS];
} LoraLayer;

/* The adapters of a batch. Rows from `first` on have one each, in runs (segments) of the same. */
typedef struct {
    int64_t first, num_segments, stride;
    const int32_t *starts;          /* (segments + 1) first rows, the last one the batch's end */
    const int32_t *segments;        /* (T - first) */
    const LoraLayer *const *layers; /* (segments) each adapter's, by layer */
    float *x;                       /* (T - first, hidden_size rounded up to 32) inputs before they are rotated */
    float *t;                       /* (T - first, stride) scale * x a^T */
} Lora;

/* The part of an adapter that goes with a linear layer: `count` fused layers from `part` on, of `sizes` outputs. */
typedef struct {
    const Lora *lora;
    int64_t layer;
    int part, count;
    int64_t sizes[3];
} LoraCall;

/* What one forward pass computes; see models/batch.py. */
typedef struct {
    int64_t num_tokens, num_seqs, max_blocks;
    const int64_t *positions;    /* (T) */
    const int64_t *slots;        /* (T) */
    const int32_t *query_start;  /* (S + 1) */
    const int32_t *context_lens; /* (S) */
    const int32_t *block_tables; /* (S, max_blocks) */
    const Lora *lora;            /* NULL: no row has an adapter */
    const float *const *bias;    /* (S) added to the scores of a sequence's first keys, or NULL; NULL: to none's */
    const int64_t *bias_lens;    /* (S) how many, a multiple of 64 */
} Batch;

typedef struct {
    int64_t hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim;
    float rms_eps, query_scale;
    const float *cos, *sin; /* (max_position, head_dim / 2) */
} Shape;

/* One decoder layer; q_norm and k_norm are NULL but for Qwen3. */
typedef struct {
    Linear qkv, o, gate_up, down;
    const float *input_norm, *post_norm, *q_norm, *k_norm;
} Layer;

/* Room for T tokens: act for the widest input, qkv (T, qkv.n), attn (T, heads * head_dim), gated (T, gate_up.n / 2). */
typedef struct {
    Activation act;
    float *qkv, *attn, *gated;
} Workspace;

/* STORE: y = x W^T. ADD: y += x W^T (a residual). GATE: W's rows are 32 gates, 32 factors, 32 gates, ... and y, half as
 * wide, is silu(gate) * factor. GELU: y = gelu(x W^T). */
typedef enum { STORE, ADD, GATE, GELU } Output;
void linear_team(Team *team, const Linear *w, const Activation *x, int64_t m, float *y, int64_t ldy, Output output,
                 const LoraCall *lora);
/* Fill lora->t for a call from its rows' inputs x (T - first, ldx) with k inputs; the rest up to 16 of them is 0. */
void lora_team(Team *team, const LoraCall *call, const float *x, int64_t ldx, int64_t k);
/* First thing in every parallel region. */
#define TEAM_START(team) _Pragma("omp single") (team).threads = omp_get_num_threads()
INLINE int64_t padded(int64_t k) { return (k + 31) / 32 * 32; }
/* Rotate (in place) and quantise one row of k inputs; x must have room for padded(k). */
void quantize_row(float *x, int64_t k, const Activation *out, int64_t row);
void quantize_team(Team *team, const float *x, int64_t m, int64_t ldx, int64_t k, const Activation *out);
void rms_norm_row(const float *x, const float *weight, int64_t n, float eps, float *y);
int64_t attention_plan(const Shape *s, const Batch *b, void **tasks, int64_t *partial_floats);
void attention_team(Team *team, const Shape *s, const Batch *b, const void *tasks, int64_t count, const float *qkv,
                    const uint16_t *k, const uint16_t *v, float *attn, float *partial);
#endif
