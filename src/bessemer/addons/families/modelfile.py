"""The Modelfile of a GGUF file, from which `ollama create` makes a model: template, stop tokens, sampling, context.

Ollama's templates are Go's text/template over `.System` (all system messages, joined by a blank line) and `.Messages`
(its `template/template.go` and `thinking/template.go`, 2026). With the thoughts in `.Thinking`, where its parser puts
them, they give the text of `data/chat`; with thinking switched off, that of our server. Three differences remain:

- A conversation that ends with the assistant is left open, for the model to continue it.
- In the style `zero`, a user's line that begins with `User:` gets no blank in front: this dialect cannot replace text.
- Ollama joins consecutive messages of the same role with a blank line.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bessemer.addons.families.conversion import replacing_file
from bessemer.data import chat
from bessemer.data.model_files import AGAIN, read_object, read_text
from bessemer.errors import UserError

SUFFIX = ".Modelfile"
MOST_CONTEXT = 32_768
"""Upper limit in tokens: Ollama reserves memory for the whole context when it loads a model."""
_RANGE = "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
_ASKED = '{{ if and $last (ne .Role "assistant") }}'
_ENDED = f"{{{{ if not $last }}}}{chat.EOS}{{{{ end }}}}"
_R1 = (
    f'{{{{ .System }}}}{_RANGE}{{{{ if eq .Role "user" }}}}{chat.USER}{{{{ .Content }}}}'
    f'{{{{ else if eq .Role "assistant" }}}}{chat.ASSISTANT}'
    f"{{{{ if and $last .Thinking }}}}{chat.THINK}\n{{{{ .Thinking }}}}{chat.THINK_END}\n\n{{{{ end }}}}"
    f"{{{{ .Content }}}}{_ENDED}{{{{ end }}}}"
    f"{_ASKED}{chat.ASSISTANT}{chat.THINK}\n"
    f"{{{{ if and $.IsThinkSet (not $.Think) }}}}\n{chat.THINK_END}\n\n{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
)
_BLANK = (
    f"{{{{ if lt (len .Content) {len(chat.THINK)} }}}} "
    f'{{{{ else if ne (slice .Content 0 {len(chat.THINK)}) "{chat.THINK}" }}}} {{{{ end }}}}'
)
"""What separates `Assistant:` from an answer, unless the answer begins with a thought."""
_ZERO = (
    f'{_RANGE}{{{{ if eq .Role "user" }}}}User: {{{{ .Content }}}}\n'
    f'{{{{ else if eq .Role "assistant" }}}}Assistant:{_BLANK}{{{{ .Content }}}}{_ENDED}{{{{ end }}}}'
    f"{_ASKED}Assistant:{{{{ end }}}}{{{{ end }}}}"
)
_SYSTEM = {
    "zero": "{{ if .System }}{{ .System }}\n{{ end }}",
    "r1-zero": f"{{{{ if .System }}}}{{{{ .System }}}}{{{{ else }}}}{chat.ZERO_PREAMBLE}{{{{ end }}}}\n",
}


def style_of(directory: Path) -> str | None:
    """The `data/chat` style of a model directory; None if its template is of another kind or missing."""
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return chat.style_of(read_text(jinja))
    return chat.style_of(read_object(directory / "tokenizer_config.json").get("chat_template"))


def template(style: str, bos: str = chat.BOS) -> str:
    """Ollama's template for a style of `data/chat`; `bos`: the text in front, which the runner does not add itself."""
    return bos + (_R1 if style == "r1" else _SYSTEM[style] + _ZERO)


def path_of(file: Path) -> Path:
    """Next to the GGUF file and named after it, so that other models in the folder have their own."""
    if file.suffix == SUFFIX:
        raise UserError(f"{file} would be the name of the Modelfile beside the GGUF file; name the latter NAME.gguf")
    return file.with_suffix(SUFFIX)


def command(file: Path) -> str:
    """What a shell runs to make Ollama's model of a GGUF file."""
    return shlex.join(["ollama", "create", file.stem, "-f", str(path_of(file))])


def write(directory: str | Path, file: str | Path) -> Path:
    """Writes the Modelfile of `file`, which was made from the model `directory`, and returns its path."""
    target = path_of(Path(file))
    with replacing_file(target) as fresh, damage_named(Path(directory)):
        fresh.write_text(text(Path(directory), Path(file).name), "utf-8")
    return target


@contextmanager
def damage_named(directory: Path) -> Iterator[None]:
    """Turns what anybody's JSON of the wrong shape raises into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{directory}: tokenizer.json, tokenizer_config.json or generation_config.json is damaged "
            f"({type(error).__name__}: {error}); {AGAIN}"
        ) from error


def text(directory: Path, name: str) -> str:
    """The text of the Modelfile for a file `name` in the same folder."""
    if not name.isprintable():
        raise UserError(f"{name!r} has characters that a Modelfile cannot hold; choose a plainer file name")
    config, style = read_object(directory / "tokenizer_config.json"), style_of(directory)
    lines = [f"# {command(Path(name))}", f"FROM ./{name}"]
    if style is None:
        lines.append("# The chat template is not one of Bessemer's. Ollama looks for one like it among its own.")
    else:
        lines.append(f'TEMPLATE """{template(style, "" if config.get("add_bos_token") else chat.BOS)}"""')
    lines += [f"PARAMETER {name} {value}" for name, value in _parameters(directory, config)]
    return "\n".join(lines) + "\n"


def _parameters(directory: Path, config: dict[str, Any]) -> list[tuple[str, str]]:
    """What generation_config.json recommends; Ollama's own defaults, which truncate and penalise, are switched off."""
    path = directory / "generation_config.json"
    advised = read_object(path) if path.is_file() else {}
    end = config.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    added = {token["id"]: token["content"] for token in read_object(directory / "tokenizer.json")["added_tokens"]}
    ids = advised.get("eos_token_id")
    ends = dict.fromkeys([end, *(added.get(token_id) for token_id in (ids if isinstance(ids, list) else [ids]))])
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    sampling |= {key: advised[key] for key in sampling if isinstance(advised.get(key), int | float)}
    if advised.get("do_sample") is False:
        sampling["temperature"] = 0.0
    sampling["repeat_penalty"] = sampling.pop("repetition_penalty") or 1.0
    context = read_object(directory / "config.json").get("max_position_embeddings")
    values = sampling | ({"num_ctx": min(context, MOST_CONTEXT)} if isinstance(context, int) else {})
    stops = [("stop", f'"{end}"') for end in ends if end]  # a Modelfile has no escapes
    return stops + [(key, f"{value:g}" if isinstance(value, float) else str(value)) for key, value in values.items()]
