"""A grammar decides which tokens may follow, whatever other requests come and go."""

import itertools
import json

import jsonschema
import pytest
import torch
from drain import drain

from bessemer.addons.serve.grammar import DEEPEST, Grammars, calls_grammar, json_grammar
from bessemer.addons.serve.penalties import PenaltyParams
from bessemer.addons.serve.requests import ServedRequest as Request
from bessemer.addons.serve.requests import ServedSequence as Sequence
from bessemer.addons.serve.scheduler import Scheduler
from bessemer.addons.serve.token_controls import TokenControl, TokenRules
from bessemer.addons.tasks.tool_texts import Tool
from bessemer.engine.engine import Engine
from bessemer.engine.kv_cache import PAGE
from bessemer.engine.random_streams import stream_key
from bessemer.engine.sequence import SamplingParams
from bessemer.errors import UserError
from bessemer.model.transformer import Transformer

SCHEMAS = [
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "boolean"}},
     "required": ["a", "b"], "additionalProperties": False},
    {"type": "array", "items": {"enum": ["the", "fox", None]}, "minItems": 1, "maxItems": 3},
    {"anyOf": [{"type": "string", "pattern": "^(two|four) [0-9]$"}, {"const": "盛钢水"}]},
    {"type": "object", "properties": {"x": {"$ref": "#/$defs/d"}}, "required": ["x"], "additionalProperties": False,
     "$defs": {"d": {"type": "string", "maxLength": 3}}},
]  # fmt: skip
SAMPLINGS = [
    SamplingParams(),
    SamplingParams(0.0),
    SamplingParams(0.7, top_p=0.9),
    SamplingParams(1.3, top_k=4),
]


def requests(prompts, tokenizer, n=15):
    """Every third request is free; the others obey a schema."""
    grammars = [json_grammar(schema) for schema in SCHEMAS]
    return [
        Request(
            tuple(prompts[i % 8]), stream_key(5, i), 90, SAMPLINGS[i // 3 % 4], tuple(tokenizer.stop_ids),
            control=TokenRules(
                PenaltyParams(frequency_penalty=0.5 * (i // 3 % 4 == 2)), grammar=grammars[i % 4] if i % 3 else ""
            ).or_none(),
        )
        for i in range(n)
    ]  # fmt: skip


def biased(token, value):
    return TokenRules(PenaltyParams(bias=((token, value),)))


def alone(engine, request, **options):
    scheduler = Scheduler(engine, rows=1, **options)
    scheduler.add(request)
    actual = drain(scheduler)[1]
    return next(iter(actual.values()))


def test_answers_obey_their_schema_and_are_the_same_alone(engine, prompts, tokenizer):
    """The cache is too small for all of them, so that some are preempted and resumed."""
    expected = requests(prompts, tokenizer)
    scheduler = Scheduler(engine, rows=16, cache_tokens=5 * PAGE, prefill_tokens=20)
    actual, _ = drain(scheduler, expected, every=1)
    assert scheduler.preempted > 0
    obeyed = 0
    for i, (request, (tokens, end)) in enumerate(zip(expected, actual, strict=True)):
        solo, solo_end = alone(engine, request)
        assert ([t.token for t in tokens], end.reason) == ([t.token for t in solo], solo_end.reason)
        assert [t.logprob for t in tokens] == pytest.approx([t.logprob for t in solo], abs=1e-3)
        if not i % 3:
            continue
        text = tokenizer.decode([token.token for token in tokens], skip_special=False)
        assert end.reason in ("stop", "length"), end
        if end.reason == "stop":
            jsonschema.validate(json.loads(text), SCHEMAS[i % 4])
            obeyed += 1
    assert obeyed >= 8


def test_the_mask_matches_the_definition(tokenizer):
    """Against every token in turn: allowed exactly if the text so far plus the token begins one of the words."""
    words = ["the fox", "fox", "two and two", "盛钢"]
    state = Grammars(tokenizer).start(json_grammar({"enum": words}), waits=False)
    texts = [json.dumps(word, ensure_ascii=False).encode() for word in words]
    so_far = b""
    for step in range(40):
        if state.is_complete:
            break
        allowed = state.allowed().nonzero().squeeze(-1).tolist()
        plain = [i for i in range(tokenizer.vocab_size) if not tokenizer.is_special(i)]
        begun = [i for i in plain if any(text.startswith(so_far + tokenizer.token_bytes(i)) for text in texts)]
        assert allowed == begun
        state.append(allowed[step * 7 % len(allowed)])
        so_far += tokenizer.token_bytes(allowed[step * 7 % len(allowed)])
    assert so_far in texts and state.is_complete and not state.error
    state.append(tokenizer.encode("x")[0])
    assert state.error


def test_thoughts_are_free_and_drafts_keep_the_form(model, prompts, tokenizer):
    """A grammar begins after </think>; with drafts, such answers take one token a step."""
    think, end = tokenizer.think_id, tokenizer.think_end_id
    engine, grammar = Engine(model, tokenizer), json_grammar(SCHEMAS[1])
    request = Request(
        (*prompts[3], think), 7, 80, stop_ids=tuple(tokenizer.stop_ids),
        control=TokenRules(thinking_budget=9, grammar=grammar, grammar_waits=True),
    )  # fmt: skip
    for drafts in (0, 1):
        tokens, finished = alone(engine, request, drafts=drafts)
        ids = [token.token for token in tokens]
        assert finished.reason == "stop" and ids.index(end) <= 9
        jsonschema.validate(json.loads(tokenizer.decode(ids[ids.index(end) + 1 :])), SCHEMAS[1])


def test_a_thought_before_a_form_does_not_end_the_answer(engine, prompts, tokenizer):
    """With a bias that makes the end of the answer certain wherever it is allowed."""
    end, think = tokenizer.think_end_id, tokenizer.think_id
    bias = PenaltyParams(bias=tuple((token, 100.0) for token in tokenizer.stop_ids))
    stops = tuple(tokenizer.stop_ids)
    for schema, calls_follow in ((SCHEMAS[1], False), ({}, True)):
        grammar = "start: /(.|\\n)*/" if calls_follow else json_grammar(schema)
        rules = TokenRules(bias, thinking_budget=9, grammar=grammar, grammar_waits=True, ends=stops)
        request = Request((*prompts[3], think), 7, 80, stop_ids=stops, control=rules)
        tokens, finished = alone(engine, request)
        ids = [token.token for token in tokens]
        assert finished.reason == "stop"
        if calls_follow:  # no content is what this grammar allows, too
            assert len(ids) == 1 and ids[0] in stops
        else:
            assert ids.index(end) == 9
            jsonschema.validate(json.loads(tokenizer.decode(ids[10:])), schema)


def test_a_bias_is_added_to_the_logits(engine, prompts, tokenizer):
    """A large bias forces or bans a token; a small one changes probabilities as defined."""
    free = Request(tuple(prompts[4]), 1, 6, SamplingParams(0.0))
    first = alone(engine, free)[0][0].token
    banned = alone(engine, Request(free.prompt, 1, 6, SamplingParams(0.0), control=biased(first, -100.0)))[0]
    forced = alone(engine, Request(free.prompt, 1, 6, control=biased(7, 100.0)))[0]
    assert first not in [t.token for t in banned] and {t.token for t in forced} == {7}
    counts = {}
    for bias in ((), ((first, -1.0),)):
        scheduler = Scheduler(engine, rows=400)
        for key in range(400):
            control = TokenRules(PenaltyParams(bias=bias)).or_none()
            scheduler.add(Request(free.prompt, stream_key(key), 1, control=control))
        actual = drain(scheduler)[1].values()
        counts[bias] = sum(tokens[0].token == first for tokens, _ in actual)
    with torch.inference_mode():
        logits = engine.model.forward(torch.tensor([free.prompt]))[0, -1, : tokenizer.vocab_size].float()
    for bias, count in counts.items():
        changed = logits.clone()
        for token, value in bias:
            changed[token] += value
        share = float(changed.softmax(-1)[first])
        assert abs(count / 400 - share) < 4 * (share * (1 - share) / 400) ** 0.5 + 1e-3


def test_a_bias_of_no_token_is_refused(engine, prompts):
    """It would be added to a token of another sample: their logits lie one after the other."""
    scheduler = Scheduler(engine, rows=2)
    for token in (-1, engine.model.cfg.vocab_size):
        with pytest.raises(UserError, match=f"bias: {token} "):
            scheduler.add(Request(tuple(prompts[4]), 1, 6, control=biased(token, 1.0)))


def test_schemas_that_cannot_be_enforced_are_named(tokenizer):
    deep = {"type": "object"}
    for _ in itertools.repeat(None, DEEPEST):
        deep = {"type": "array", "items": deep}
    for schema, message in (
        ({"type": "strin"}, "Invalid type"),
        ({"not": {}}, "Unimplemented"),
        (deep, "deep"),
        ({"enum": ["x" * 40_000]}, "longer"),
    ):
        with pytest.raises(UserError, match=message):
            json_grammar(schema)


OPEN = {
    "type": "object", "required": ["said", "list"], "additionalProperties": False,
    "properties": {
        "said": {"type": "string"},
        "list": {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}}}},
    },
}  # fmt: skip


@pytest.mark.parametrize("form", ["content", "call"])
def test_json_cut_off_by_the_limit_can_still_be_parsed(cfg, prompts, tokenizer, form):
    """A model that knows no JSON writes strings and lists without an end."""
    tool = Tool("note", parameters=OPEN)
    grammar = json_grammar(OPEN) if form == "content" else calls_grammar((tool,), tokenizer.tool_marks, 2)
    model = Transformer(cfg.model_copy(update={"max_seq_len": 512})).initialise(3)
    scheduler = Scheduler(Engine(model, tokenizer), rows=16)
    expected = [
        Request(tuple(prompts[n % 4]), stream_key(3, n), 300, SAMPLINGS[n % 3], control=TokenRules(grammar=grammar))
        for n in range(12)
    ]
    actual, _ = drain(scheduler, expected, every=1)
    assert "length" in {end.reason for _, end in actual}
    for tokens, end in actual:
        text = tokenizer.decode([token.token for token in tokens], skip_special=False)
        value, length = json.JSONDecoder().raw_decode(text[text.index("{") :])
        jsonschema.validate(value, OPEN)
        assert end.reason in ("stop", "length") and (form == "call" or length == len(text))


def test_an_answer_that_fits_into_its_limit_is_not_cut_off(tokenizer):
    """It was, if it ended within the last 64 tokens."""
    written = tokenizer.encode(json.dumps({"said": "the fox " * 10, "list": [{"name": "the dog"}]}))
    grammar = json_grammar(OPEN)
    for limit, fits in ((len(written) + 10, True), (len(written) - 10, False)):
        control = TokenControl(TokenRules(grammar=grammar), Grammars(tokenizer).start(grammar, False), (None, None))
        sequence = Sequence(Request((1,), 0, limit), 0, control=control)
        control.start(sequence)
        for token in written:
            if not control.allowed(tokenizer.vocab_size)[token]:
                break
            sequence.append(token, 0.0, 0.0)
        assert (sequence.finish == "stop") == fits


def test_a_thousand_properties_may_each_be_missing(tokenizer):
    """As many as the longest schema may have; the library's own limit is reached by five hundred."""
    names = [f"{number:x}" for number in range(2000)]
    schema = {"type": "object", "properties": {name: {} for name in names}, "additionalProperties": False}
    state = Grammars(tokenizer).start(json_grammar(schema), waits=False)
    for token in tokenizer.encode(json.dumps({"7cf": 1})):
        assert state.allowed()[token] and not state.error
        state.append(token)
    assert state.is_complete and not state.error


def test_there_is_at_most_one_blank_between_two_tokens(tokenizer):
    """Where more are allowed, a weak model pads its answers with them."""
    grammars = Grammars(tokenizer)

    def follows(text, ids):
        state = grammars.start(json_grammar(SCHEMAS[0]), waits=False)
        for token in tokenizer.encode(text):
            assert state.allowed()[token]
            state.append(token)
        return bool(state.allowed()[ids])

    (blank,), (line,) = tokenizer.encode(" "), tokenizer.encode("\n")
    for text in ("{", '{"a":', '{"a": 4', '{ "a": 4,'):
        assert follows(text, blank) and not follows(text, line) and not follows(text + " ", blank)
