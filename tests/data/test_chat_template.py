"""Templates from outside: they render what transformers renders, and a harmful one harms nothing but itself."""

import os
import time

import hf_tokenizers as houses
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from bessemer.addons.families import chat_template
from bessemer.addons.families.chat_template import ChatTemplate
from bessemer.errors import UserError

TALK = [
    {"role": "system", "content": 'Be <b>kind</b> & "brief".\n'},
    {"role": "user", "content": " é漢 'x' "},
    {"role": "assistant", "content": "<think>a</think> b"},
]
TEMPLATES = {
    "blocks are trimmed": "  {% for m in messages %}\n  {{ m.content }}\n  {# note #}\n{% endfor %}\n\nend\n",
    "loops break": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}{% endfor %}"
    "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ {'b': 1, 'a': '<é>'} | tojson }}",
    "generation": "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}{{ x }}{{ m.content }}"
    "{% endgeneration %}{{ x }}{% endfor %}",
    "namespace": "{% set n = namespace(a=1, self=2) %}{% set n.a = n.a + 5 %}{{ n.a }}{{ n.self }}{{ dict(a=1) }}",
    "what is not there": "{{ tools }}{{ documents }}{{ nothing }}{{ nothing is defined }}{{ bos_token }}",
    "filters": "{{ messages | map(attribute='role') | join('+') }}{{ messages[1].content | trim | upper }}"
    "{{ messages[2].content.split('</think>')[-1] }}{{ messages | selectattr('role', 'equalto', 'user') | list }}",
    "prompt": houses.LLAMA3 + houses.CHATML,
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("ask", [True, False])
def test_texts_match_those_of_transformers(name, ask):
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    (reference,), _ = render_jinja_template(
        [TALK], chat_template=TEMPLATES[name], add_generation_prompt=ask, tools=None, documents=None, **names
    )
    assert ChatTemplate(TEMPLATES[name], names)(TALK, ask) == reference


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "more than 1 s of processor",
        ),
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{{ 'é' * 6000000 }}", "it writes 6000000 characters"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% set n = namespace(__class__=1) %}", "no '__class__'"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "no '__class__'"),
        ("{{ raise_exception('a\\n\x1b[2Jb') }}", r"rejects the conversation: a  \[2Jb$"),
        ("x" * (chat_template.LONGEST_TEMPLATE + 1), "characters; the limit is"),
    ],
)
def test_unsafe_or_endless_templates_fail_without_breaking_the_next(text, message):
    begun = time.process_time()
    with pytest.raises(UserError, match=message):
        ChatTemplate(text, {})(TALK, True)
    assert time.process_time() - begun < 0.5, "it did not run here"
    assert ChatTemplate("{{ messages | length }}", {})(TALK, True) == "3"


def test_a_forked_worker_has_a_process_of_its_own():
    ChatTemplate("a", {})(TALK, True)
    parent = chat_template._renderer(os.getpid())._child.pid
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        ChatTemplate("b", {})(TALK, True)
        os.write(write, str(chat_template._renderer(os.getpid())._child.pid).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert int(os.read(read, 20)) != parent
