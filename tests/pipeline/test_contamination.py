"""Contamination: planted problems are found, mere look-alikes are not, and word matches equal a naive search."""

import random
import time

import pytest

from bessemer import tasks
from bessemer.addons.evals import contamination
from bessemer.addons.evals.contamination import ContaminationSearch, identity
from bessemer.addons.tasks.readable import words
from bessemer.tasks import Problem

STORY = "A farmer has {} hens and each of them lays {} eggs a week; how many eggs does he sell after keeping {}?"


def told(number, *figures):
    return Problem(f"gsm8k/test/{number}", STORY.format(*figures), "en")


def heldout(name, count, **settings):
    task = tasks.get(name, **settings)
    return [task.problem("test", i) for i in range(count)]


def found(problems, *shown, stage="corpus"):
    search = ContaminationSearch(problems)
    search.add_stage(stage, shown, 10**9)
    return search.result()


FOX = Problem("gsm8k/test/0", "The quick brown fox jumps over a lazy dog that slept near 14 barns all day.", "en")
HAN = Problem("gsm8k/test/1", "小明有十二个苹果他给了妹妹五个又买了三个请问现在有几个", "zh")


@pytest.mark.parametrize(
    ("text", "run"),
    [
        ("We read: the QUICK brown fox, jumps over a lazy (dog) that slept.", 11),
        ("brown fox jumps over a lazy dog that slept near", 10),
        ("brown fox jumps over a lazy dog that slept", 0),  # nine
        ("the quick brown fox jumps high over a lazy dog that slept near 14 barns", 0),  # eight and nine
        ("x" + FOX.prompt + "y", 15),  # the first word is another
        (FOX.prompt, 16),
    ],
)
def test_a_run_of_ten_words_of_a_question_is_a_hit(text, run):
    result = found([FOX, HAN], "something else", text)
    assert result["hit"] == result["by_words"] == (run > 0) and result["checked"] == 2
    if run:
        worst = result["worst"]
        assert (worst["problem"], worst["stage"], worst["by"]) == ("gsm8k/test/0", "corpus", "words")
        assert (worst["words"], worst["of"]) == (run, 16) and len(worst["text"].split()) == run


def test_a_chinese_word_is_a_character():
    assert found([FOX, HAN], "他说:小明有十二个苹果,他给了")["hit"] == 1
    assert found([FOX, HAN], "他说小明有十二个苹果她给了")["hit"] == 0


def test_no_run_continues_into_the_next_text():
    half = FOX.prompt.split(" over ")
    assert found([FOX], half[0], "over " + half[1][:20])["hit"] == 0
    assert found([FOX], half[0] + " over " + half[1])["hit"] == 1


def test_wording_that_questions_share_is_no_hit_but_a_question_is():
    problems = [told(i, 2 * i + 3, i + 40, 7 * i + 61) for i in range(5)]
    result = found(problems, STORY.format(900, 901, 902), "how many eggs does he sell after keeping")
    assert result["hit"] == 0
    result = found(problems, "Homework: " + problems[3].prompt + " Answer: 9")
    assert result["hits"] == ["gsm8k/test/3"] and result["worst"]["words"] == result["worst"]["of"]
    assert found(problems[:1], STORY.format(900, 901, 902))["hit"] == 1, "alone, nothing tells it from wording"


def test_words_agree_with_a_naive_search():
    draw = random.Random(0)
    vocabulary = [f"w{chr(97 + i)}" for i in range(6)]
    problems = [
        Problem(f"data/test/{i}", " ".join(draw.choices(vocabulary, k=draw.randint(3, 16))), "en") for i in range(40)
    ]
    grams = {}
    for problem in problems:
        size = min(contamination.N, len(words(problem.prompt)))
        for start in range(len(words(problem.prompt)) - size + 1):
            grams.setdefault(tuple(words(problem.prompt)[start : start + size]), set()).add(problem.prompt)
    texts = [" ".join(draw.choices([*vocabulary, "other"], k=30)) for _ in range(500)]
    for problem in draw.sample(problems, 8):
        at = draw.randrange(20)
        texts.append(texts[0][:at] + " " + " ".join(problem.prompt.split()[:11]))
    expected = set()
    for problem in problems:
        asked = words(problem.prompt)
        size = min(contamination.N, len(asked))
        runs = [" ".join(asked[start : start + size]) for start in range(len(asked) - size + 1)]
        own = [run for run in runs if len(grams[tuple(run.split())]) == 1 or size < contamination.N]
        if size >= contamination.SHORTEST and any(run in text for run in own for text in texts):
            expected.add(problem.id)
    search = ContaminationSearch(problems)
    search.add_stage("corpus", texts, 10**9)
    search.result()
    assert set(search._matches) == expected and 5 < len(expected) < 40


def test_a_templated_question_must_be_whole():
    problems = [p for p in heldout("arithmetic", 30, languages=["en"]) if len(words(p.prompt)) >= 5]
    one = problems[0]
    assert found(problems, f"User: {one.prompt}\nAssistant:<think>")["hits"] == [one.id]
    stem = one.prompt.rstrip(".?")
    assert found(problems, stem + "*3.")["hit"] == found(problems, stem + " + 3")["hit"] == 0, "a longer sum"
    assert found(problems, " ".join(one.prompt.split()[1:]))["hit"] == 0, "the numbers alone"
    assert found(problems, stem + " please")["hit"] == found(problems, "3. " + stem + " please")["hit"] == 1
    assert found([Problem("t/test/0/en", "What is 3?", "en", {"template": "t"})], "What is 3?")["too_short"] == 1


def test_the_same_numbers_in_other_words_are_the_same_problem():
    countdown = tasks.get("countdown")
    problems = heldout("countdown", 50)
    asked = problems[7]
    numbers, target = sorted(asked.meta["numbers"], reverse=True), asked.meta["target"]
    meta = {"numbers": tuple(numbers), "target": target, "template": "zh-seen-9", "difficulty": 9}
    planted = Problem("countdown/train/7/0/zh", "不同的说法", "zh", meta)
    result = found(problems, planted, stage="zero")
    assert result["hits"] == [asked.id] and result["by_problem"] == 1 and result["worst"]["by"] == "problem"
    assert result["searched"]["zero"]["problems"] == 1
    other = Problem("countdown/train/7/0/zh", "", "zh", meta | {"target": target + 1})
    elsewhere = Problem("arithmetic/train/7/0/zh", "", "zh", planted.meta)
    assert found(problems, other, elsewhere)["hit"] == 0
    train = [countdown.problem("train", i, 7) for i in range(2000)]
    assert found(problems, *train)["hit"] == 0


@pytest.mark.parametrize("name", ["arithmetic", "logic", "words", "general"])
def test_no_generator_breaks_its_promise(name):
    """No problem or page of the train split matches the test split, while a page of the test split is found at once."""
    task, problems = tasks.get(name), heldout(name, 60)
    train = [task.problem("train", i, 7) for i in range(400)]
    pages = [task.document(i, 7) for i in range(200)]
    assert found(problems, *train, *pages)["hit"] == 0
    result = found(problems, task.problem("test", 9), "User: " + problems[11].prompt)
    assert {problems[9].id, problems[11].id} <= set(result["hits"])


def test_identity_ignores_how_a_problem_is_asked():
    task = tasks.get("countdown")
    english, chinese = (task.problem("test", 4, language=language) for language in ("en", "zh"))
    assert identity(english) == identity(chinese) != identity(task.problem("test", 5))
    assert identity(told(1, 2, 3, 4)) == identity(told(9, 2, 3, 4)) != identity(told(1, 2, 3, 5))
    one, two = (Problem(f"gsm8k:{file}/test/0/1/en", prompt, "en", {"gold": "7", "line": 3}) for file, prompt in (
        ("a", "How many are left?"), ("b", "How many came?")))  # fmt: skip
    assert identity(one) != identity(two), "line 3 of two files, by chance with one answer"


def test_what_is_left_out_is_reported():
    search = ContaminationSearch([FOX])
    search.add_stage("sft", ["one two three"] * 5 + [FOX.prompt], most_words=7)
    search.add_stage("zero", [FOX.prompt], most_words=7)
    result = search.result()
    assert result["searched"]["sft"] == {"texts": 3, "words": 9, "texts_left_out": 3}
    assert result["hit"] == 1 and result["worst"]["stage"] == "zero"
    told = contamination.summary(result)
    assert "1 of 1 held-out problems" in told and "3 texts were not searched" in told and "gsm8k/test/0 in zero" in told


def test_a_million_words_take_seconds():
    problems = heldout("countdown", 200) + heldout("arithmetic", 200)
    task = tasks.get("countdown")
    pages = [task.document(i, 3) for i in range(1500)]
    size = sum(len(words(page)) for page in pages)
    began = time.perf_counter()
    search = ContaminationSearch(problems)
    while size * search._seen["corpus"]["texts"] / len(pages) < 1e6:
        search.add_stage("corpus", pages, 10**9)
    result = search.result()
    assert result["hit"] == 0 and result["searched"]["corpus"]["words"] >= 1e6
    print(time.perf_counter() - began)
    assert time.perf_counter() - began < 15
