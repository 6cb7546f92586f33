// Tokens from logits, row by row.
#include "sample.hpp"

// `rejected` (may be null): the rows whose last draft, drawn from q [B, vocab], was rejected. `kept` (may be null), [B,
// vocab]: the tokens that truncation kept; it cannot be combined with drafts. `scored` (may be null), [B, V]: the logits of
// which the log-probabilities are, if tokens are drawn from others.
extern "C" EXPORT void sample_rows(const float* logits, i64 B, i64 V, i64 vocab, const double* rules, const i64* key, const i64* position,
                                   const bool* rejected, const float* q, i64* token, float* logp, float* raw, bool* kept, const float* scored,
                                   i64 threads) {
    parallel(B, (int)threads, [&](i64 b) {
        Distribution row(logits + b * V, V, vocab, ((const Rules*)rules)[b], scratch<73, float>(V));
        if (rejected && rejected[b] && !row.greedy() && row.finite()) {
            row.normalise();
            row.exclude(q + b * vocab);
        }
        token[b] = row.draw(key ? uniform(key[b], position[b]) : 0.0);
        if (kept) row.keep(kept + b * vocab);
        if (scored)
            score(scored + b * V, V, token[b], ((const Rules*)rules)[b].temperature, logp + b, raw + b);
        else
            row.score(token[b], logp + b, raw + b);
    });
}
