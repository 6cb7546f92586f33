"""llama.cpp as a side of `bessemer drift`: its own graph computes all ids at once, and tells the name of every tensor
before and after it is computed, so those of each layer are read by name.

Run with llama-cpp-python 0.3.36 (`bessemer[llama]`), which reaches the callback by ctypes. Cache and activations are
float32, attention is not fused; the weights are in the format that is compared.
"""

from __future__ import annotations

import ctypes
import tempfile
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bessemer.addons.evals.drift_measure import CHUNK, LayerPart
from bessemer.addons.evals.drift_sides import Take
from bessemer.addons.families import gguf_file
from bessemer.errors import UserError

PARTS = {
    "attn_out": "attention", "ffn_inp": "after attention", "ffn_moe_argsort": "router", "ffn_out": "MLP",
    "l_out": "residual stream", "embd": "embedding", "result_norm": "final norm", "result_output": "log-probs",
}  # fmt: skip
"""Its names, which end with "-" and the layer inside one. An argsort has all experts, the chosen ones first."""
HEADS = "kqv_out"
"""The heads' outputs. The product with the output matrix comes next, and not every architecture names it."""


class LlamaCpp:
    """Holds the model of a directory of our family, or of a GGUF file."""

    def __init__(self, source: Path, dtype: torch.dtype, n: int):
        """n: ids of the row."""
        try:
            import llama_cpp
        except ImportError:
            raise UserError("--between llama.cpp needs llama-cpp-python: pip install 'bessemer[llama]'") from None
        self.cpp, self.ggml, self.n, self.messages = llama_cpp, _tensors(), max(2, n), _messages()[0]
        with tempfile.TemporaryDirectory() as folder:
            file = source
            if source.is_dir():
                file = Path(folder) / "model.gguf"
                gguf_file.write(source, file, dtype)
            options = llama_cpp.llama_model_default_params()
            options.use_mmap, options.n_gpu_layers = False, 0
            self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        if not self.model:
            raise UserError(f"{source}: llama.cpp does not load it: {self._complaint()}")
        weakref.finalize(self, llama_cpp.llama_model_free, self.model)
        vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.sizes = vocab, llama_cpp.llama_model_n_embd(self.model), llama_cpp.llama_model_n_layer(self.model)
        self.longest = llama_cpp.llama_model_n_ctx_train(self.model)
        self.active = int(self._fact(self._fact("general.architecture") + ".expert_used_count") or 0)
        self.named = False
        """Whether the graph names attention's output."""
        self.points = frozenset(self._decode([0, 1], None))

    def _complaint(self) -> str:
        return "".join(self.messages[-2:]).strip()

    def _fact(self, key: str) -> str:
        """A value of the file's header; empty if there is none."""
        buffer = ctypes.create_string_buffer(256)
        self.cpp.llama_model_meta_val_str(self.model, key.encode(), buffer, len(buffer))
        return buffer.value.decode()

    def run(self, ids: Sequence[int], take: Take) -> None:
        self._decode(ids, take)

    def _decode(self, ids: Sequence[int], take: Take | None) -> list[LayerPart]:
        """The points of the graph. take: who receives what is computed there; None: nothing is read."""
        self.ids, self.take, self.passed = ids, take, list[LayerPart]()
        self.point: LayerPart | None = None
        self.heads: int | None = None
        """The layer whose heads were the tensor before."""
        self.error: BaseException | None = None
        callback = self.cpp.ggml_backend_sched_eval_callback(self._computed)
        options = self.cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = self.n
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.type_k = options.type_v = self.cpp.GGML_TYPE_F32
        options.flash_attn_type, options.cb_eval = self.cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED, callback
        context = self.cpp.llama_init_from_model(self.model, options)
        if not context:
            raise UserError(f"llama.cpp has no memory for {self.n} ids: {self._complaint()}")
        batch = self.cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
                batch.logits[i] = 1
            status = self.cpp.llama_decode(context, batch)
        finally:
            self.cpp.llama_batch_free(batch)
            self.cpp.llama_free(context)
        if self.error is not None:
            raise self.error
        if status:
            raise UserError(f"llama.cpp cannot compute these ids: {self._complaint()}")
        return self.passed

    def _computed(self, tensor: Any, ask: bool, _: Any) -> bool:
        """llama.cpp calls it before it computes a tensor, to know if it is wanted, and after it has. ctypes drops
        exceptions, so they wait for the end of the pass."""
        try:
            if self.error is not None:
                return False
            if ask:
                self.point = self._point_of(self.ggml.ggml_get_name(tensor).decode())
                self.passed += [] if self.point is None else [self.point]
                return self.point is not None and self.take is not None
            assert self.point is not None and self.take is not None
            kind = torch.int32 if self.point.part == "router" else torch.float32
            self._give(self.point, self._read(tensor, kind), self.take)
        except BaseException as error:
            self.error = error
        return self.error is None

    def _point_of(self, full: str) -> LayerPart | None:
        name, _, number = full.partition("-")
        before, self.heads = self.heads, int(number) if name == HEADS else None
        self.named |= name == "attn_out"
        if (part := PARTS.get(name)) is not None:
            return LayerPart(int(number) if number else -1 if part == "embedding" else self.sizes[2], part)
        return None if before is None or self.named else LayerPart(before, "attention")

    def _read(self, tensor: Any, dtype: torch.dtype) -> Tensor:
        """[N, D]"""
        rows, size = self.ggml.ggml_nrows(tensor), self.ggml.ggml_nbytes(tensor)
        read = torch.empty(rows, self.ggml.ggml_nelements(tensor) // rows, dtype=dtype)
        assert self.ggml.ggml_is_contiguous(tensor) and size == read.numel() * read.element_size(), "unknown layout"
        self.ggml.ggml_backend_tensor_get(tensor, read.data_ptr(), 0, size)
        return read

    def _give(self, point: LayerPart, rows_ND: Tensor, take: Take) -> None:
        if point.part == "router":
            rows_ND = rows_ND[:, : self.active]
        if point.part != "log-probs":
            take(point, 0, rows_ND)
            return
        target_N1 = torch.tensor(self.ids[1:])[:, None]
        pairs = zip(rows_ND[:-1].split(CHUNK), target_N1.split(CHUNK), strict=True)
        take(point, 1, torch.cat([logits.log_softmax(-1).gather(1, target) for logits, target in pairs]))


@cache
def _tensors() -> Any:
    """The functions that read a tensor."""
    from llama_cpp._ggml import libggml

    for name, result in (
        ("ggml_get_name", ctypes.c_char_p), ("ggml_nelements", ctypes.c_int64), ("ggml_nrows", ctypes.c_int64),
        ("ggml_nbytes", ctypes.c_size_t), ("ggml_is_contiguous", ctypes.c_bool), ("ggml_backend_tensor_get", None),
    ):  # fmt: skip
        function = getattr(libggml, name)
        function.argtypes, function.restype = [ctypes.c_void_p], result
    libggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2
    return libggml


@cache
def _messages() -> tuple[list[str], Any]:
    """What llama.cpp says from now on instead of printing it, and the callback, which must stay alive."""
    import llama_cpp

    said: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda _, text, __: said.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    return said, callback
