"""struct kernels as Cython sees it, and the table in force. The formulas are in simd/kernels.h."""

from libc.stdint cimport int32_t, int64_t, uint16_t

cdef extern from "team.h" nogil:
    struct worker:
        int index, count
    ctypedef void (*op_fn)(const void *args, const worker *w) noexcept nogil
    struct step:
        op_fn run
        const void *args
        int64_t barrier
    enum:
        MAX_WORKERS
        WORKER_SCRATCH
    struct team_clock:
        int64_t *steps
        int64_t *waits
    void c_team_run "team_run"(
        const step *steps, int64_t n_steps, int n_threads, char *scratch, const team_clock *clock)

cdef extern from "blocks.h" nogil:
    int64_t block_elements(int type)
    bint has_encoder(int type)
    int64_t row_offset(int type, int64_t n)

cdef extern from "kernels.h" nogil:
    enum:
        ATTENTION_MAX_DIM
        ATTENTION_MAX_GROUP
        FEW_QUERIES
        GEMV_TOKENS
        LORA_PARTS
        MAX_ROW
        PROBE_FMA_FLOPS
        PROBE_TILES_FLOPS
        SQUARE_PART
        N_VARIANTS
    int has_quant_dot(int type)
    int64_t linear_packed_bytes(int64_t n_tokens, int64_t n_in, int64_t pairs)
    int64_t back_packed_bytes(int64_t n_tokens, int64_t n_out)
    int64_t attention_part_bytes(
        int64_t n_seq, int64_t n_query, int64_t n_head, int64_t head_dim, int64_t n_key)

    struct embed_args:
        int64_t n_tokens, n_cols
        const void *w
        int64_t type
        const int32_t *ids
        float *y

    struct linear_args:
        int64_t n_tokens, n_in, n_out
        const void *x
        const void *w
        int64_t type
        void *y
        int64_t rank
        const float *u
        const float *b
        float scale
        int64_t partner, pairs
        void *packed
        const float *base
        const float *a
        int64_t factor_type, x_type, y_type

    struct pack_args:
        int64_t n_tokens, n_in
        const void *x
        int64_t type, partner, pairs
        void *packed
        int64_t x_type

    struct feed_forward_args:
        linear_args gate, up, down
        int64_t panels

    struct lora_part:
        int64_t rank
        float *u
        float *m

    struct lora_up_args:
        int64_t n_tokens, n_cols
        const float *base
        float scale
        float *y
        int64_t n_parts
        lora_part *parts

    struct linear_back_args:
        int64_t n_tokens, n_in, n_out
        const void *dy
        const void *w
        int64_t type
        float *dx
        int64_t accumulate, pairs
        void *packed
        int64_t dy_type, dy_stride
        lora_up_args up

    struct rms_norm_args:
        int64_t n_tokens, n_cols
        const float *x
        const float *w
        float eps
        void *y
        float *inv
        int64_t y_type

    struct rms_norm_back_args:
        int64_t n_tokens, n_cols
        const float *x
        const float *w
        const float *inv
        const float *dy
        float *dx
        float *dw
        int64_t accumulate_x, accumulate_w

    struct rope_args:
        int64_t n_tokens, n_head, head_dim, n_rot
        const float *x
        const int32_t *positions
        const float *cos
        const float *sin
        float sign
        int64_t round_f16
        void *y
        int64_t y_type

    struct silu_mul_args:
        int64_t n
        const void *g
        const void *u
        int64_t type
        void *y
        int64_t y_type

    struct silu_mul_back_args:
        int64_t n
        const void *g
        const void *u
        int64_t type
        const float *dy
        void *dg
        void *du

    struct add_args:
        int64_t n
        const float *a
        const float *b
        float *y

    struct zero_args:
        int64_t n
        float *y

    struct cache_store_args:
        int64_t n_tokens, n_cols
        const float *x
        void *cache
        int64_t type
        const int32_t *n_past

    struct attention_args:
        int64_t n_seq, n_query, n_head, n_head_kv, head_dim
        const void *q
        const void *k
        const void *v
        int64_t q_type, k_type, v_type, kv_seq_rows
        const int32_t *n_past
        const int32_t *first_key
        float scale
        void *out
        int64_t out_type
        float *lse
        float *parts
        int64_t pairs

    struct attention_back_args:
        int64_t n_seq, n_query, n_head, n_head_kv, head_dim
        const void *q
        const void *k
        const void *v
        const void *out
        int64_t q_type, k_type, v_type, out_type
        const float *lse
        const float *dout
        const int32_t *first_key
        float scale
        float *delta
        float *dq
        float *dk
        float *dv
        int64_t pairs

    struct lora_down_args:
        int64_t n_tokens, n_cols
        const void *x
        int64_t x_type, x_stride
        float scale
        int64_t accumulate, n_parts
        lora_part *parts

    struct lora_outer_args:
        int64_t n_tokens, n_cols
        const void *x
        int64_t x_type, x_stride
        float scale
        int64_t n_parts
        lora_part *parts

    struct lora_gather_args:
        int64_t n_tokens, n_cols, rank
        const int32_t *ids
        const float *m
        float *u

    struct lora_scatter_args:
        int64_t n_tokens, n_cols, rank
        const int32_t *ids
        const float *du
        float scale
        float *g

    struct cross_entropy_args:
        int64_t n_tokens, n_vocab
        float *logits
        const int32_t *targets
        const float *weight
        float *loss
        int64_t type

    struct square_sums_args:
        int64_t n
        const float *x
        double *sums

    struct adamw_now:
        float clip, step, correction, decay

    struct adamw_args:
        int64_t n
        float *x
        float *g
        float *m
        float *v
        float beta1, beta2
        const adamw_now *now
        int64_t n_runs
        const int64_t *run_ends
        const int32_t *run_decays

    struct probe_args:
        int64_t n
        const float *data
        float *sink

    struct kernels:
        const char *isa
        int64_t lanes, pairs
        void (*decode_row)(int type, const void *p, int64_t n, float *y) noexcept nogil
        void (*encode_row)(int type, const float *x, int64_t n, void *y) noexcept nogil
        void (*quantize_row)(
            int type, const float *x, const float *importance, int64_t n, void *y) noexcept nogil
        void (*encode_bf16)(const float *x, int64_t n, uint16_t *y) noexcept nogil
        void (*encode_f16)(const float *x, int64_t n, uint16_t *y) noexcept nogil
        int64_t (*find_invalid)(int type, const void *p, int64_t n) noexcept nogil
        double (*sum_squares)(const float *x, int64_t n) noexcept nogil
        op_fn embed, pack, linear, feed_forward, linear_back, rms_norm, rms_norm_back, rope
        op_fn silu_mul, silu_mul_back
        op_fn add, zero, cache_store, attention, attention_back, lora_down, lora_up, lora_outer
        op_fn lora_gather, lora_scatter, cross_entropy, probe_fma, probe_pairs, probe_tiles
        op_fn probe_read
        op_fn square_sums, adamw

    struct variant:
        const kernels *table
        const char *missing

    void list_variants(variant *out)

# The table chosen at import (None: that one) or another that this machine runs, by name.
cdef const kernels *table(object isa=*) except NULL
# Runs steps with a team; scratch holds n_threads * WORKER_SCRATCH bytes; clock may be NULL.
cdef void team_run(
    const step *steps, int64_t n_steps, int n_threads, char *scratch, const team_clock *clock
) noexcept nogil
