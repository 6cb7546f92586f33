"""GGUF files as Hugging Face directories: quantised weights become plain numbers, once, on import.

transformers reads the file (the `gguf` package undoes the quantisation); what comes out is an ordinary model whose
weights happen to lie on the grid of the quantisation.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path

import torch

from bessemer.errors import UserError
from bessemer.hf.causal_lm import CausalLM, library, tried


def read_gguf(file: Path, tokenizer_dir: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    """The model of a GGUF file in `dtype`; its tokenizer and chat template are written to `tokenizer_dir`."""
    transformers = library()
    options = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        with redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
            inner = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    except ImportError as error:
        raise UserError(f"{file.name}: GGUF files need more packages ({error}): pip install 'bessemer[hf]'") from None
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise UserError(f"{file}: transformers does not read this GGUF file ({error}); take safetensors") from error
    tokenizer.save_pretrained(tokenizer_dir)
    # The weights are plain by now, but the model still calls itself quantised and would not be saved.
    config = inner.config
    del config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(inner.state_dict())
    plain.generation_config = inner.generation_config
    return tried(CausalLM(plain), str(file))
