"""GGUF files against the model they came from; only the `gguf` package writes them."""

import gguf
import numpy as np
import pytest
import torch
from hf_cases import made, relative, tokens

from bessemer.addons.families import causal_lm
from bessemer.addons.families.gguf_file import read_gguf
from bessemer.data import chat
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer

CONTROLS = ["<|text|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = [*CONTROLS, *map(chr, range(33, 96)), *"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ċ", "ab", "cd"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def interleaved(weight, heads):
    """llama.cpp keeps the two halves of each rotary pair next to each other."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(model, path, quantise):
    """Writes what llama.cpp's converter writes; `quantise`: the layers' matrices in Q8_0."""
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * 3 + [1] * (len(VOCABULARY) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    for name, tensor in model.state_dict().items():
        value = tensor.numpy()
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            rest = rest.removesuffix(".weight")
            heads = {"self_attn.q_proj": c.num_attention_heads, "self_attn.k_proj": c.num_key_value_heads}.get(rest)
            value = value if heads is None else interleaved(value, heads)
            target = f"blk.{layer}.{names[rest]}.weight"
        else:
            target = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
                      "lm_head.weight": "output.weight"}[name]  # fmt: skip
        value = np.ascontiguousarray(value, dtype=np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if quantise and value.ndim == 2 and "blk" in target else None
        writer.add_tensor(target, value if kind is None else gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def original():
    return made("llama", vocab_size=len(VOCABULARY), hidden_size=64, intermediate_size=64)


@pytest.mark.parametrize(("quantise", "bound"), [(False, 1e-6), (True, 0.05)])
def test_a_gguf_file_becomes_a_plain_directory(original, quantise, bound, tmp_path):
    file = write(original, tmp_path / "tiny.gguf", quantise)
    model = read_gguf(file, tmp_path / "tokenizer")
    model.save(tmp_path / "model", tokenizer_dir=tmp_path / "tokenizer")
    again, tok = causal_lm.load(tmp_path / "model"), load_tokenizer(tmp_path / "model")
    ids = tokens(2, 9)
    assert torch.equal(again(ids), model(ids)) and again.embed.weight.dtype == torch.float32
    assert relative(model(ids), original(input_ids=ids).logits) < bound
    question = chat.question_ids(tok, "abcd")
    text = "<|im_start|>user\nabcd<|im_end|>\n<|im_start|>assistant\n"
    assert tok.decode(question, skip_special=False) == text and question.count(tok.special_id("<|im_start|>")) == 2
    assert tok.eos_id == 2 and tok.bos_id is None


def test_bfloat16_on_request(original, tmp_path):
    model = read_gguf(write(original, tmp_path / "tiny.gguf", False), tmp_path / "tokenizer", torch.bfloat16)
    model.save(tmp_path / "model", tokenizer_dir=tmp_path / "tokenizer")
    assert causal_lm.load(tmp_path / "model").embed.weight.dtype == torch.bfloat16


def test_files_other_than_gguf_are_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(UserError, match="cannot read this GGUF"):
        read_gguf(tmp_path / "x.gguf", tmp_path / "tokenizer")
