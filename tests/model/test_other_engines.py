"""A saved directory in other programs: transformers and, from a GGUF file, llama.cpp generate our greedy tokens, and
the fields that vLLM and SGLang read are there (neither runs here).

Networks are random, with norm gains off 1 and negative routing biases, and every row of logits is spread wide, so that
equal tokens mean equal mathematics. `bench/llama_cpp.py` is the long form, with a trained model.
"""

import json

import pytest
import torch
from model_cases import V2, YARN, random_model, tiny
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from bessemer.addons.families import gguf_file
from bessemer.data import chat
from bessemer.data.chat import render_ids
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.hf import deepseek
from bessemer.model.config import PRESETS, preset

hf_logging.disable_progress_bar()
TEXTS = (
    "The quick brown fox's 3 jumps over 12345678 dogs, don't they?  \n\n  Yes.\r\n\tNo ",
    "用数字 3、7 和 25 得到 96。答案是（25 + 7）× 3！カタカナとひらがな한국어",
    "naïve café, e\u0301 a\u0308 ½ ² Ⅷ ٣ 1,234.56 👩‍👧 Ελληνικά עברית nbsp\u00a0on",
    "def f(x):\n    return f\"{x!r}\" if x >= 0 else '-' * 4  # TODO\n\n\nassert f(2) == '2'\n",
    "<think>Try 3*7=21.</think>\n<answer>3*7</answer> a<think>b<thinking>",
    "control tokens are text: <｜User｜>hi<｜Assistant｜><｜end▁of▁sentence｜>",
)
MESSAGES = [
    {"role": "user", "content": "3 and 7?"},
    {"role": "assistant", "content": "<think>10</think>ten"},
    {"role": "user", "content": "盛钢水"},
]
CASES = {
    "v3": {},
    "yarn": dict(**YARN | dict(max_seq_len=256), mscale=0.707, mscale_all_dim=0.707),
    "queries-not-compressed": dict(q_lora_rank=0, tie_embeddings=True),
    "v2": dict(**V2),
}
NEW_TOKENS = 40


@pytest.fixture(scope="module")
def words():
    return Tokenizer.train([text for text in TEXTS for _ in range(4)], 420, chat_style="r1")


def greedy(model, words, prompts, **options):
    groups = Engine(model, words).generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0, **options)
    return [row.tokens for (row,) in groups]


def telling(rows, words):
    """Asserts that the rows are informative, with many different tokens and both ways to end, and returns them."""
    assert len({token for tokens in rows for token in tokens}) > 30
    assert {tokens[-1] == words.eos_id for tokens in rows} == {True, False}
    return rows


@pytest.fixture
def saved(words, tmp_path):
    """Makes (model, its directory, prompts). The stop token trades places with one that some rows draw."""

    def make(mtp=False, **changes):
        model = random_model(tiny(vocab_size=words.vocab_size, **{"max_seq_len": 256, **changes}))
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(3, words.vocab_size, (n,), generator=generator).tolist() for n in (1, 2, 5, 17, 70)]
        prompts.append(render_ids(words, MESSAGES))
        drawn = [set(tokens) for tokens in greedy(model, words, prompts, stop_ids=[])]
        often = {token: sum(token in row for row in drawn) for token in sorted(set.union(*drawn))}
        stop = [words.eos_id, min(often, key=lambda token: abs(often[token] - len(drawn) / 2))]
        with torch.no_grad():
            model.head.weight[stop] = model.head.weight[stop[::-1]]
        words.save(tmp_path / "tokenizer")
        model.save(tmp_path / "model", tokenizer_dir=tmp_path / "tokenizer", mtp=mtp)
        return model, tmp_path / "model", prompts

    return make


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_transformers_generates_the_same_greedy_tokens(saved, words, changes):
    """Through the Auto classes; the chat prompt comes from the template in the directory, the stop token from
    generation_config.json."""
    model, directory, prompts = saved(**changes)
    reference = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"] == prompts[-1]
    for prompt, ours in zip(prompts, telling(greedy(model, words, prompts), words), strict=True):
        ids = torch.tensor([prompt])
        generated = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
            pad_token_id=words.pad_id,
        )  # fmt: skip
        assert generated[0, len(prompt) :].tolist() == list(ours)


@pytest.fixture
def peer():
    """Opens a GGUF file with llama.cpp, on one thread with an F32 cache."""
    library = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (pip builds llama.cpp)")

    def load(file):
        return library.Llama(
            str(file), n_ctx=256, n_batch=256, n_ubatch=256, n_threads=1, n_threads_batch=1, verbose=False,
            type_k=library.GGML_TYPE_F32, type_v=library.GGML_TYPE_F32,
        )  # fmt: skip

    return load


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_llama_cpp_generates_the_same_greedy_tokens(saved, words, peer, changes, tmp_path):
    model, directory, prompts = saved(**changes)
    gguf_file.write(directory, tmp_path / "model.gguf")
    reference = peer(tmp_path / "model.gguf")
    for prompt, ours in zip(prompts, telling(greedy(model, words, prompts), words), strict=True):
        reference.reset()
        stream = reference.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        assert [int(token) for _, token in zip(ours, stream, strict=False)] == ours


def test_llama_cpp_has_the_same_tokenizer_and_template(saved, words, peer, tmp_path):
    _, directory, prompts = saved()
    gguf_file.write(directory, tmp_path / "model.gguf")
    reference = peer(tmp_path / "model.gguf")
    for text in TEXTS:
        assert reference.tokenize(text.encode(), add_bos=False, special=False) == words.encode(text), text
    for number in range(3, words.vocab_size):
        expected = b"" if words.is_special(number) else words.token_bytes(number)
        assert reference.detokenize([number]) == expected, number
    assert (reference.token_bos(), reference.token_eos()) == (words.bos_id, words.eos_id)
    reply = reference.create_chat_completion(MESSAGES, temperature=0.0, max_tokens=4)
    assert reply["usage"]["prompt_tokens"] == len(prompts[-1])
    assert reference.input_ids[: len(prompts[-1])].tolist() == prompts[-1]


def test_what_vllm_and_sglang_read_from_the_configs(saved):
    """vllm/model_executor/models/deepseek_v2.py and model_arch_config_convertor.py, sglang/srt/configs/model_config.py
    and models/deepseek_v2.py. vLLM goes through transformers' config class, which has these attributes."""
    model, directory, _ = saved()
    raw = json.loads((directory / "config.json").read_text())
    for values in (raw, vars(AutoConfig.from_pretrained(directory))):
        assert values["architectures"] == ["DeepseekV3ForCausalLM"]
        # Without these two, neither loads routing biases, and vLLM uses a softmax.
        assert (values["topk_method"], values["scoring_func"]) == ("noaux_tc", "sigmoid")
        for key, expected in dict(
            n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5, n_routed_experts=12,
            num_experts_per_tok=3, n_shared_experts=1, first_k_dense_replace=1, moe_layer_freq=1, hidden_act="silu",
            q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12,
            num_key_value_heads=2, max_position_embeddings=256, num_nextn_predict_layers=0, tie_word_embeddings=False,
            bos_token_id=0, eos_token_id=1,
        ).items():  # fmt: skip
            assert values[key] == expected, key
        assert values["rope_parameters"]["rope_type"] == "default"
    assert raw["model_type"] == "deepseek_v3" and raw["torch_dtype"] == raw["dtype"] == "float32"
    assert raw["rope_theta"] == 10000.0 and raw["rope_scaling"] is None
    # Either would make an engine look elsewhere: at code of the repository, or at a head size that is not MLA's.
    assert "auto_map" not in raw and "head_dim" not in raw
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    assert model.cfg == deepseek.read_config(directory).model_copy(update={"n_mtp": 1})


def test_uncompressed_queries_and_yarn_are_spelled_as_engines_test_for_them(saved):
    """`q_lora_rank is not None` selects q_a_proj; any rope_scaling that is set is taken to be YaRN's."""
    _, directory, _ = saved(**CASES["yarn"], q_lora_rank=0)
    raw = json.loads((directory / "config.json").read_text())
    assert raw["q_lora_rank"] is None
    yarn = dict(factor=4.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0, mscale=0.707,
                mscale_all_dim=0.707)  # fmt: skip
    assert raw["rope_scaling"] == {"type": "yarn", **yarn}
    assert raw["rope_parameters"] == {"rope_type": "yarn", "rope_theta": 10000.0, **yarn}


def test_what_reasoning_parsers_and_chat_servers_read_from_the_tokenizer(saved, words):
    _, directory, _ = saved()
    raw = json.loads((directory / "tokenizer_config.json").read_text())
    assert raw["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in raw
    assert raw["chat_template"] == (directory / "chat_template.jinja").read_text() == words.chat_template
    # The template writes BOS itself.
    assert raw["add_bos_token"] is False
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # Parsers look the tags up in the vocabulary, and in text decoded without special tokens.
    vocabulary = tokenizer.get_vocab()
    assert [vocabulary[tag] for tag in (chat.THINK, chat.THINK_END)] == [words.think_id, words.think_end_id]
    thought = "<think>2</think>2"
    assert tokenizer.decode(tokenizer.encode(thought), skip_special_tokens=True) == thought


def test_a_draft_layer_holds_what_engines_load_for_speculation(saved):
    """vLLM's deepseek_mtp and SGLang's NextN take layer n_layers with its own copies of embedding and head."""
    model, directory, _ = saved(mtp=True)
    stored = load_file(directory / "model.safetensors")
    for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens"):
        assert f"model.layers.{model.cfg.n_layers}.{name}.weight" in stored
    assert json.loads((directory / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_the_servable_preset_fits_the_kernels():
    """MLA kernels take a latent of 512 and 64 rotary dimensions; with VLLM_MLA_DISABLE=1 attention kernels need head
    widths that are multiples of 8 and at most 256."""
    cfg = preset("servable")
    assert (cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.qk_nope_head_dim, cfg.v_head_dim) == (512, 64, 128, 128)
    assert cfg.n_heads % 16 == 0
    for name in PRESETS:
        assert preset(name).qk_head_dim % 8 == 0 and preset(name).qk_head_dim <= 256
        assert preset(name).v_head_dim <= preset(name).qk_head_dim
