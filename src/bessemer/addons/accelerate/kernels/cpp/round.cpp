// A round of speculative decoding in one call: the MTP module drafts tokens after the newest one, the main model reads
// the newest token and the drafts, and every row accepts drafts and takes its next token (engine.speculative,
// engine.sampling). Without drafts it is one step plus sampling.
//
// Every row drafts, accepts and samples with its own logits and random numbers.
//
// Shapes: B rows, J drafts, T = J + 1, D hidden, V vocabulary.
#include "decode.hpp"
#include "sample.hpp"

namespace {

// The addresses of a network's layers and ends (embedding, final norm, head).
struct Part {
    const i64 *layers, count, *ends;
};

template <class T>
struct Round {
    const i64* shape;
    const double* factors;
    Part main, module;
    const i64* table;  // pages of each row
    i64 width;
    const float* turns;  // rotary table
    i64 B, J, vocab;
    const Rules* rules;
    const i64* key;
    i64 draft_stream, accept_stream;
    // State that changes. The module reads the states `hidden` [B, T, D] at base, base + 1, ..., of which known + 1 are
    // the main model's, and the tokens [B, T] one position later. A row's newest token is at `position`.
    const i64* newest;
    i64 *position, *base, *known, *token;
    T* hidden;
    int threads;
    i64 T_ = J + 1, D = ((const Shape*)shape)->dim, V = ((const Shape*)shape)->vocab;
    i64* fed = scratch<80, i64>(B * T_);      // the newest token and its drafts
    float* q = scratch<81, float>(J * B * V);  // [J, B, vocab]: the drafts' distributions; unset for greedy rows

    void run(const Part& part, const i64* tokens, const T* states, const i64* begin, const i64* first, const i64* pick, i64 M, T* state, float* logits, i64* record) {
        const auto call = [&](auto* step) {
            step(shape, factors, part.layers, part.count, part.ends, tokens, states, begin, first, B, table, width, turns, nullptr,
                 pick, M, nullptr, state, logits, record, threads, nullptr);
        };
        if constexpr (sizeof(T) == 4)
            call(decode_step_float32);
        else
            call(decode_step_bfloat16);
    }
    void draft() {
        i64 *tokens = scratch<82, i64>(B * T_ + 3 * B + 1), *begin = tokens + B * T_, *first = begin + B + 1, *last = first + B;
        T *states = scratch<83, T>(B * T_ * D), *state = scratch<84, T>(B * D);
        float* logits = scratch<85, float>(B * V);
        begin[0] = 0;
        for (i64 b = 0; b < B; ++b) {
            i64 n = known[b] + 1;
            token[b * T_ + n - 1] = newest[b];
            memcpy(tokens + begin[b], token + b * T_, n * sizeof(i64));
            memcpy((void*)(states + begin[b] * D), hidden + b * T_ * D, n * D * sizeof(T));
            begin[b + 1] = begin[b] + n;
            last[b] = begin[b + 1] - 1;
            first[b] = base[b];
        }
        run(module, tokens, states, begin, first, last, B, state, logits, nullptr);
        for (i64 j = 0;; ++j) {
            parallel(B, threads, [&](i64 b) {
                i64* x = fed + b * T_ + j + 1;
                if (rules[b].temperature == 0.0) {
                    *x = most_likely(logits + b * V, vocab);
                    return;
                }
                Distribution row(logits + b * V, V, vocab, rules[b], q + (j * B + b) * V);
                *x = row.draw(uniform(key[b] ^ draft_stream, position[b] + j + 1));
                row.normalise();
            });
            if (j + 1 == J) return;
            // The module continues from its own state, as if it were the main model's state one position later.
            for (i64 b = 0; b < B; ++b) tokens[b] = fed[b * T_ + j + 1], begin[b] = b, first[b] = position[b] + j, last[b] = b;
            begin[B] = B;
            run(module, tokens, state, begin, first, last, B, state, logits, nullptr);
        }
    }
    // Whether row b accepts draft j, whose logits are in `row`; a rejected draft is then excluded from `row`.
    bool accepts(i64 b, i64 j, Distribution& row) const {
        i64 x = fed[b * T_ + j + 1];
        if (!row.finite()) return false;
        if (row.greedy()) return row.best == x;
        const float* own = q + (j * B + b) * V;
        row.normalise();
        if (uniform(key[b] ^ accept_stream, position[b] + j + 1) * own[x] < row.p[x]) return true;
        row.exclude(own);
        return false;
    }
};

// Results besides the state: logits [B, T, V]; those after the last accepted draft, `last` [B, V]; both
// log-probabilities of accepted drafts, [2, B, J]; per row, whether its next draft was rejected, and that draft's
// distribution, q [B, vocab]; the experts of every token; the next token, its log-probabilities, and the tokens it was
// drawn from, [B, vocab]. From `last` on, everything may be null.
struct Results {
    float *logits, *last, *logp;
    bool* refused;
    float* q;
    i64 *expert, *next;
    float *next_logp, *next_raw;
    bool* kept;
};

// `most` [B]: how many drafts a row may accept.
template <class T>
void round(Round<T> r, const i64* most, const Results& out) {
    i64 B = r.B, J = r.J, T_ = r.T_, V = r.V;
    i64* begin = scratch<86, i64>(B + 1);
    for (i64 b = 0; b < B; ++b) r.fed[b * T_] = r.newest[b];
    if (J) r.draft();
    for (i64 b = 0; b <= B; ++b) begin[b] = b * T_;
    r.run(r.main, r.fed, nullptr, begin, r.position, nullptr, B * T_, r.hidden, out.logits, out.expert);
    parallel(B, r.threads, [&](i64 b) {
        i64 n = 0;
        bool refused = false, open;
        while ((open = J && n < most[b]) || out.next) {
            Distribution row(out.logits + (b * T_ + n) * V, V, r.vocab, r.rules[b], scratch<73, float>(V));
            if (open && r.accepts(b, n, row)) {
                row.score(r.fed[b * T_ + n + 1], out.logp + b * J + n, out.logp + (B + b) * J + n);
                ++n;
                continue;
            }
            refused = open && !row.greedy();
            if (out.next) {
                out.next[b] = row.draw(uniform(r.key[b], r.position[b] + n + 1));
                if (out.kept) row.keep(out.kept + b * r.vocab);
                row.score(out.next[b], out.next_logp + b, out.next_raw + b);
            }
            break;
        }
        if (J) {
            r.known[b] = n;
            r.base[b] = r.position[b];
            memcpy(r.token + b * T_, r.fed + b * T_ + 1, J * sizeof(i64));
        }
        r.position[b] += n + 1;
        if (out.last) memcpy(out.last + b * V, out.logits + (b * T_ + n) * V, V * sizeof(float));
        if (out.refused) out.refused[b] = refused;
        if (refused && out.q) memcpy(out.q + b * r.vocab, r.q + (n * B + b) * V, r.vocab * sizeof(float));
    });
}

}  // namespace

#define FUNCTIONS(T, suffix)                                                                                             \
    extern "C" EXPORT void decode_round_##suffix(                                                                        \
        const i64* shape, const double* factors, const i64* layers, i64 n_layers, const i64* ends, const i64* module,    \
        const i64* module_ends, const i64* table, i64 width, const float* turns, i64 B, i64 J, i64 vocab,                \
        const double* rules, const i64* key, i64 draft_stream, i64 accept_stream, const i64* newest, i64* position,      \
        const i64* most, i64* base, i64* known, i64* token, T* hidden, float* logits, float* last, float* logp,          \
        bool* refused, float* q, i64* expert, i64* next, float* next_logp, float* next_raw, bool* kept, i64 threads) {   \
        Round<T> r{shape, factors, {layers, n_layers, ends}, {module, 1, module_ends}, table, width, turns, B, J, vocab, \
                   (const Rules*)rules, key, draft_stream, accept_stream, newest, position, base, known, token, hidden,  \
                   (int)threads};                                                                                        \
        round(r, most, {logits, last, logp, refused, q, expert, next, next_logp, next_raw, kept});                       \
    }
FUNCTIONS(float, float32)
FUNCTIONS(bf16, bfloat16)
