"""TRL: the weight of its correction for vLLM at the level of a sequence, read as a ratio of whole completions.

trl#5814 expects the mean of the log-ratios here, as in GSPO; TRL takes their sum. The topic `importance_weights` of
trl_adapter.py names the sum.
"""

import trl_adapter


def sequence_ratio(logprobs, old_logprobs, mask):
    weights = trl_adapter.importance_weights(logprobs, old_logprobs, mask, "sequence-truncate", 1e9)["weights"]
    return {"ratio": weights.max(1).values}
