"""Small tokenizer directories as other models have them, generated here: byte-level and SentencePiece-like."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = ["What is 12*3+4? The answer is 40.", "<think>first, 12*3=36</think> yes\n\nuser assistant", "é 漢字 ok"] * 9
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nbe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|head|>' + message['role'] + '<|tail|>\n\n' + message['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
R1_DISTILLED = (  # opens the thoughts in the prompt, drops them from every answer
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|head|>' + message['content'].split('</think>')[-1] + '<|eot|>' }}{% else %}"
    "{{ '<|tail|>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|><think>\n' }}{% endif %}"
)
KEEPS_THOUGHTS = R1_DISTILLED.replace(".split('</think>')[-1]", "")


def write(directory, tok, template, **names):
    directory.mkdir(parents=True, exist_ok=True)
    tok.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names} | ({"chat_template": template} if template else {})
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


CONTROLS = ("<|im_start|>", "<|im_end|>", "<|text|>")


def byte_level(directory, template=CHATML, controls=CONTROLS, bos=None, size=400, tags=False, **names):
    """As in GPT-2, Qwen and Llama 3; with `bos`, the tokenizer itself puts that token before every text. `tags`: those
    of thoughts are tokens."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=size, special_tokens=list(controls), initial_alphabet=alphabet)
    )
    if tags:
        tok.add_tokens(["<think>", "</think>"])
    if bos:
        tok.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tok.token_to_id(bos))]
        )
    return write(directory, tok, template, **(names or {"eos_token": controls[1], "pad_token": controls[1]}))


def llama3(directory, template=LLAMA3, tags=False):
    controls = ("<|begin|>", "<|end|>", "<|head|>", "<|tail|>", "<|eot|>")
    return byte_level(directory, template, controls, "<|begin|>", tags=tags, bos_token="<|begin|>", eos_token="<|end|>")


def full_size(directory, controls, template, bos=None, **names):
    """128,000 entries, then control tokens, as in Llama 3 and DeepSeek-V3; no merge leads to most entries."""
    byte_level(directory, None, controls=("<|text|>",), eos_token="<|text|>")
    spec = json.loads((directory / "tokenizer.json").read_text())
    vocab, alphabet = spec["model"]["vocab"], sorted(pre_tokenizers.ByteLevel.alphabet())
    fresh = (a + b + c for a in alphabet[:8] for b in alphabet for c in alphabet if a + b + c not in vocab)
    vocab |= {token: i for i, token in zip(range(len(vocab), 128_000), fresh, strict=False)}
    tok = Tokenizer.from_str(json.dumps(spec))
    tok.add_special_tokens(list(controls))
    tok.add_special_tokens([f"<|reserved_{n}|>" for n in range(1280 - len(controls))])
    if bos:
        pair = (bos, tok.token_to_id(bos))
        tok.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[pair])
    return write(directory, tok, template, **names)


def sentencepiece(directory, template=MISTRAL, scheme="first"):
    """As in Llama 2 and Mistral: ▁ for a space, bytes for rare characters, a space before the very first piece (first)
    or every one (always, prepend)."""
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "prepend":
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True)
    else:
        tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=True)
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    controls = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tok.train_from_iterator(
        [text for text in TEXTS if text.isascii()],
        trainers.BpeTrainer(vocab_size=360, special_tokens=controls, show_progress=False),
    )
    spec = json.loads(tok.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in ("<unk>", "<s>", "</s>")]
    tok = Tokenizer.from_str(json.dumps(spec))
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return write(directory, tok, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def words(directory):
    """A word-level tokenizer, which is neither kind."""
    tok = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    tok.pre_tokenizer, tok.normalizer = pre_tokenizers.Whitespace(), normalizers.NFC()
    tok.add_special_tokens([AddedToken("</s>", special=True)])
    return write(directory, tok, CHATML, eos_token="</s>")
