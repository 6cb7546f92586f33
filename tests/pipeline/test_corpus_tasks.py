"""The stage "corpus" takes documents from tasks, and refuses a task that has none before the run starts."""

import itertools

import pytest

from bessemer import tasks
from bessemer.config.data import CorpusConfig
from bessemer.config.recipe import Recipe
from bessemer.data import corpus
from bessemer.data.documents import Document
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.pipeline.stages.corpus import Corpus, _page, _task


def settings_of(spec, part="part", **mix):
    return CorpusConfig(name="corpus", kind="corpus", parts={part: spec}, limits={part: "20K"}, mix={part: mix})


def resolve(tmp_path, spec, part="part", **mix):
    """Resolve as the runner does before it starts anything; only the vocabulary size is read from the recipe."""
    settings = settings_of(spec if spec == "fables-en" else f"task:{spec}", part, **mix)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('name = "x"\n[model]\npreset = "tiny"\n[[stage]]\nkind = "corpus"\n')
    return Corpus().resolve(settings, Recipe.load(recipe))


@pytest.mark.parametrize("name", ["logic", "words", "countdown", "arithmetic"])
def test_tasks_with_documents_are_parts(name, tmp_path):
    assert resolve(tmp_path, name)["vocab_size"] > 0


@pytest.mark.parametrize("part", ["web/en", "../up", "/tmp/up", ".", "", "state", "tokenizer"])
def test_a_part_that_cannot_name_a_folder_of_the_stage_is_refused(part, tmp_path):
    with pytest.raises(UserError, match=f'^stage "corpus": part {part!r} names a folder: .* neither state nor tok'):
        resolve(tmp_path, "arithmetic", part)


def test_a_task_without_documents_is_refused_before_the_run(tmp_path):
    path = tmp_path / "maths.jsonl"
    path.write_text('{"problem": "Add 1 and 1.", "answer": "2"}\n')
    with pytest.raises(UserError, match="no pre-training documents"):
        resolve(tmp_path, f"jsonl:{path}")


def test_the_recipe_sets_the_authors_of_a_task_s_documents(tmp_path):
    resolve(tmp_path, "countdown", direct=1.0, drill_share=0.0)
    task = _task(settings_of("task:countdown", direct=1.0, drill_share=0.0), "part")
    pages = [task.document(i) for i in range(50)]
    assert not any("<think>" in page for page in pages), "nobody thinks any more"
    assert sum("<think>" in tasks.get("countdown").document(i) for i in range(50)) > 25


def test_pages_of_a_task_with_tools_match_those_of_the_task(tmp_path):
    """Drills, too, and their problems are known to the search for contamination."""
    resolve(tmp_path, "tools:calculator:countdown")
    plain, tools = (_task(settings_of(f"task:{spec}"), "part") for spec in ("countdown", "tools:calculator:countdown"))
    assert [_page(tools, i, 3).text for i in range(40)] == [_page(plain, i, 3).text for i in range(40)]
    assert any(plain.written(i, 3).text != plain.document(i, 3) for i in range(40)), "some are drills"
    assert tools.train_problem(5, 3, None) == plain.train_problem(5, 3, None)


@pytest.mark.parametrize(
    ("spec", "mix", "complaint"),
    [
        ("countdown", {"drills": 0.1}, "has no setting 'drills'; did you mean 'drill_share'"),
        ("countdown", {"direct": 2.0}, "direct is 2.0; set it between 0 and 1"),
        ("countdown", {"phrasing": 1.0}, "mix sets shares of documents, not phrasing"),
        ("fables-en", {"direct": 0.5}, 'mix is for documents of tasks, which "part" is not'),
    ],
)
def test_mistakes_in_a_mix_are_named(tmp_path, spec, mix, complaint):
    with pytest.raises(UserError, match=complaint):
        resolve(tmp_path, spec, **mix)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [tasks.get(name).document(i) for name in ("countdown", "logic", "words") for i in range(400)]
    return Tokenizer.train(texts, 1024, chat_style="zero")


@pytest.mark.parametrize(("name", "mean"), [("logic", 110), ("words", 60)])
def test_pages_fit_the_context_of_the_tiny_model(name, mean, tokenizer, tmp_path):
    """Fewer than 256 tokens each, even with half of that model's vocabulary."""
    task = tasks.get(name)
    lengths = [len(tokenizer.encode(task.document(i))) for i in range(2000, 2400)]
    assert max(lengths) < 250 and sum(lengths) / 400 < mean
    documents = (Document(task.document(i), name) for i in itertools.count())
    built = corpus.build(documents, tokenizer, 128, tmp_path / name, limit_tokens=6_000)
    assert 5_000 < built.meta["parts"]["train"]["tokens"] < 7_000
