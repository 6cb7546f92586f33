"""The topics: what each function takes, what it gives, by which formula, and who wrote the formula down.

An adapter offers a topic with a function of the topic's name. It takes the inputs below as keyword arguments: arrays as
numpy arrays (float64, int64, bool) of the stated shape, everything else as Python's float, int, bool, str, list, dict
or None. It returns a dict with some or all of the outputs, or the bare value if the topic has one output. Numbers of
torch, JAX or float32 will do. `raise NotImplementedError("why")` says that this case is not offered.

Shapes: B completions (rows), T tokens, N tokens of no particular row, V vocabulary, P problems, E experts, S sequences,
D hidden, M rows and K columns of a matrix. Masks are true where a token counts. Log-probabilities are natural.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Value:
    """An input or an output."""

    name: str
    type: str
    """float, int, bool, string, or json (lists, dicts, strings and null, as the meaning says)."""
    shape: str
    """"" for a single value, otherwise the dimensions, such as "B,T"."""
    meaning: str


@dataclass(frozen=True)
class Topic:
    """One function that an adapter can offer."""

    name: str
    title: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    formula: str
    sources: tuple[str, ...]
    tolerance: float = 1e-5
    """Largest relative difference that agrees: max |got - expected| / max |expected| over the elements of an output.
    Integers, booleans and strings must be equal."""


def _values(*lines: str) -> tuple[Value, ...]:
    """From "name type[shape] meaning"."""
    values = []
    for line in lines:
        name, kind, meaning = line.split(" ", 2)
        kind, _, shape = kind.partition("[")
        values.append(Value(name, kind, shape.rstrip("]"), meaning))
    return tuple(values)


TOPICS: dict[str, Topic] = {}


def _topic(
    name: str, title: str, inputs: tuple[Value, ...], outputs: tuple[Value, ...], formula: str, *sources: str,
    tolerance: float = 1e-5,
) -> None:  # fmt: skip
    TOPICS[name] = Topic(name, title, inputs, outputs, formula, sources, tolerance)


# ---- reinforcement learning ----------------------------------------------------------------------------------------

_topic(
    "group_advantages",
    "Advantages of GRPO: a reward against the others of its prompt",
    _values(
        "rewards float[B] reward of each completion",
        "groups int[B] prompt of each completion; rows of a prompt need not be neighbours, groups may differ in size",
        'std string "population" (divide by n), "sample" (by n - 1) or "none" (do not divide, Dr. GRPO)',
        "eps float added to the standard deviation; the tolerance covers any guard up to 1e-4",
    ),
    _values("advantages float[B] a group of equal rewards, and a group of one, gives 0"),
    "A_i = (r_i - mean(r of its group)) / (std(r of its group) + eps)",
    "DeepSeekMath 4.1.1", "DeepSeek-R1 2.2.1", "Dr. GRPO (arXiv 2503.20783) 3.2",
    tolerance=1e-3,
)  # fmt: skip
_topic(
    "loss_mask",
    "Which tokens train: the policy's own, of completions that ended",
    _values(
        "completion_mask bool[B,T] false for padding after the completion",
        "tool_mask bool[B,T] true where the policy wrote the token, false where a tool did",
        "truncated bool[B] the completion hit the length limit and is to be left out",
    ),
    _values(
        "mask bool[B,T] tokens that train",
        "tokens int number of them: the denominator of a mean over tokens",
    ),
    "mask = completion_mask and tool_mask and not truncated; tokens = sum(mask)",
    "DAPO (arXiv 2503.14476) 3.4", "Search-R1 (arXiv 2503.09516) 3.1",
)  # fmt: skip
_topic(
    "loss_weights",
    "What one token weighs in the loss of a step, through gradient accumulation",
    _values(
        "mask bool[B,T] tokens that train",
        "micro_batch int[B] the micro-batch of each row; the gradients of all micro-batches make one step",
        'level string "token": mean over all tokens of the step; "sequence": mean over rows of means over tokens; '
        '"constant": sum over tokens by `length`, mean over rows',
        'length int divisor of "constant", otherwise 0',
    ),
    _values("weights float[B,T] d loss / d (loss of this token); the division into micro-batches does not change it"),
    "token: m / sum(m); sequence: m / (B sum_t m_bt); constant: m / (B length)",
    "DAPO 3.3 (token)", "DeepSeekMath eq. 3 (sequence)", "Dr. GRPO 3.2 (constant)",
)  # fmt: skip
_topic(
    "policy_loss",
    "The clipped objective, to be minimised, and its gradient",
    _values(
        "logprobs float[B,T] log pi of each token",
        "old_logprobs float[B,T] log pi_old",
        "advantages float[B] of each row",
        "mask bool[B,T] tokens that train",
        "clip_low float the ratio is clipped at 1 - clip_low",
        "clip_high float and at 1 + clip_high",
        "dual_clip float for A < 0 the term is at least dual_clip A; 0: no such bound",
        'ratio string "token" (GRPO) or "sequence" (GSPO: exp of the mean log-ratio of the row, for all its tokens)',
        'level string "token" or "sequence", as in loss_weights',
    ),
    _values("loss float -(weighted sum of the terms)", "gradient float[B,T] d loss / d logprobs, as autograd gives it"),
    "term = min(rho A, clip(rho, 1 - low, 1 + high) A); if A < 0 and dual_clip: max(term, dual_clip A); "
    "loss = -sum(w term), w of loss_weights with one micro-batch",
    "PPO (arXiv 1707.06347) eq. 7", "DAPO 3.1", "Dual clip (arXiv 1912.09729) eq. 5", "GSPO (arXiv 2507.18071) eq. 5-7",
)  # fmt: skip
_topic(
    "sequence_ratio",
    "GSPO's ratio of a whole completion",
    _values(
        "logprobs float[B,T] log pi", "old_logprobs float[B,T] log pi_old", "mask bool[B,T] tokens that train",
    ),
    _values("ratio float[B] one per row"),
    "s_i = exp( sum_t m (log pi - log pi_old) / sum_t m )",
    "GSPO eq. 7",
)  # fmt: skip
_topic(
    "kl_terms",
    "Estimators of KL(pi | pi_ref) per token, and what autograd makes of them",
    _values(
        "logprobs float[N] log pi of tokens drawn from pi_old",
        "ref_logprobs float[N] log pi_ref",
        "old_logprobs float[N] log pi_old, a constant; used by k3-unbiased only",
        'form string "k1", "k2", "k3" or "k3-unbiased"',
    ),
    _values("kl float[N] the estimate", "gradient float[N] d kl / d logprobs"),
    "d = log pi - log pi_ref; k1 = d; k2 = d^2 / 2; k3 = exp(-d) + d - 1; k3-unbiased = exp(log pi - log pi_old) k3",
    "J. Schulman, Approximating KL Divergence (2020)", "DeepSeekMath eq. 4", "DeepSeek-V3.2 (arXiv 2512.02556) 3.1",
)  # fmt: skip
_topic(
    "kl_loss",
    "The KL term of a loss that is minimised: its sign, its mean, its gradient",
    _values(
        "logprobs float[B,T] log pi", "ref_logprobs float[B,T] log pi_ref", "mask bool[B,T] tokens that train",
        "beta float its weight", 'form string "k1", "k2" or "k3"', 'level string "token" or "sequence"',
    ),
    _values("loss float what is added to the loss", "gradient float[B,T] d loss / d logprobs; not zero for k2 and k3"),
    "loss = + beta sum(w kl), w of loss_weights with one micro-batch, kl of kl_terms",
    "DeepSeekMath eq. 3",
)  # fmt: skip
_topic(
    "kl_reward",
    "The KL penalty inside the reward (PPO's form)",
    _values(
        "rewards float[B] reward of each completion", "logprobs float[B,T] log pi_old of its tokens",
        "ref_logprobs float[B,T] log pi_ref", "mask bool[B,T] its tokens, padding on the right",
        "beta float weight of the penalty",
    ),
    _values("token_rewards float[B,T] 0 outside the mask"),
    "r_t = -beta (log pi - log pi_ref) for every token, plus the reward at the last token of the mask",
    "InstructGPT (arXiv 2203.02155) eq. 2", "DeepSeekMath eq. 2",
)  # fmt: skip
_topic(
    "positive_nll",
    "VAPO's extra term: the likelihood of the correct completions, through gradient accumulation",
    _values(
        "logprobs float[B,T] log pi", "mask bool[B,T] tokens that train", "rewards float[B] correct if above 0",
        "micro_batch int[B] the micro-batch of each row", "weight float mu",
    ),
    _values("loss float what all micro-batches add to the loss", "gradient float[B,T] d loss / d logprobs"),
    "- weight sum(m log pi over rows with reward > 0) / sum(m over those rows, all micro-batches); 0 without such rows",
    "VAPO (arXiv 2504.05118) eq. 10", "NVIDIA-NeMo/RL#3791", "NVIDIA-NeMo/RL#3792",
)  # fmt: skip
_topic(
    "rewards_after_evaluation",
    "Rewards of a training batch that was in flight while an evaluation ran",
    _values(
        "texts json completions of the training batch: list of problems, each a list of strings",
        "gold json answers of those problems",
        "evaluation_gold json answers of the evaluation batch, which ran after the prompts were handed out and before "
        "their completions were scored",
    ),
    _values("rewards float[P,G] 1 where a text equals the answer of its own problem"),
    "r[p, g] = 1[texts[p][g] = gold[p]]; the evaluation leaves no trace",
    "AgileRL/AgileRL#590",
)  # fmt: skip
_topic(
    "overlong_penalty",
    "DAPO's soft punishment of long completions",
    _values(
        "lengths int[N] tokens of each completion", "max_length int the limit", "buffer int length of the slope",
    ),
    _values("penalty float[N] added to the reward"),
    "0 up to max - buffer; then (max - buffer - length) / buffer; -1 beyond max",
    "DAPO eq. 13",
)  # fmt: skip
_topic(
    "off_policy_mask",
    "V3.2's mask of completions that the policy has left",
    _values(
        "logprobs float[B,T] log pi", "old_logprobs float[B,T] log pi_old, of the sampler",
        "advantages float[B] of each row", "mask bool[B,T] tokens that train", "limit float delta",
    ),
    _values("keep bool[B] false: the row counts nothing"),
    "left out if A < 0 and mean over its tokens of (log pi_old - log pi) > limit",
    "DeepSeek-V3.2 3.1",
)  # fmt: skip
_topic(
    "importance_weights",
    "Weights for the gap between sampler and trainer, and the numbers to log",
    _values(
        "trainer_logprobs float[B,T] log pi of the trainer, before the update",
        "sampler_logprobs float[B,T] of the engine",
        "mask bool[B,T] tokens that train",
        'mode string "token-truncate": min(rho, cap); "token-mask": rho if rho <= cap else 0; "sequence-truncate" and '
        '"sequence-mask": the same with the product of rho over the row',
        "cap float largest weight",
    ),
    _values(
        "weights float[B,T] 0 outside the mask", "cut_share float share of trained tokens whose ratio exceeds the cap",
        "mean_ratio float mean over trained tokens of the ratio before any cut",
    ),
    "rho = exp(log pi_trainer - log pi_sampler)",
    "Truncated importance sampling (Ionides 2008)", "verl docs/algo/rollout_corr.md", "huggingface/trl#5231",
)  # fmt: skip
_topic(
    "token_logprobs",
    "Log-probabilities of sampled tokens and the entropy, at the sampler's temperature",
    _values("logits float[N,V] of the model", "tokens int[N] sampled", "temperature float of the sampler"),
    _values("logprobs float[N] of the tokens", "entropy float[N] of the whole distribution, in nats"),
    "log softmax(logits / temperature)[token]; -sum p log p",
    "any text on language models",
)  # fmt: skip
_topic(
    "kept_logprobs",
    "The distribution that top-k and top-p leave, renormalised",
    _values(
        "logits float[N,V] of the model, no ties", "temperature float applied first",
        "top_k int then the k likeliest remain; 0: all", "top_p float then the smallest set of mass >= p; 1: all",
    ),
    _values("kept bool[N,V] tokens that remain", "logprobs float[N,V] renormalised over them, -inf elsewhere"),
    "softmax(logits / temperature); top-k, renormalised; the likeliest until their sum reaches top_p, renormalised",
    "Nucleus sampling (arXiv 1904.09751) 3.1", "DeepSeek-V3.2 3.1 (keep sampling mask)", "huggingface/trl#6789",
)  # fmt: skip

# ---- evaluation ----------------------------------------------------------------------------------------------------

_topic(
    "pass_at_k",
    "The unbiased estimate of pass@k from n samples",
    _values("n int[P] samples of each problem", "c int[P] correct ones", "k int draws, at most n"),
    _values("estimates float[P] of each problem", "mean float over problems"),
    "1 - C(n - c, k) / C(n, k)",
    "Codex (arXiv 2107.03374) eq. 1",
)  # fmt: skip
_topic(
    "boxed_answer",
    "The answer of a solution: what stands in its last complete box",
    _values("texts json list of strings, solutions"),
    _values("answers json list of strings; null where no box is complete"),
    r"content of the last \boxed{...} whose braces close, without blanks around it; braces may be nested",
    "DeepSeek-R1 2.2.2", "EleutherAI/lm-evaluation-harness#3353",
)  # fmt: skip
_topic(
    "pass_at_1",
    "pass@1 over n samples of a problem, from texts",
    _values(
        "texts json list of problems, each a list of solutions; numbers of samples may differ",
        "gold json list of strings, the answer of each problem; solutions box theirs, equal as strings if correct",
    ),
    _values("per_problem float[P] share of its samples that are correct", "mean float over problems"),
    "mean over problems of the mean over samples of 1[answer = gold]; a sample without an answer is wrong",
    "DeepSeek-R1 3 (evaluation setup)", "huggingface/lighteval#771", "huggingface/open-r1#655",
)  # fmt: skip
_topic(
    "cons_at_k",
    "Majority vote over the samples of a problem",
    _values(
        "answers json list of problems, each a list of strings, or null where no answer was found",
        "gold json list of strings",
        'ties string "share": the winners share the vote; "first": the answer that occurred first wins',
    ),
    _values("correct float[P] of each problem, 0 to 1", "mean float over problems"),
    "the most frequent answer against gold; null does not vote; no vote at all is wrong",
    "Self-consistency (arXiv 2203.11171)", "DeepSeek-R1 3 (cons@64)",
)  # fmt: skip

# ---- mixture of experts --------------------------------------------------------------------------------------------

_topic(
    "gate",
    "The gate of DeepSeek-V3: groups, biases for the choice only, renormalised weights",
    _values(
        "logits float[N,E] of the router", "bias float[E] of the choice; may be negative",
        "groups int number of groups of neighbouring experts", "kept_groups int groups a token may use",
        "top_k int experts per token", 'score string "sigmoid" (V3) or "softmax" (V2)',
        'group_score string "top2": sum of its two largest (V3); "max" (V2)',
        "normalise bool divide the weights by their sum", "scale float factor on the weights",
    ),
    _values("chosen bool[N,E] the experts", "weights float[N,E] of the chosen, 0 elsewhere"),
    "s = score(logits); z = s + bias; the groups with the largest group score of z; of their experts the top_k by z; "
    "weight = scale s / sum of s over the chosen",
    "DeepSeek-V3 2.1.2", "DeepSeek-V2 2.2.2", "deepseek-ai/DeepSeek-V3 inference/model.py",
)  # fmt: skip
_topic(
    "gate_replay",
    "Router replay: the sampler's experts, this pass's weights",
    _values(
        "logits float[N,E] of the router in the trainer", "chosen bool[N,E] by the sampler",
        'score string "sigmoid" or "softmax"', "normalise bool as in gate", "scale float as in gate",
        "cotangent float[N,E] d loss / d weights",
    ),
    _values("weights float[N,E] of the chosen, 0 elsewhere", "gradient float[N,E] d loss / d logits"),
    "weight = scale s / sum of s over the chosen, with gradient through s",
    "R3 (arXiv 2510.11370)", "DeepSeek-V3.2 3.1 (keep routing)",
)  # fmt: skip
_topic(
    "balance_update",
    "Balancing without a loss: the biases after a step",
    _values(
        "bias float[E] before the step",
        "counts int[R,E] tokens that each of R ranks or micro-batches sent to each expert during the step",
        "rate float gamma",
    ),
    _values("updated float[E] after the step"),
    "b + rate sign(mean(c) - c), c = sum of the counts over R; sign(0) = 0",
    "DeepSeek-V3 2.1.2", "Auxiliary-loss-free balancing (arXiv 2408.15664) algorithm 1",
)  # fmt: skip
_topic(
    "balance_loss",
    "The sequence-wise balance loss",
    _values(
        "logits float[S,T,E] of the router", "chosen bool[S,T,E] the experts of each token, the same number for all",
        "alpha float its weight", 'score string "sigmoid" or "softmax"',
    ),
    _values("loss float mean over sequences", "gradient float[S,T,E] d loss / d logits; none through the choice"),
    "alpha mean_s sum_i f_i P_i; f_i = E / (K T) #tokens that chose i; P_i = mean_t of s_i / sum_j s_j",
    "DeepSeek-V3 eq. 17-20",
)  # fmt: skip

# ---- rows and positions --------------------------------------------------------------------------------------------

_topic(
    "mtp_labels",
    "Labels of the main model and of the MTP modules over packed segments",
    _values(
        "tokens int[T] of a row", "segments int[T] sample that each belongs to, neighbours", "depth int MTP modules",
    ),
    _values(
        "labels int[depth+1,T] row 0 main model, row k module k; -100: none",
        "inputs int[depth+1,T] token whose embedding enters row k at each position; -100: none",
    ),
    "labels[k, i] = tokens[i + k + 1] and inputs[k, i] = tokens[i + k], where that token is of segment i",
    "DeepSeek-V3 2.2",
)  # fmt: skip
_topic(
    "packed_row",
    "Several samples in one row: positions, labels, who attends to whom",
    _values(
        "tokens int[T] of a row", "segments int[T] sample that each belongs to, neighbours",
        "trained bool[T] tokens that are to be predicted",
    ),
    _values(
        "positions int[T] from 0 in each sample", "labels int[T] at each position the next token, -100: none",
        "attends bool[T,T] query, key",
    ),
    "labels[i] = tokens[i + 1] if of the same segment and trained[i + 1]; attends[i, j] = j <= i and same segment",
    "DeepSeek-V3 5.1 (mutual masking)",
)  # fmt: skip
_topic(
    "yarn",
    "YaRN as in DeepSeek's models: frequencies, and where the temperature goes",
    _values(
        "dim int rotary dimensions", "base float theta", "factor float s", "original_length int before the extension",
        "beta_fast float rotations", "beta_slow float rotations", "mscale float of the tables",
        "mscale_all_dim float of the softmax; 0: none", "head_dim int of queries and keys, rotary part included",
    ),
    _values(
        "inv_freq float[dim/2] angles per position", "table_scale float factor on cos and sin",
        "softmax_scale float factor on q k",
    ),
    "c(n) = dim ln(L / (2 pi n)) / (2 ln base); ramp_j = clamp((j - floor c(fast)) / (ceil c(slow) - floor c(fast)), "
    "0, 1); f_j = base^(-2j/dim); inv_freq = f (1 - ramp) + f / s ramp; m(a) = 0.1 a ln s + 1; table_scale = m(mscale) "
    "/ m(mscale_all_dim); softmax_scale = head_dim^-0.5 m(mscale_all_dim)^2",
    "YaRN (arXiv 2309.00071) 3.2-3.4", "DeepSeek-V3 4.3", "deepseek-ai/DeepSeek-V3 inference/model.py",
)  # fmt: skip
_topic(
    "rope_scores",
    "Products of rotated queries and keys; the layout of the rotated vectors stays free",
    _values(
        "q float[T,D] queries", "k float[T,D] keys", "positions int[T] of both", "inv_freq float[D/2] angles",
        'pairs string "interleaved": (0, 1), (2, 3), ... (DeepSeek); "halves": (j, j + D/2) (Llama in transformers)',
    ),
    _values("scores float[T,T] rotated q_i times rotated k_j"),
    "each pair turns by position times inv_freq",
    "RoFormer (arXiv 2104.09864) 3.2", "deepseek-ai/DeepSeek-V3 inference/model.py",
)  # fmt: skip
_topic(
    "mla",
    "Multi-head latent attention, expanded or with absorbed matrices",
    _values(
        "x float[T,D] after the layer's norm", "segments int[T] sample of each token; positions start at 0 in each",
        "q_down float[Q,D] Q = 0: no query compression", "q_norm float[Q] gain",
        "q_up float[H(n+r),Q] or [H(n+r),D] without compression; per head n plain rows, then r rotary rows",
        "kv_down float[C+r,D] the latent, then the shared rotary key", "kv_norm float[C] gain",
        "kv_up float[H(n+v),C] per head n key rows, then v value rows", "out float[D,Hv] output projection",
        "heads int H", "nope int n", "rope int r, interleaved pairs", "value int v", "inv_freq float[r/2] angles",
        "softmax_scale float factor on q k", "eps float of the RMSNorms",
        'form string "expanded": keys and values per head; "absorbed": attention over the latents. Equal results',
    ),
    _values("output float[T,D] of the attention", "latent float[T,C] normalised: what the cache holds"),
    "c_Q = norm(q_down x); q = q_up c_Q; [c; k] = kv_down x; c_KV = norm(c); causal softmax(scale (q_n k_n + rot(q_r) "
    "rot(k))) v; absorbed: q_n k_n = (W_UK^T q_n) c_KV, v = W_UV (sum a c_KV)",
    "DeepSeek-V2 2.1", "DeepSeek-V3 2.1.1",
)  # fmt: skip

# ---- number formats ------------------------------------------------------------------------------------------------

_topic(
    "e4m3",
    "Rounding to E4M3 (the fn variant: no infinities)",
    _values("x float[N] numbers"),
    _values("values float[N] rounded", "codes int[N] the byte, 0 to 255"),
    "nearest, ties to even; subnormals are multiples of 2^-9; magnitudes above 448 saturate",
    "FP8 formats (arXiv 2209.05433) 3",
    tolerance=0.0,
)  # fmt: skip
_topic(
    "fp8_tiles",
    "Quantisation by tiles with E4M3",
    _values(
        "x float[M,K] matrix, float32 numbers", "tile_rows int rows of a tile", "tile_cols int columns of a tile",
        'scales string "exact": amax / 448; "power-of-two": the next power of two above or equal',
    ),
    _values("values float[M,K] quantised and multiplied back", "factors float[M/rows,K/cols] one per tile"),
    "values = factor e4m3(x / factor); a tile of zeros stays zero",
    "DeepSeek-V3 3.3.2",
)  # fmt: skip
_topic(
    "fp8_matmul",
    "A product of tile-quantised matrices, promoted after every 128 columns",
    _values("a float[M,K] in tiles of 1 x 128", "b float[N,K] in tiles of 128 x 128"),
    _values("product float[M,N] a b^T"),
    "sum over blocks j of 128 columns: factor_a[m, j] factor_b[n, j] <a_q, b_q>_j; exact factors, sums without loss",
    "DeepSeek-V3 3.3.2",
    tolerance=1e-4,
)  # fmt: skip
_topic(
    "e5m6",
    "Twelve-bit numbers, as V3 stores what attention leaves",
    _values("x float[N] numbers"),
    _values("values float[N] rounded"),
    "6 mantissa bits, 5 exponent bits with bias 15, nearest, ties to even, subnormals of 2^-20, saturating at 65024",
    "DeepSeek-V3 3.3.3; bias and special values are not published, float16's are taken",
    tolerance=0.0,
)  # fmt: skip

# ---- pipelines -----------------------------------------------------------------------------------------------------

_topic(
    "pipeline_table",
    "A pipeline schedule: complete, free of deadlock, as fast and as small as its paper says",
    _values(
        'schedule string "1f1b", "zb1p", "zbv", "dualpipe" or "dualpipev"', "ranks int processes",
        "micro_batches int in all",
    ),
    _values(
        "actions json for each rank its steps in order; a step is a list of one action, or of an overlapped forward "
        'and backward: [[kind, stage, micro_batch, lane], ...], kind "F", "B", "I" (gradient of inputs) or "W" (of '
        "weights). Give this one: the others follow from it, and only they are compared",
        "complete bool every micro-batch passes every stage once forward and once backward (B, or I and W)",
        "deadlock_free bool the ranks can run their lists",
        "makespan float F = I = W = 1, B = 2, an overlapped pair 3, no time for messages",
        "peak int[R] most micro-batches whose activations a rank holds: F takes, B or I gives back, in a pair F first",
    ),
    "F of stage s waits for F of s - 1; B or I of s for F of s and for B or I of s + 1; W for its I; a rank runs its "
    "list in order",
    "DeepSeek-V3 3.2.1", "Zero bubble (arXiv 2401.10241)", "ZB-V (arXiv 2405.15362)", "deepseek-ai/DualPipe",
)  # fmt: skip

# ---- texts and weights ---------------------------------------------------------------------------------------------

_topic(
    "chat_template",
    "Conversations as DeepSeek's models read them, with tools",
    _values(
        'model string "deepseek-v3" or "deepseek-r1"', "messages json OpenAI's form, with tool_calls and role tool",
        "add_generation_prompt bool end with the opening of an answer",
    ),
    _values("text string control tokens written out"),
    "the chat_template of tokenizer_config.json",
    "deepseek-ai/DeepSeek-V3 tokenizer_config.json", "deepseek-ai/DeepSeek-R1 tokenizer_config.json",
)  # fmt: skip
_topic(
    "lora_merge",
    "Low-rank updates merged into their matrix",
    _values(
        "weight float[O,I] frozen", "a float[R,I] first factor", "b float[O,R] second factor",
        "alpha float numerator of the scaling",
        'scaling string "rank": alpha / R (LoRA); "root": alpha / sqrt(R) (rsLoRA)',
    ),
    _values("merged float[O,I] what one matrix must hold"),
    "weight + scaling b a",
    "LoRA (arXiv 2106.09685) 4.1", "rsLoRA (arXiv 2312.03732)",
)  # fmt: skip
