"""Prefill on a CPU: tokens a second of the engine's kernel and of the model's own forward, on one core.

    python bench/prefill.py [--lengths 512 2048 8192 16384] [--preset small]

Processor time; random weights, one prompt of random tokens, float32. The forward computes no logits.
"""

from __future__ import annotations

import argparse
import time

import torch

from bessemer.addons.accelerate.kernel_steps import KernelSteps
from bessemer.engine.steps import PrefillChunk
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 16384])
    parser.add_argument("--preset", default="small")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = Transformer(preset(args.preset, max_seq_len=max(args.lengths), n_mtp=0)).initialise(0).eval()
    steps = KernelSteps.of(model)
    assert steps is not None, "no kernel for this machine"
    with torch.inference_mode():
        for length in args.lengths:
            ids_1T = torch.randint(2, 4000, (1, length), generator=torch.Generator().manual_seed(0))
            cache = steps.new_cache()
            prompt = cache.open(ids_1T[0].tolist())
            cache.extend(prompt, length)
            began, before = time.process_time(), int(steps.attention_products)
            steps.prefill(cache, [PrefillChunk(prompt, length)])
            engine, products = time.process_time() - began, int(steps.attention_products) - before
            began = time.process_time()
            model.hidden(ids_1T)
            forward = time.process_time() - began
            print(
                f"{length} tokens: engine {length / engine:.0f} tok/s, {products / 1e9:.1f} * 10^9 attention products; "
                f"forward {length / forward:.0f} tok/s"
            )


if __name__ == "__main__":
    main()
