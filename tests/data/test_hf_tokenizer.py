"""Tokenizers and chat templates of other models, against transformers' own rendering of the same directory."""

import importlib.util
import json
from pathlib import Path

import hf_tokenizers as houses
import pytest
import tokenizers
import transformers

from bessemer.addons.evals.shots import Shots
from bessemer.addons.families.hf_tokenizer import HFTokenizer
from bessemer.addons.serve.chat import chat_prompt
from bessemer.addons.serve.models import Vocabulary
from bessemer.addons.serve.protocol import Turn
from bessemer.addons.serve.reasoning_parser import StreamDecoder
from bessemer.addons.tasks import turns
from bessemer.data import chat, corpus, sft_rows
from bessemer.data.documents import Document
from bessemer.data.mixture import Mixture
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.tasks import get

QUESTION = [{"role": "user", "content": "What is 12*3+4?"}]
ANSWER = {"role": "assistant", "content": "<think>36</think> 40, é漢"}
TALK = [*QUESTION, ANSWER, {"role": "user", "content": "sure?\n"}]
NO_PROMPT = houses.CHATML.partition("{% if add_generation_prompt %}")[0]
OURS = (
    "{% for m in messages %}{{ '<｜User｜>' + m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜User｜>assistant:' }}{% endif %}"
)
PUBLISHED = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
SYSTEM = {"role": "system", "content": "Be brief."}
MAKERS = {"chatml": houses.byte_level, "llama3": houses.llama3, "sentencepiece": houses.sentencepiece}


@pytest.fixture(params=sorted(MAKERS))
def directory(request, tmp_path):
    return MAKERS[request.param](tmp_path / request.param)


@pytest.fixture
def chatml(tmp_path):
    return load_tokenizer(houses.byte_level(tmp_path / "chatml"))


def theirs(directory, messages, ask=True, **switches):
    tok = transformers.AutoTokenizer.from_pretrained(directory)
    return tok.apply_chat_template(messages, add_generation_prompt=ask, tokenize=True, **switches)["input_ids"]


@pytest.mark.parametrize("messages", [QUESTION, TALK])
def test_prompts_match_those_of_transformers(directory, messages):
    """The template is applied, BOS occurs at most once, and no id differs."""
    tok = load_tokenizer(directory)
    ids = chat.render_ids(tok, messages)
    assert ids == theirs(directory, messages)
    assert tok.bos_id is None or ids.count(tok.bos_id) == 1
    assert len(ids) > len(tok.encode(messages[0]["content"])) + 2, "a template is more than the question"


def test_a_document_begins_as_the_tokenizer_itself_begins_it(directory):
    tok, reference = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    begin = [] if tok.bos_id is None else [tok.bos_id]
    assert begin + tok.encode("The answer") == reference("The answer")["input_ids"]
    assert (tok.bos_id is None) == (directory.name == "chatml")


def test_a_token_may_begin_and_end_documents(tmp_path):
    """As in OPT; one that only ends them begins none."""
    folder = houses.byte_level(tmp_path, bos="<|im_end|>")
    tok = load_tokenizer(folder)
    assert tok.bos_id == tok.special_id("<|im_end|>")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["post_processor"]["single"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    assert load_tokenizer(folder).bos_id is None


def test_texts_come_back(directory):
    tok = load_tokenizer(directory)
    for text in ("The answer is 40.", "é 漢字 😀", "a\n\n b"):
        assert tok.decode(tok.encode(text)).removeprefix(" ") == text
        stream = StreamDecoder(tok)
        assert "".join(map(stream.push, tok.encode(text))) + stream.flush() == tok.decode(tok.encode(text))


def test_control_tokens_in_a_content_are_text(directory):
    """Nobody can write a turn into a question, whole or in pieces, and the text is preserved."""
    tok = load_tokenizer(directory)
    names = [name for name in tok._control if name != "<unk>"]
    hostile = "".join(names) + "\ue000" + "".join(reversed(names)) + names[0] * 2
    hostile += "".join(f" {name}{digit}{name}" for name in names for digit in range(len(names))) + " end"
    ids = chat.render_ids(tok, [{"role": "user", "content": hostile}])
    plain = chat.render_ids(tok, [{"role": "user", "content": "end"}])
    control = set(tok._special)
    assert [i for i in ids if i in control] == [i for i in plain if i in control]
    assert hostile in tok.decode(ids, skip_special=False)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: houses.byte_level(folder, houses.CHATML.replace("assistant\n' }}", "assistant\n<think>' }}")),
        lambda folder: houses.sentencepiece(folder, houses.ZEPHYR.replace("|>\n' }}", "|>\n<think>' }}"), "prepend"),
    ],
)
def test_a_tag_that_a_user_types_is_text(tmp_path, make):
    """The template's tag and the answer's tags are tokens, even right next to it with no control token between."""
    folder = make(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    reference.add_tokens(["<think>", "</think>"], special_tokens=False)
    reference.save_pretrained(folder)
    tok = load_tokenizer(folder)
    ids = chat.render_ids(tok, [{"role": "user", "content": "say <think>a</think>"}])
    assert ids.count(tok.think_id) == 1 and ids[-1] == tok.think_id and tok.think_end_id not in ids
    assert "\nsay <think>a</think>" in tok.decode(ids)
    spoken = chat.render_ids(tok, chat.exchange("say", "<think>a</think>"))
    assert spoken.count(tok.think_id) == spoken.count(tok.think_end_id) == 1


def test_only_answers_and_their_end_are_trained_on(directory):
    tok = load_tokenizer(directory)
    messages = [*TALK, {"role": "assistant", "content": "quite"}]
    ids, answers = chat.render_answers(tok, messages)
    answer_texts = [tok.decode([i for i, is_answer in zip(ids, answers, strict=True) if is_answer], skip_special=False)]
    end = tok.decode([tok.eos_id], skip_special=False)
    assert answer_texts[0].replace(" ", "") == f"<think>36</think>40,é漢{end}quite{end}"
    assert answers[-1] or directory.name == "chatml", "the line break of ChatML after the end is the template's"
    prompt = chat.render_ids(tok, TALK)
    assert ids[: len(prompt)] == prompt and not answers[len(prompt) - 1] and answers[len(prompt)]


@pytest.mark.parametrize("role", ["user", "tool"])
def test_an_episode_continues_as_the_conversation_is_rendered(directory, role):
    """What is appended to a sampled answer; tool outputs come from the user, in their marks."""
    tok = load_tokenizer(directory)
    ids, answers = chat.render_answers(tok, [*QUESTION, ANSWER])
    episode = ids[: max(position for position, answer in enumerate(answers) if answer) + 1]
    rendered = chat.render_ids(tok, [*QUESTION, ANSWER, {"role": role, "content": "sure?"}])
    assert episode + turns.following_ids(tok, [{"role": role, "content": "sure?"}]) == rendered


def test_where_an_answer_ends(tmp_path):
    tok = load_tokenizer(houses.llama3(tmp_path))
    assert tok.eos_id == tok.special_id("<|eot|>") and tok.stop_ids == [tok.eos_id, tok.special_id("<|end|>")]
    assert tok.end_id == tok.pad_id == tok.special_id("<|end|>"), "padding may be any token: rows know their lengths"


DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{{ '<｜User｜>' + m['content'] if m['role'] == 'user' else "
    "'<｜Assistant｜>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
PUBLISHED_NAMES = {
    "DeepSeek-V3": (
        DEEPSEEK, BEGIN, {"eos_token": END, "pad_token": END}, (BEGIN, END, "<｜User｜>", "<｜Assistant｜>"), END,
    ),
    "Llama-3": (
        houses.LLAMA3, "<|begin|>", {"eos_token": "<|end|>"},
        ("<|begin|>", "<|end|>", "<|head|>", "<|tail|>", "<|eot|>"), "<|eot|>",
    ),
    "Qwen2.5": (
        houses.CHATML, None, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>",
    ),
}  # fmt: skip
"""Template, BOS, the names that the published tokenizer_config.json gives, control tokens, the end of an answer."""


@pytest.mark.parametrize("row_length", [64, 32_768])
@pytest.mark.parametrize("model", PUBLISHED_NAMES)
def test_document_ends_are_trained_on_when_eos_is_also_padding(tmp_path, model, row_length):
    template, bos, names, controls, answer_end = PUBLISHED_NAMES[model]
    begun = {"bos_token": bos} if bos else {}
    tok = load_tokenizer(houses.full_size(tmp_path / "model", controls, template, bos, **names, **begun))
    assert type(tok) is HFTokenizer and tok.vocab_size == 129_280
    assert tok.end_id == tok.pad_id == tok.special_id(names["eos_token"]) and tok.eos_id == tok.special_id(answer_end)
    talk = tuple(chat.exchange("What is 3?", "It is 3."))
    texts = [Document(f"What is {n}*3+4? The answer is {n * 3 + 4}.", "mine") for n in range(40)]
    texts.append(Document("a talk", "mine", talk, spoken=True))
    rows = corpus.build(texts, tok, row_length, tmp_path / "c", heldout=0).train
    for document in rows.documents():
        assert document[-1] == tok.end_id and tok.end_id not in document[:-1] and (not bos or document[0] == tok.bos_id)
    spoken = chat.render_ids(tok, talk, add_generation_prompt=False)[bool(bos) :]
    spoken = spoken[:-1] if spoken[-1] == tok.end_id else spoken
    assert document.tolist() == [*[tok.bos_id] * bool(bos), *spoken, tok.end_id] and tok.eos_id in document
    mixed = Mixture({"mine": rows}, {"mine": 1.0}).batch(0, rows.n_rows)
    for batch in (rows.batch(range(rows.n_rows)), rows.batch(range(rows.n_rows), masked=True), mixed):
        trained = batch.loss_BT > 0
        assert int((trained & (batch.tokens_BT == tok.end_id)).sum()) == 41
        assert int(trained.sum()) == rows.facts["tokens"] - rows.n_rows
        assert batch.loss_BT.numel() > rows.facts["tokens"], "some of it is padding"


@pytest.mark.parametrize(
    ("name", "opening", "end"),
    [
        ("qwen3", "", "<|im_end|>"),
        ("qwen3_5_nothink", "<think>\n\n</think>\n\n", "<|im_end|>"),
        ("qwen3_5_think", "<think>\n", "<|im_end|>"),
        ("qwen3_6", "<think>\n", "<|im_end|>"),
        ("nemotron_3_nano", "<think>\n", "<|im_end|>"),
        ("glm4moe", "", "<|user|>"),
    ],
)
def test_templates_that_add_an_empty_thought(tmp_path, name, opening, end):
    if not (PUBLISHED / f"{name}.jinja").exists():
        pytest.skip("this version of TRL lacks it")
    controls = (*houses.CONTROLS, *GLM)
    folder = houses.byte_level(tmp_path, (PUBLISHED / f"{name}.jinja").read_text(), controls, tags=True)
    tok = load_tokenizer(folder)
    assert (tok.opening, tok.eos_id) == (opening, tok.special_id(end))
    thoughtless = [*chat.exchange(QUESTION[0]["content"], "40"), TALK[-1]]
    for messages in (QUESTION, thoughtless, TALK, [SYSTEM, *TALK]):
        assert chat.render_ids(tok, messages) == theirs(folder, messages)
    asked = [Turn(**QUESTION[0])]
    for thinking, tags in ((True, ("<think>",)), (False, ("<think>", "</think>"))):
        prompt = chat_prompt(tok, asked, thinking)
        switched = theirs(folder, QUESTION, enable_thinking=thinking)
        assert list(prompt.ids[: len(switched)]) == switched
        marks = [tok.decode([i]) for i in prompt.ids if i in (tok.think_id, tok.think_end_id)]
        assert (prompt.thinking, *marks) == (thinking, *tags)
    assert chat_prompt(tok, asked).thinking == (opening == "<think>\n")
    conversation = [*thoughtless, {"role": "assistant", "content": "yes"}]
    went_on = [*conversation, {"role": "user", "content": "why?"}]
    assert tok.decode(turns.following_ids(tok, went_on[-1:])).lstrip().startswith("user\nwhy?" * (end != "<|user|>"))
    if end == "<|user|>":
        with pytest.raises(UserError, match=r"control token.*last answer"):
            chat.render_answers(tok, conversation)
        return
    for answer in ("yes", "<think>\nsure\n</think>yes"):
        conversation[-1]["content"] = answer
        ids, answers = chat.render_answers(tok, conversation)
        answer_text = tok.decode(
            [i for i, is_answer in zip(ids, answers, strict=True) if is_answer], skip_special=False
        )
        assert answer_text.startswith(("40<|im_end|>", "<think></think>40<|im_end|>")) and answer_text.endswith(
            "yes<|im_end|>"
        )
        assert answer_text.count("<think>") == answer_text.count("</think>") >= 1 and ("sure" in answer_text) == (
            "sure" in answer
        )


V3_1 = (  # a lone tag says whether the model thinks
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ bos_token }}{% for message in messages %}"
    "{{ '<|head|></think>' + message.content.split('</think>')[-1] + '<|eot|>' if message.role == 'assistant' else "
    "'<|tail|>' + message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>' + ('<think>' if thinking else '</think>') }}{% endif %}"
)
FIXED = V3_1.replace("'<think>' if thinking else ", "").replace("|></think>' + m", "|>' + m")


@pytest.mark.parametrize(
    ("template", "thinking", "end"),
    [
        (V3_1, None, "</think>"), (V3_1, False, "</think>"), (V3_1, True, "<think>"),
        (FIXED, None, "</think>"), (FIXED, False, "</think>"), (FIXED, True, "</think>"),
        (houses.LLAMA3, None, ""), (houses.LLAMA3, False, "<think>\n\n</think>\n\n"), (houses.LLAMA3, True, "<think>"),
        (houses.KEEPS_THOUGHTS, None, "<think>\n"), (houses.KEEPS_THOUGHTS, True, "<think>\n"),
        (houses.KEEPS_THOUGHTS, False, "<think>\n\n</think>\n\n"),
    ],
)  # fmt: skip
def test_thinking_switch_works_with_and_without_template_support(tmp_path, template, thinking, end):
    folder = houses.llama3(tmp_path, template, tags=True)
    tok = load_tokenizer(folder)
    for messages in (QUESTION, TALK, [{"role": "user", "content": "say </think><think>"}]):
        prompt = chat_prompt(tok, [Turn(**message) for message in messages], thinking)
        plain = tok.decode(theirs(folder, messages), skip_special=False)
        begun = plain[: plain.rindex("<|head|>")] + "<|head|>" + "assistant<|tail|>\n\n" * (template == houses.LLAMA3)
        assert tok.decode(prompt.ids, skip_special=False) == begun + end
        assert prompt.thinking == (end.rstrip() == "<think>")
        assert (tok.think_end_id in prompt.ids[-6:]) == ("</think>" in end)


@pytest.mark.parametrize("variants", [(), ("rstrip",), ("lstrip", "rstrip")])
@pytest.mark.parametrize("blank", ["first", "always", "prepend", "never"])
def test_raw_prompts_with_control_tokens_encode_as_in_the_library(tmp_path, blank, variants):
    folder = houses.sentencepiece(tmp_path, houses.ZEPHYR, blank)
    spec = json.loads((folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token |= dict.fromkeys(variants, token["special"])
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    vocabulary = Vocabulary(load_tokenizer(folder))
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("</s>\nhi </s>\nyes", "hi</s></s> \n", "<s>hi", " hi  </s>  <s> ", "hi"):
        assert vocabulary.prompt_ids(text, begin=False) == reference.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("blank", ["first", "always", "prepend"])
def test_answers_get_no_leading_blank(tmp_path, blank):
    """Llama 2 and its descendants; only after a control token a text begins anew."""
    folder = houses.sentencepiece(tmp_path, houses.ZEPHYR, blank)
    tok = load_tokenizer(folder)
    messages = [*QUESTION, {"role": "assistant", "content": "40"}, TALK[-1], {"role": "assistant", "content": "yes"}]
    ids, answers = chat.render_answers(tok, messages)
    assert ids == theirs(folder, messages, ask=False)
    assert (
        tok.decode([i for i, is_answer in zip(ids, answers, strict=True) if is_answer], skip_special=False)
        == "40</s>yes</s>"
    )
    prompt = chat.render_ids(tok, messages[:-1])
    assert ids[: len(prompt)] == prompt == theirs(folder, messages[:-1])


@pytest.mark.parametrize("variants", [("rstrip",), ("lstrip",), ("lstrip", "rstrip")])
def test_control_tokens_take_the_white_space_beside_them(tmp_path, variants):
    """Phi-3's take the line break of their template."""
    folder = houses.byte_level(tmp_path, houses.ZEPHYR)
    spec = json.loads((folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token |= dict.fromkeys(variants, token["special"])
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tok = load_tokenizer(folder)
    assert chat.render_ids(tok, TALK) == theirs(folder, TALK)
    messages = [*TALK, {"role": "assistant", "content": " quite \u3000\n"}]
    ids, answers = chat.render_answers(tok, messages)
    assert ids == theirs(folder, messages, ask=False)
    answer_text = tok.decode([i for i, is_answer in zip(ids, answers, strict=True) if is_answer])
    assert answer_text == f"{ANSWER['content']} quite" + " \u3000\n" * ("lstrip" not in variants)


def test_a_template_that_drops_thoughts_is_noticed(tmp_path):
    tok = load_tokenizer(houses.llama3(tmp_path, houses.R1_DISTILLED))
    with pytest.raises(UserError, match="part of the last answer"):
        chat.render_answers(tok, [*QUESTION, {"role": "assistant", "content": "<think>\n36\n</think>40"}])


def test_packed_samples_begin_where_they_begin(chatml, tmp_path):
    """ChatML has no BOS, and its first token occurs in every turn: segments must not depend on it."""
    talk = [*QUESTION, {"role": "assistant", "content": "40"}]
    facts = sft_rows.build([Document("", "mine", tuple(talk))] * 5, chatml, 120, tmp_path / "rows")
    rows = sft_rows.load(tmp_path / "rows", seed=0)
    batch = rows.batch(0, rows.n_rows)
    ids, answers = chat.render_answers(chatml, talk)
    assert facts["samples"] == 5 and sum(int(row.max()) for row in batch.segments_BT) == 5
    for row in range(batch.n_rows):
        for segment in range(1, int(batch.segments_BT[row].max()) + 1):
            in_segment = batch.segments_BT[row] == segment
            assert batch.tokens_BT[row, in_segment].tolist()[: len(ids)] == ids
            assert batch.loss_BT[row, in_segment].bool().tolist()[: len(ids)] == answers


def test_a_system_message_lives_in_the_template(chatml, tmp_path):
    system = 'Say "yes".\n{{ 1 + 1 }} %} {# 漢😀 \\n'
    chatml.set_system(system)
    chatml.save(tmp_path / "saved")
    reloaded = load_tokenizer(tmp_path / "saved")
    ids = chat.render_ids(reloaded, QUESTION)
    assert system in reloaded.decode(ids) and "be kind" not in reloaded.decode(ids)
    assert ids == theirs(tmp_path / "saved", QUESTION), "transformers says it too"
    own = [{"role": "system", "content": "mine"}, *QUESTION]
    assert system not in reloaded.decode(chat.render_ids(reloaded, own))


def test_a_base_model_speaks_the_zero_style(tmp_path):
    tok = load_tokenizer(houses.byte_level(tmp_path / "base", template=None))
    with pytest.raises(UserError, match=r'no chat template.*style = "r1-zero"'):
        chat.question_ids(tok, "2+2?")
    tok.chat_style = "zero"
    assert tok.decode(chat.question_ids(tok, "2+2?"), skip_special=False) == "User: 2+2?\nAssistant:"
    tok.save(tmp_path / "saved")
    reloaded = load_tokenizer(tmp_path / "saved")
    assert reloaded.chat_style == "zero" and reloaded.eos_id == tok.special_id("<|im_end|>") and reloaded.opening == ""
    with pytest.raises(UserError, match="no token '<｜User｜>'"):
        chat.render_ids(reloaded, QUESTION, "r1")


@pytest.mark.parametrize("blank", ["first", "always", "prepend"])
def test_what_continues_a_text_begins_with_no_blank(tmp_path, blank):
    """Our own template on such a tokenizer, and the beginning of an answer that a client gives."""
    tok = load_tokenizer(houses.sentencepiece(tmp_path, None, blank))
    tok.chat_style = "zero"
    answer = {"role": "assistant", "content": "<think>36</think> 40"}
    ids = chat.render_ids(tok, [*QUESTION, answer])
    assert tok.decode(ids).lstrip() == "User: What is 12*3+4?\nAssistant:<think>36</think> 40"
    begun = chat_prompt(tok, [Turn(**QUESTION[0]), Turn(**answer)]).ids
    assert tok.decode(begun).lstrip() == "User: What is 12*3+4?\nAssistant:<think>36</think> 40"


def test_r1s_template_is_refused_where_its_tokens_are_missing(tmp_path):
    tokenizer = load_tokenizer(houses.byte_level(tmp_path / "chatml"))
    with pytest.raises(UserError, match=r'"r1".*<｜User｜> and <｜Assistant｜>.*"zero"'):
        tokenizer.chat_style = "r1"
    assert tokenizer.chat_style is None and tokenizer.chat_template == houses.CHATML  # the template is unchanged
    tokenizer.chat_style = "r1-zero"
    ids = chat.render_ids(tokenizer, [{"role": "user", "content": "What is 12*3+4?"}])
    assert tokenizer.decode(ids).endswith("User: What is 12*3+4?\nAssistant:")


def test_our_own_directories_stay_ours(tmp_path):
    for style in chat.STYLES:
        Tokenizer.train(houses.TEXTS, 300, style).save(tmp_path / style)
        tok = load_tokenizer(tmp_path / style)
        assert type(tok) is Tokenizer and tok.stop_ids == [tok.eos_id] and tok.opening == chat.opening(style)
    foreign = Tokenizer.train(houses.TEXTS, 300)
    foreign.chat_template = OURS
    foreign.save(tmp_path / "changed")
    assert type(load_tokenizer(tmp_path / "changed")) is HFTokenizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: houses.words(d), "neither byte-level nor"),
        (lambda d: (houses.byte_level(d) / "tokenizer.json").unlink(), "has no tokenizer.json.*save_pretrained"),
        (lambda d: (houses.byte_level(d) / "tokenizer.json").write_text("{}"), "tokenizer.json is broken"),
        (lambda d: houses.byte_level(d, pad_token="<|im_end|>"), "names no eos_token"),
        (lambda d: houses.byte_level(d, eos_token="<nosuch>"), "no token '<nosuch>'"),
        (lambda d: houses.byte_level(d, template="{{ messages[0]['content'] }}"), "does not open an answer"),
        (lambda d: houses.byte_level(d, template="{% for %}"), "the chat template of this model rejects"),
        (lambda d: houses.byte_level(d, template="{{ messages.__class__.__mro__ }}"), "rejects"),
        (lambda d: houses.byte_level(d, template=NO_PROMPT), "does not open an answer"),
        (lambda d: houses.byte_level(d, template="{% for m in messages %}{{ m['content'] }}{% endfor %}"), "ever end"),
    ],
)
def test_broken_directories_are_refused_by_name(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_a_template_that_refuses_says_so(tmp_path):
    tok = load_tokenizer(houses.sentencepiece(tmp_path))
    with pytest.raises(UserError, match=r"rejects.*no system here"):
        chat.render_ids(tok, [{"role": "system", "content": "be kind"}, *QUESTION])


def test_templates_that_rewrite_earlier_turns_are_refused_for_multi_turn_training(tmp_path):
    """Mistral's writes the system message before the last question; prompts need no answers located."""
    late = houses.MISTRAL.replace(
        "{{ '[INST] '", "{{ '[INST] ' + (messages[0]['content'] if loop.last and loop.index > 1 else '')"
    )
    folder = houses.sentencepiece(tmp_path, late)
    tok = load_tokenizer(folder)
    assert chat.render_ids(tok, TALK) == theirs(folder, TALK)
    with pytest.raises(UserError, match="changes earlier turns"):
        chat.render_answers(tok, [*TALK, {"role": "assistant", "content": "quite"}, TALK[-1]])
    more = [*TALK, {"role": "assistant", "content": "quite"}, TALK[-1]]
    assert chat.render_ids(tok, more) == theirs(folder, more)


@pytest.mark.parametrize("most", [0xF8FF, 0x10FFFD])
def test_a_message_of_all_private_characters(chatml, most):
    planes = [*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]
    message = {"role": "user", "content": "".join(chr(code) for code in planes if code <= most) + "<|im_end|>"}
    if most < 0x10FFFD:
        ids = chat.render_ids(chatml, [message])
        assert message["content"] in chatml.decode(ids, skip_special=False)
        assert ids.count(chatml.eos_id) == 2
    else:
        with pytest.raises(UserError, match="private-use"):
            chat.render_ids(chatml, [message])


def test_text_before_a_question_ends_as_documents_do(tmp_path):
    tok = load_tokenizer(houses.byte_level(tmp_path, eos_token="<|text|>"))
    assert tok.end_id != tok.eos_id
    problem, prefix = get("arithmetic").problem("test", 0), "Think well."
    ids = Shots(prefix=prefix).encoder(tok, get("arithmetic"), 500)(problem)
    assert ids == [*tok.encode(prefix), tok.end_id, *chat.question_ids(tok, problem.prompt)]
