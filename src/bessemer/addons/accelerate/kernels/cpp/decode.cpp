// A decoding step through all layers (absorbed MLA over paged latents, DeepSeekMoE, norms, head) in one call.
//
// Matrices are float32 or BF16 and are read in place; everything between two products is float32. A row's result
// depends only on its own tokens: products are chains over ascending k (rows.hpp), attention runs over the row's own
// keys in ascending order, and no sum runs over rows.
//
// Prefill is a step with many tokens per row. Rows may have different numbers of tokens. Its caller names positions
// whose tokens attend in the expanded form (keys and values of every head, made from the latents for all tokens of a
// call together): fewer multiplications per query and key, if many queries share the keys. Which form a token takes is
// part of its definition, since the forms differ by rounding.
//
// Shapes: B rows, N tokens of all rows, D hidden, H heads, C latent, R rotary, X = C + R, K experts per token of E.
#include "decode.hpp"
#include "gate.hpp"
#include "rows.hpp"

namespace {

constexpr i64 PAGE = 64;   // tokens per page
constexpr i64 GROUP = 16;  // rows per task that shares nothing between rows; also tokens that attend together
constexpr i64 BLOCK = 4 * PAGE;  // keys that are expanded together
constexpr i64 QUERIES = 64;      // tokens that attend to them together

// Addresses; absent ones are null. `gate` is null in a dense layer, whose FFN is in w13 and w2.
template <class T>
struct Layer {
    const float* attn_norm;
    const T *wq_a, *wq_b, *wkv_a, *wkv_b, *wo;
    const float *q_norm, *kv_norm, *ffn_norm, *gate, *bias;
    const T *w13, *w2, *shared13, *shared2;
    T* pool;
};
template <class T>
struct Ends {
    const T* embed;
    const float *enorm, *hnorm;
    const T* join;
    const float* norm;
    const T* head;
};

INLINE float inverse_rms(const float* x, i64 D, double eps) {
    vf square[2] = {};
    int turn = 0;
    each_vector(D, [&](i64 d, int left) {
        vf v = load_some(x + d, left);
        square[turn] += v * v;
        turn ^= 1;
    });
    return 1.0f / __builtin_sqrtf(sum(square[0] + square[1]) / (float)D + (float)eps);
}
__attribute__((noinline)) void norm_row(const float* x, const float* w, float* y, i64 D, double eps) {
    float scale = inverse_rms(x, D, eps);
    each_vector(D, [&](i64 d, int left) {
        store_some(y + d, load_some(x + d, left) * scale * load_some(w + d, left), left);
    });
}
// x += y.
__attribute__((noinline)) void add_row(float* x, const float* y, i64 D) {
    each_vector(D, [&](i64 d, int left) { store_some(x + d, load_some(x + d, left) + load_some(y + d, left), left); });
}
template <class T>
void widen_row(const T* from, float* to, i64 D) {
    for (i64 d = 0; d < D; ++d) to[d] = widen(from[d]);
}
template <class T>
void narrow_row(const float* from, T* to, i64 D) {
    for (i64 d = 0; d < D; ++d) put(to + d, from[d]);
}
template <class T>
void rotate(const float* x, const float* turn, T* y, i64 R) {
    for (i64 j = 0; j < R; j += 2) {
        float even = x[j], odd = x[j + 1], cosine = turn[j], sine = turn[j + 1];
        put(y + j, even * cosine - odd * sine);
        put(y + j + 1, even * sine + odd * cosine);
    }
}
// act = silu(gate) * up * weight.
INLINE void swiglu(const float* gate, const float* up, float* act, i64 n, float weight) {
    each_vector(n, [&](i64 f, int left) {
        vf g = load_some(gate + f, left);
        store_some(act + f, g * vsigmoid(g) * load_some(up + f, left) * weight, left);
    });
}
// act [M, columns] for the columns [f, f + columns) of an FFN of `inner` columns: w13 holds its gate rows, then up rows.
template <class T>
__attribute__((noinline)) void activation(const Input& in, const T* w13, i64 inner, i64 f, const float* weight, float* act, i64 ld, const T* after = nullptr) {
    i64 columns = least(PANEL, inner - f);
    float* both = scratch<55, float>(2 * in.M * PANEL);
    float* up = both + in.M * PANEL;
    const T *gate_rows = w13 + f * in.K, *up_rows = gate_rows + inner * in.K;
    product_panel(in, gate_rows, in.K, columns, both, PANEL, up_rows);
    product_panel(in, up_rows, in.K, columns, up, PANEL, f + PANEL < inner || !after ? gate_rows + PANEL * in.K : after);
    for (i64 m = 0; m < in.M; ++m) swiglu(both + m * PANEL, up + m * PANEL, act + m * ld + f, columns, weight ? weight[m] : 1.0f);
}

// Q queries of one row (T tokens of H heads) against its keys: ctx [Q, C] = softmax(scale q k^T) c. The first token
// sees `first` keys, each later one a key more; none sees fewer than one.
template <class T>
__attribute__((noinline)) void attend(const Shape& s, double scale, const T* pool, const i64* pages, i64 first, i64 tokens, const float* q, float* ctx) {
    i64 H = s.heads, X = s.latent + s.rope, C = s.latent, Q = tokens * H;
    i64 keys = first + tokens - 1 > 1 ? first + tokens - 1 : 1, padded = round_up(keys, PANEL);
    float* score = scratch<60, float>(Q * padded);
    float* panel = scratch<54, float>(X * PANEL);
    for (i64 k = 0; k < keys; k += PANEL) {
        const T* page = pool + (pages[k / PAGE] * PAGE + k % PAGE) * X;
        i64 columns = keys - k > W ? PANEL : W;
        transpose_panel(panel, page, X, columns, X);
        FloatGemm::multiply_rows(Q, columns, X, q, X, 1, panel, PANEL, score + k, padded, false);
    }
    float* share = scratch<61, float>(Q);
    for (i64 i = 0; i < Q; ++i) {
        float* row = score + i * padded;
        i64 seen = first + i / H > 1 ? first + i / H : 1;
        for (i64 k = seen; k < round_up(keys, W); ++k) row[k] = -std::numeric_limits<float>::infinity();
        vf most = splat(-std::numeric_limits<float>::infinity());
        for (i64 k = 0; k < seen; k += W) most = vmax(load(row + k), most);
        vf top = splat(max_of(most) * (float)scale), total = {};
        for (i64 k = 0; k < round_up(keys, W); k += W) {
            vf p = vexp(load(row + k) * (float)scale - top);
            total += p;
            store(row + k, p);
        }
        share[i] = 1.0f / sum(total);
    }
    float* wide = sizeof(T) == 4 ? nullptr : scratch<62, float>(PAGE * C);
    for (i64 k = 0; k < keys; k += PAGE) {
        const T* page = pool + pages[k / PAGE] * PAGE * X;
        i64 here = least(PAGE, keys - k), ld = X;
        const float* values = (const float*)page;
        if (sizeof(T) == 2) {
            for (i64 i = 0; i < here; ++i) widen_row(page + i * X, wide + i * C, C);
            values = wide, ld = C;
        }
        for (i64 c = 0; c < C; c += PANEL) {
            if (C - c < PANEL && (C - c) % W) {  // a tile reads whole vectors
                float* part = scratch<63, float>(PAGE * PANEL);
                for (i64 i = 0; i < here; ++i)
                    for (i64 j = 0; j < PANEL; ++j) part[i * PANEL + j] = c + j < C ? values[i * ld + c + j] : 0.0f;
                FloatGemm::multiply_rows(Q, C - c, here, score + k, padded, 1, part, PANEL, ctx + c, C, k > 0);
            } else
                FloatGemm::multiply_rows(Q, least(PANEL, C - c), here, score + k, padded, 1, values + c, ld, ctx + c,
                                         C, k > 0);
        }
    }
    for (i64 i = 0; i < Q; ++i)
        each_vector(C, [&](i64 c, int left) {
            store_some(ctx + i * C + c, load_some(ctx + i * C + c, left) * share[i], left);
        });
}

// The weights of one head's keys and values, for `attend_expanded`: W_UK [nope, C], and W_UV transposed, in panels.
struct Head {
    const float *keys, *values;
};
template <class T>
Head expanding(const Shape& s, const T* w) {
    i64 C = s.latent;
    float* keys = (float*)w;
    if (sizeof(T) == 2) {
        keys = scratch<90, float>(s.nope * C);
        widen_row(w, keys, s.nope * C);
    }
    float* values = scratch<91, float>(FloatGemm::b_size(C, s.value));
    FloatGemm::pack_b(values, w + s.nope * C, C, s.value, 1, C);
    return {keys, values};
}

// `tokens` queries of one head and row, from `position` on, against the row's keys up to their own, in the expanded
// form: out [tokens, ldo] of value numbers. q [tokens, nope + rope], rotated. The softmax runs over blocks of keys that
// begin at multiples of BLOCK, so a query's result depends on neither the first token nor their number. Returns the
// multiplications.
template <class T>
__attribute__((noinline)) i64 attend_expanded(const Shape& s, double scale, const Head& head, const T* pool, const i64* pages, i64 position, i64 tokens, const float* q, float* out, i64 ldo) {
    i64 C = s.latent, X = C + s.rope, wide = s.nope + s.rope, ldv = round_up(s.value, W), keys = position + tokens, work = 0;
    float* panel = scratch<54, float>(X * PANEL);
    float* k_block = scratch<92, float>(wide * BLOCK);
    float* v_block = scratch<93, float>(BLOCK * ldv);
    float* score = scratch<94, float>(QUERIES * BLOCK);
    float* sums = scratch<95, float>(tokens * (ldv + 2));
    float *high = sums + tokens * ldv, *total = high + tokens;
    float* page_rows = sizeof(T) == 4 ? nullptr : scratch<62, float>(PAGE * C);
    memset(sums, 0, tokens * ldv * sizeof(float));
    for (i64 t = 0; t < tokens; ++t) high[t] = -3e38f, total[t] = 0;  // finite: -inf is never subtracted from -inf
    for (i64 first = 0; first < keys; first += BLOCK) {
        i64 here = least(BLOCK, keys - first);
        memset(v_block, 0, BLOCK * ldv * sizeof(float));
        for (i64 k = 0; k < here; k += PANEL) {
            const T* at = pool + (pages[(first + k) / PAGE] * PAGE + (first + k) % PAGE) * X;
            transpose_panel(panel, at, X, PANEL, X);
            FloatGemm::multiply_rows(s.nope, PANEL, C, head.keys, C, 1, panel, PANEL, k_block + k * wide, PANEL, false);
            memcpy(k_block + k * wide + s.nope * PANEL, panel + C * PANEL, s.rope * PANEL * sizeof(float));
        }
        for (i64 k = 0; k < here; k += PAGE) {
            const T* at = pool + pages[(first + k) / PAGE] * PAGE * X;
            i64 rows = least(PAGE, here - k), ld = X;
            const float* latents = (const float*)at;
            if (sizeof(T) == 2) {
                for (i64 i = 0; i < rows; ++i) widen_row(at + i * X, page_rows + i * C, C);
                latents = page_rows, ld = C;
            }
            FloatGemm::multiply(rows, s.value, C, latents, ld, head.values, v_block + k * ldv, ldv, false);
        }
        work += here * C * (s.nope + s.value);
        for (i64 t = first > position ? (first - position) / QUERIES * QUERIES : 0; t < tokens; t += QUERIES) {
            i64 n = least(QUERIES, tokens - t), seen = least(here, position + t + n - first), columns = round_up(seen, PANEL);
            for (i64 k = 0; k < columns; k += PANEL)
                FloatGemm::multiply_rows(n, PANEL, wide, q + t * wide, wide, 1, k_block + k * wide, PANEL, score + k, BLOCK, false);
            for (i64 i = 0; i < n; ++i) {
                float *row = score + i * BLOCK, *sum_row = sums + (t + i) * ldv;
                i64 visible = least(here, position + t + i + 1 - first), end = round_up(visible, W);
                if (visible <= 0) {
                    memset(row, 0, columns * sizeof(float));
                    continue;
                }
                for (i64 k = visible; k < end; ++k) row[k] = -std::numeric_limits<float>::infinity();
                vf most = splat(-std::numeric_limits<float>::infinity()), added = {};
                for (i64 k = 0; k < visible; k += W) most = vmax(load(row + k), most);
                float before = high[t + i], top = max_of(most) * (float)scale;
                if (before > top) top = before;
                for (i64 k = 0; k < end; k += W) {
                    vf p = vexp(load(row + k) * (float)scale - top);
                    added += p;
                    store(row + k, p);
                }
                for (i64 k = end; k < columns; k += W) store(row + k, (vf){});
                vf by = vexp(splat(before - top));
                high[t + i] = top;
                total[t + i] = total[t + i] * by[0] + sum(added);
                for (i64 v = 0; v < ldv; v += W) store(sum_row + v, load(sum_row + v) * by);
            }
            FloatGemm::multiply_rows(n, s.value, columns, score, BLOCK, 1, v_block, ldv, sums + t * ldv, ldv, true);
            work += n * columns * (wide + s.value);
        }
    }
    for (i64 t = 0; t < tokens; ++t) {
        float share = 1.0f / total[t];
        each_vector(s.value, [&](i64 v, int left) { store_some(out + t * ldo + v, load_some(sums + t * ldv + v, left) * share, left); });
    }
    return work;
}

// The state of a step's tokens between layers, and the operations on them that read no matrix.
struct Tokens {
    const Shape& s;
    const Factors& f;
    i64 B;
    const i64 *begin;         // the tokens of row b are [begin[b], begin[b + 1])
    const i64 *base, *table;  // position of each row's first token; pages of each row
    i64 width;                // of the table
    const float* turns;       // rotary table [position, R]
    const i64* expand;        // [B, 2]: the positions of each row whose tokens attend in the expanded form, or null
    int threads;
    std::atomic<i64> work{0};  // multiplications of queries with keys and probabilities with values
    i64 N = begin[B], D = s.dim, X = s.latent + s.rope;
    float *x, *u, *qlat, *kv, *q, *ctx, *att, *out, *gates, *weight, *act, *routed;
    i64 *expert, *pair, *place, *start;
    i64 *position;  // of every token
    i64* cell;      // its place in a pool, in slots
    struct Together {
        i64 row, first, tokens, sees;  // `sees`: keys of the first of them; each other sees one more
    };
    Together *together, *expanded;  // tokens of a row that attend together, in either form
    i64 n_together = 0, n_expanded = 0;
    struct Range {
        i64 first, tokens;
    }* absorbed;  // neighbouring tokens, of any rows, that attend in the absorbed form
    i64 n_absorbed = 0;

    void allocate() {
        i64 HC = s.heads * s.latent, wide = s.shared > s.dense ? s.shared : s.dense;
        i64 sizes[] = {N * D, N * D, N * s.q_rank, N * X, N * s.heads * X, N * HC, N * s.heads * s.value, N * D,
                       N * s.experts, N * s.active, N * wide, N * s.active * D};
        float** to[] = {&x, &u, &qlat, &kv, &q, &ctx, &att, &out, &gates, &weight, &act, &routed};
        i64 total = 0;
        for (i64 size : sizes) total += round_up(size, 16);
        float* memory = scratch<64, float>(total);
        for (int i = 0; i < 12; ++i) *to[i] = memory, memory += round_up(sizes[i], 16);
        expert = scratch<65, i64>(3 * N * s.active + s.experts + 1);
        pair = expert + N * s.active;
        place = pair + N * s.active;
        start = place + N * s.active;
        position = scratch<69, i64>(2 * N);
        cell = position + N;
        together = scratch<70, Together>(N + B);
        expanded = together + N;
        absorbed = scratch<96, Range>(B + 1);
        for (i64 b = 0; b < B; ++b) {
            i64 T_ = begin[b + 1] - begin[b], from = T_, to = T_;  // of the tokens in the expanded form
            if (expand && expand[2 * b + 1] > expand[2 * b]) {
                from = least(T_, expand[2 * b] > base[b] ? expand[2 * b] - base[b] : 0);
                to = least(T_, expand[2 * b + 1] - base[b]);
                if (to > from)
                    expanded[n_expanded++] = {b, begin[b] + from, to - from, base[b] + from + 1};
                else
                    from = to = T_;
            }
            add_range(begin[b], from);
            add_range(begin[b] + to, T_ - to);
            for (i64 t = 0; t < T_; ++t) {
                // An MTP module may begin before the text; such a token gets a position that nothing reads yet.
                i64 n = begin[b] + t, p = base[b] + t < 0 ? base[b] + T_ - 1 - (base[b] + t) : base[b] + t;
                position[n] = p;
                cell[n] = table[b * width + p / PAGE] * PAGE + p % PAGE;
                i64 left = t < from ? from - t : T_ - t, step = t < from ? t : t - to;
                if ((t < from || t >= to) && step % GROUP == 0) together[n_together++] = {b, n, least(GROUP, left), base[b] + t + 1};
            }
        }
    }
    void add_range(i64 first, i64 tokens) {
        if (n_absorbed && absorbed[n_absorbed - 1].first + absorbed[n_absorbed - 1].tokens == first)
            absorbed[n_absorbed - 1].tokens += tokens;
        else if (tokens)
            absorbed[n_absorbed++] = {first, tokens};
    }
    template <class Each>
    void rows(i64 n, const Each& each) {
        parallel((n + GROUP - 1) / GROUP, threads, [&](i64 g) {
            for (i64 i = g * GROUP; i < least(n, (g + 1) * GROUP); ++i) each(i);
        });
    }
    // Keeps only the tokens `pick`: in ascending order, at most one per row. They attend in the absorbed form, which the
    // last token of a prompt does anyway.
    void keep(const i64* pick, i64 M) {
        for (i64 m = 0, b = 0; m < M; ++m) {
            i64 n = pick[m];
            while (begin[b + 1] <= n) ++b;
            together[m] = {b, m, 1, base[b] + n - begin[b] + 1};
            memmove(x + m * D, x + n * D, D * sizeof(float));
            memmove(u + m * D, u + n * D, D * sizeof(float));
            position[m] = position[n];
        }
        N = n_together = M;
        n_expanded = 0, n_absorbed = 1;
        absorbed[0] = {0, M};
    }
    // The experts of every token and their weights, from the gate's logits.
    void choose(const float* bias, i64* record, i64 step) {
        i64 E = s.experts, K = s.active;
        GateRule rule{E, K, s.groups, s.kept_groups, s.rated, s.softmax != 0, s.normed != 0, (float)f.route};
        parallel((N + TOKENS - 1) / TOKENS, threads, [&](i64 block) {
            i64 first = block * TOKENS, here = least(TOKENS, N - first), lanes = round_up(here, W);
            float *score = scratch<56, float>(E * TOKENS), *room = scratch<57, float>((E + 2 * s.groups) * W);
            int32_t* chosen = scratch<58, int32_t>(K * TOKENS);
            for (i64 e = 0; e < E; ++e)
                for (i64 t = 0; t < lanes; ++t) score[e * TOKENS + t] = t < here ? gates[(first + t) * E + e] : 0.0f;
            gate_scores(score, rule, lanes);
            choose_experts(score, bias, rule, chosen, room, lanes);
            for (i64 t = 0; t < here; ++t) {
                i64 n = first + t, *own = expert + n * K;
                float total = 0.0f, *share = weight + n * K;
                for (i64 k = 0; k < K; ++k) {
                    own[k] = chosen[k * TOKENS + t];
                    total += share[k] = score[own[k] * TOKENS + t];
                    if (record) record[n * step + k] = own[k];
                }
                float factor = rule.normalise ? rule.scale / (total + 1e-20f) : rule.scale;
                for (i64 k = 0; k < K; ++k) share[k] *= factor;
            }
        });
    }
    // pair: the (token, choice) pairs by expert; those of expert e are [start[e], start[e + 1]). place: the inverse.
    void sort_by_expert() {
        i64 E = s.experts, pairs = N * s.active;
        i64* next = scratch<68, i64>(E + 1);
        memset(next, 0, (E + 1) * sizeof(i64));
        for (i64 i = 0; i < pairs; ++i) ++next[expert[i] + 1];
        for (i64 e = 0; e < E; ++e) next[e + 1] += next[e];
        memcpy(start, next, (E + 1) * sizeof(i64));
        for (i64 i = 0; i < pairs; ++i) pair[place[i] = next[expert[i]]++] = i;
    }
    // x += the outputs of the routed and the shared experts.
    void combine(bool shared) {
        i64 K = s.active;
        rows(N, [&](i64 n) {
            const i64* from = place + n * K;
            each_vector(D, [&](i64 d, int left) {
                vf total = shared ? load_some(out + n * D + d, left) : (vf){}, own = {};
                for (i64 k = 0; k < K; ++k) own += load_some(routed + from[k] * D + d, left);
                store_some(x + n * D + d, load_some(x + n * D + d, left) + (own + total), left);
            });
        });
    }
};

// The operations that read matrices.
template <class T>
struct Step : Tokens {
    // Writes the keys of u to the pool.
    void keys(const Layer<T>& L) {
        dense_product(input<40, T>(u, D, N, D, threads), L.wkv_a, X, kv);
        rows(N, [&](i64 n) {
            T* to = L.pool + cell[n] * X;
            float* own = kv + n * X;
            norm_row(own, L.kv_norm, own, s.latent, f.latent_eps);
            narrow_row(own, to, s.latent);
            rotate(own + s.latent, turns + position[n] * s.rope, to + s.latent, s.rope);
        });
    }
    // out = Attn(u), whose keys are in the pool.
    void attention(const Layer<T>& L) {
        i64 Z = s.q_rank, wide = s.nope + s.rope;
        Input in = input<40, T>(u, D, N, D, threads);
        if (Z) {
            dense_product(in, L.wq_a, Z, qlat);
            rows(N, [&](i64 n) { norm_row(qlat + n * Z, L.q_norm, qlat + n * Z, Z, f.latent_eps); });
        }
        if (Z) in = input<41, T>(qlat, Z, N, Z, threads);
        i64 HV = s.heads * s.value;
        float* whole = n_expanded ? scratch<97, float>(s.heads * N * wide) : nullptr;  // queries of every head
        parallel(s.heads, threads, [&](i64 h) {
            float* own = whole ? whole + h * N * wide : scratch<50, float>(N * wide);
            product_rows(in, L.wq_b + h * wide * in.K, wide, own, wide);
            const T* up = L.wkv_b + h * (s.nope + s.value) * s.latent;  // W_UK of this head, [nope, C]
            float* panel = scratch<54, float>(s.nope * PANEL);
            for (i64 c = 0; c < s.latent && n_absorbed; c += PANEL) {
                FloatGemm::pack_b(panel, up + c, s.nope, least(PANEL, s.latent - c), s.latent, 1);
                for (i64 i = 0; i < n_absorbed; ++i) {
                    i64 n = absorbed[i].first;
                    FloatGemm::multiply_rows(absorbed[i].tokens, least(PANEL, s.latent - c), s.nope, own + n * wide, wide, 1, panel, PANEL,
                                             q + (n * s.heads + h) * X + c, s.heads * X, false);
                }
            }
            for (i64 n = 0; n < N; ++n) {
                float* rope = own + n * wide + s.nope;
                rotate(rope, turns + position[n] * s.rope, q + (n * s.heads + h) * X + s.latent, s.rope);
                if (whole) memcpy(rope, q + (n * s.heads + h) * X + s.latent, s.rope * sizeof(float));
            }
        });
        parallel(n_together, threads, [&](i64 i) {
            const Together& mine = together[i];
            i64 query = mine.first * s.heads;
            attend(s, f.scale, L.pool, table + mine.row * width, mine.sees, mine.tokens, q + query * X, ctx + query * s.latent);
            work += mine.tokens * s.heads * (mine.sees + mine.tokens - 1) * (X + s.latent);
        });
        i64 parts = s.heads < threads ? (threads + s.heads - 1) / s.heads : 1;  // more threads than heads share a head
        for (i64 i = 0; i < n_expanded; ++i) {
            const Together& mine = expanded[i];
            i64 each = round_up((mine.tokens + parts - 1) / parts, QUERIES);
            parallel(s.heads * ((mine.tokens + each - 1) / each), threads, [&](i64 task) {
                i64 h = task % s.heads, t = task / s.heads * each, n = mine.first + t;
                Head head = expanding(s, L.wkv_b + h * (s.nope + s.value) * s.latent);
                work += attend_expanded(s, f.scale, head, L.pool, table + mine.row * width, mine.sees - 1 + t, least(each, mine.tokens - t),
                                        whole + (h * N + n) * wide, att + n * HV + h * s.value, HV);
            });
        }
        parallel(s.heads, threads, [&](i64 h) {
            const T* w_uv = L.wkv_b + (h * (s.nope + s.value) + s.nope) * s.latent;
            for (i64 i = 0; i < n_absorbed; ++i) {
                i64 n = absorbed[i].first;
                Input mine = input<42, T>(ctx + (n * s.heads + h) * s.latent, s.heads * s.latent, absorbed[i].tokens, s.latent);
                product_rows(mine, w_uv, s.value, att + n * HV + h * s.value, HV);
            }
        });
        dense_product(input<43, T>(att, HV, N, HV, threads), L.wo, D, out);
    }

    // y [M, n] = in w^T, by panels.
    void dense_product(const Input& in, const T* w, i64 n, float* y) {
        parallel((n + PANEL - 1) / PANEL, threads, [&](i64 i) {
            product_panel(in, w + i * PANEL * in.K, in.K, least(PANEL, n - i * PANEL), y + i * PANEL, n);
        });
    }

    // x += the FFN of u.
    void dense_ffn(const Layer<T>& L) {
        Input in = input<40, T>(u, D, N, D, threads);
        parallel((s.dense + PANEL - 1) / PANEL, threads,
                 [&](i64 i) { activation(in, L.w13, s.dense, i * PANEL, nullptr, act, s.dense); });
        dense_product(input<43, T>(act, s.dense, N, s.dense, threads), L.w2, D, out);
        rows(N, [&](i64 n) { add_row(x + n * D, out + n * D, D); });
    }
    void sparse_ffn(const Layer<T>& L, i64* record, i64 step) {
        i64 E = s.experts, K = s.active, gate_panels = (E + PANEL - 1) / PANEL;
        bool shared = s.shared > 0;
        Input in = input<40, T>(u, D, N, D, threads), plain{u, D, N, D, nullptr};
        parallel(gate_panels + (s.shared + PANEL - 1) / PANEL, threads, [&](i64 i) {
            if (i < gate_panels)
                product_panel(plain, L.gate + i * PANEL * D, D, least(PANEL, E - i * PANEL), gates + i * PANEL, E);
            else
                activation(in, L.shared13, s.shared, (i - gate_panels) * PANEL, nullptr, act, s.shared);
        });
        choose(L.bias, record, step);
        sort_by_expert();
        i64* used = scratch<66, i64>(E);
        i64 n_used = 0;
        for (i64 e = 0; e < E; ++e)
            if (start[e + 1] > start[e]) used[n_used++] = e;
        Input mid = shared ? input<43, T>(act, s.shared, N, s.shared, threads) : in;
        i64 shared_panels = shared ? (D + PANEL - 1) / PANEL : 0;
        parallel(n_used + shared_panels, threads, [&](i64 i) {
            if (i >= n_used) {
                i64 n = (i - n_used) * PANEL;
                product_panel(mid, L.shared2 + n * s.shared, s.shared, least(PANEL, D - n), out + n, D);
                return;
            }
            i64 e = used[i], first = start[e], M = start[e + 1] - first, F = s.inner;
            float* own = scratch<50, float>(M * (D + F + 1));
            float *hidden = own + M * D, *share = hidden + M * F;
            for (i64 m = 0; m < M; ++m) {
                memcpy(own + m * D, u + pair[first + m] / K * D, D * sizeof(float));
                share[m] = weight[pair[first + m]];
            }
            const T *w13 = L.w13 + e * 2 * F * D, *w2 = L.w2 + e * D * F;
            const T* after = i + 1 < n_used ? L.w13 + used[i + 1] * 2 * F * D : L.shared2;
            Input mine = input<44, T>(own, D, M, D);
            for (i64 c = 0; c < F; c += PANEL) activation(mine, w13, F, c, share, hidden, F, w2);
            product_rows(input<45, T>(hidden, F, M, F), w2, D, routed + first * D, D, after);
        });
        combine(shared);
    }
    // With `pick`, outputs of only these M tokens; if M is 0, only keys.
    void layer(const Layer<T>& L, i64* record, i64 step, const i64* pick, i64 M) {
        rows(N, [&](i64 n) { norm_row(x + n * D, L.attn_norm, u + n * D, D, f.eps); });
        keys(L);
        if (!M) return;
        if (pick) keep(pick, M);
        attention(L);
        rows(N, [&](i64 n) {
            add_row(x + n * D, out + n * D, D);
            norm_row(x + n * D, L.ffn_norm, u + n * D, D, f.eps);
        });
        if (L.gate)
            sparse_ffn(L, record, step);
        else
            dense_ffn(L);
    }
    // x = the embeddings of the tokens, in an MTP module joined with the states `hidden` [N, D].
    void embed(const Ends<T>& e, const i64* token, const T* hidden) {
        if (!hidden) {
            rows(N, [&](i64 n) { widen_row(e.embed + token[n] * D, x + n * D, D); });
            return;
        }
        float* both = scratch<67, float>(2 * N * D);
        rows(N, [&](i64 n) {
            float* own = both + 2 * n * D;
            widen_row(e.embed + token[n] * D, own, D);
            widen_row(hidden + n * D, own + D, D);
            norm_row(own, e.enorm, own, D, f.eps);
            norm_row(own + D, e.hnorm, own + D, D, f.eps);
        });
        dense_product(input<43, T>(both, 2 * D, N, 2 * D, threads), e.join, D, x);
    }
    // What an MTP module reads of every token: the main network's states after its final norm, a module's before.
    void states(const Ends<T>& e, bool module, T* to) {
        rows(N, [&](i64 n) {
            if (!module) norm_row(x + n * D, e.norm, u + n * D, D, f.eps);
            narrow_row((module ? x : u) + n * D, to + n * D, D);
        });
    }
    // The final norm (to `state`) and the logits of M rows: those of `pick`, or all.
    void finish(const Ends<T>& e, const i64* pick, i64 M, T* state, float* logits) {
        rows(M, [&](i64 m) {
            norm_row(x + (pick ? pick[m] : m) * D, e.norm, u + m * D, D, f.eps);
            if (state) narrow_row(u + m * D, state + m * D, D);
        });
        dense_product(input<40, T>(u, D, M, D, threads), e.head, s.vocab, logits);
    }
};

template <class T>
void decode(const i64* shape, const double* factors, const i64* layers, i64 n_layers, const i64* ends, const i64* token,
            const T* hidden, const i64* begin, const i64* base, i64 B, const i64* table, i64 width, const float* turns, const i64* expand,
            const i64* pick, i64 M, T* raw, T* state, float* logits, i64* record, i64 threads, i64* work) {
    const Shape& s = *(const Shape*)shape;
    Step<T> step{{s, *(const Factors*)factors, B, begin, base, table, width, turns, expand, (int)threads}};
    step.allocate();
    const Ends<T>& e = *(const Ends<T>*)ends;
    step.embed(e, token, hidden);
    const Layer<T>* all = (const Layer<T>*)layers;
    i64 n_sparse = 0, seen = 0;
    for (i64 i = 0; i < n_layers; ++i) n_sparse += all[i].gate != nullptr;
    for (i64 i = 0; i < n_layers; ++i) {
        bool last = i + 1 == n_layers && !raw && !record;
        step.layer(all[i], record ? record + seen * s.active : nullptr, n_sparse * s.active, last ? pick : nullptr, last ? M : step.N);
        if (last) pick = nullptr;
        seen += all[i].gate != nullptr;
    }
    if (raw) step.states(e, hidden != nullptr, raw);
    step.finish(e, pick, M, state, logits);
    if (work) *work += step.work;
}

}  // namespace

#define FUNCTIONS(T, suffix)                                                                                             \
    DECODE_STEP(T, suffix) {                                                                                             \
        decode(shape, factors, layers, n_layers, ends, token, hidden, begin, base, B, table, width, turns, expand, pick, \
               M, raw, state, logits, record, threads, work);                                                                     \
    }
FUNCTIONS(float, float32)
FUNCTIONS(bf16, bfloat16)
