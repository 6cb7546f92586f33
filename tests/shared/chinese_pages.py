"""What a Chinese reader would see in English on a page."""

from __future__ import annotations

import html
import json
import re

from bessemer.addons.watch import chinese

WORD = re.compile(r"[A-Za-z]{2}[A-Za-z0-9]*")
TERMS = {*WORD.findall("""
    AdamW BF16 BPE Bessemer CPU DeepEP DeepSeek DeepSeekMoE DualPipe E4M3 E5M6 FIM FP8 FP32 GB GPU GRPO GiB KL KiB
    MB MFU MLA MTP MaxVio MiB NCCL PSM RL RoPE SFT SGLang SHA Sigmoid TB YaRN ZeRO Zero adamw alpha bessemer beta
    bfloat16 cons dualpipe epoch float32 fp8 gamma gloo gram grpo lambda ln maj muon nat pass profile rank sigmoid
    sqrt theta tiny top torch vLLM Math Nature User Assistant auto exchange all
""")}  # fmt: skip
"""Words that are the same in Chinese: names of methods, formats, papers and programs."""
NAMED = re.compile(r"\S*[/_]\S*|\w+\.(?:jsonl?|toml|md|py)")
"""Paths, metrics and files."""


def untranslated(page: str, *names: str) -> list[str]:
    """The texts of a page that hold an English word in Chinese, too, except TERMS and the words of `names`."""
    carried = re.search(r'<main data-zh="([^"]*)"', page)
    assert carried, "the page carries no Chinese"
    words = json.loads(html.unescape(carried[1]))
    kept = TERMS | {word for name in names for word in WORD.findall(name)}
    shown = {text: NAMED.sub("", words.get(text, text)) for text in chinese.texts_of(page)}
    return [text for text, said in shown.items() if set(WORD.findall(said)) - kept or " %" in said]
