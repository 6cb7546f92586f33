"""The live page: following files that are written, truncated, replaced and removed; the server; the browser."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from browser import violations
from page_helpers import wait_for
from serving import error_of

from bessemer.addons.serve import ServeConfig, watch
from bessemer.addons.serve.app import build
from bessemer.addons.serve.http import bind
from bessemer.addons.serve.models import find_models
from bessemer.addons.serve.run_follower import RunFollower
from bessemer.addons.watch.following import BUCKETS, LineTail, smoothed, thinned

RECIPE = """name = "noise"
[[stage]]
kind = "pretrain"
[[stage]]
kind = "rl"
name = "zero"
[[stage]]
kind = "eval"
"""
HOSTILE = "</pre><script>window.owned = 1</script><img src=x onerror='window.owned = 1'>\x1b[2J\u202eright\ud800"


def line(stage, step, **values):
    return json.dumps({"time": 1.78e9 + step, "stage": stage, "step": step, "tokens": 100 * step, "values": values})


def pretraining(step):
    loads = {"moe/load/1": [1 + step, 1, 2, 0], "moe/load/mtp0": [1, 1, 1, 1]}
    values = {"train/loss": 8 / step, "train/mtp_1": 9 / step, "train/grad_norm": 3 + step % 7}
    return line("pretrain", step, **values, **(loads if step % 10 == 0 else {}))


def make_run(root, steps=100):
    """A run in the middle of its RL stage, with an alarm."""
    root.mkdir(parents=True)
    (root / "recipe.toml").write_text(RECIPE)
    (root / "plan.json").write_text(json.dumps({"seconds": {"pretrain": 80.0, "zero": 600.0, "eval": 30.0}}))
    rl = [line("zero", step, **{"rl/accuracy": 0.2, "rl/dead_groups": 0.9, "rl/reward": 0.3}) for step in range(1, 9)]
    write(root, *map(pretraining, range(1, steps + 1)), *rl)
    for folder in ("01-pretrain", "02-zero"):
        (root / folder).mkdir()
    (root / "01-pretrain" / "done.json").write_text(json.dumps({"seconds": 100.0, "summary": {}}))
    (root / "02-zero" / "wall.json").write_text(json.dumps({"seconds": 61.0}))
    rollout = {"step": 8, "prompt": "Use 2, 3 to make 6.", "completion": HOSTILE, "reward": 1.1, "correct": True,
               "formatted": False}  # fmt: skip
    (root / "02-zero" / "rollouts.jsonl").write_text(json.dumps(rollout) + "\n")
    return root


def write(root, *lines, end="\n"):
    with open(root / "metrics.jsonl", "a") as file:
        file.write("\n".join(lines) + end)


def read(follower):
    while follower.poll():
        pass
    return follower


def steps(follower, stage="pretrain"):
    return list(follower.store.stages[stage].steps) if stage in follower.store.stages else []


@contextmanager
def serving(*followers):
    server, bound = watch.server_of(followers), bind("127.0.0.1", 0)
    bound.listen(64)  # a request may arrive before the server's thread runs
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    bound.close()


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "noise")


def test_a_growing_file_is_read_line_by_line(tmp_path):
    tail = LineTail(tmp_path / "x.jsonl")
    assert tail.read() == (False, [])  # the file appears later
    with open(tmp_path / "x.jsonl", "ab", buffering=0) as file:
        file.write(b'{"a": 1}\n{"a"')
        assert tail.read() == (False, [{"a": 1}])
        assert tail.read() == (False, [])
        file.write(b": 2}\nnot JSON\n[1]\n" + b"[" * 100_000 + b'\n\xff\x00\n{"a": NaN}\n')
        anew, lines = tail.read()
    assert not anew and lines[0] == {"a": 2} and math.isnan(lines[1]["a"]) and tail.broken == 4
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"a": 5}\n' + b'{"b": 6}\n' * 20_000)  # replaced by a longer file
    anew, lines = tail.read()
    assert anew and lines[:3] == [{"a": 1}, {"a": 5}, {"b": 6}] and len(lines) == 20_002
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n')
    assert tail.read() == (True, [{"a": 1}])


def test_a_long_file_is_being_read_until_its_end(tmp_path, monkeypatch):
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n' * 40)
    monkeypatch.setattr("bessemer.addons.watch.following.PIECE", 64)
    parsed, seen, tail = LineTail._parsed, [], LineTail(tmp_path / "lines.jsonl")
    monkeypatch.setattr(LineTail, "_parsed", lambda self, raw: (seen.append(self.more), parsed(self, raw))[1])
    lines = tail.read()[1]
    while tail.more:
        lines += tail.read()[1]
    assert len(lines) == 40 and len(seen) > 5 and all(seen[1:])


def test_the_end_of_a_long_file_is_enough_for_rollouts(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(1000)))
    tail = LineTail(path, last=100)
    lines = tail.read()[1]
    assert lines[-1] == {"n": 999} and 5 < len(lines) < 12 and tail.broken == 0
    with open(path, "a") as file:
        file.write('{"n": 1000}\n')
    assert tail.read() == (False, [{"n": 1000}])


def test_a_rewound_run_leaves_no_trace_and_no_gap(run):
    follower = read(RunFollower(run, "noise"))
    assert steps(follower) == list(range(1, 101)) and steps(follower, "zero") == list(range(1, 9))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").unlink()
    write(run, *lines[:40], line("pretrain", 41, **{"train/loss": 1.0}))
    read(follower)
    assert steps(follower) == list(range(1, 42)) and steps(follower, "zero") == []
    assert follower.state()["alarms"] == []
    (run / "02-zero" / "rollouts.jsonl").unlink()
    assert follower.rollouts["zero"].newest and not read(follower).rollouts["zero"].newest


def test_a_run_whose_disk_goes_away_stays_on_the_page(run):
    follower = read(RunFollower(run, "noise"))
    shutil.move(run, run.with_name("away"))
    state = read(follower).state()
    assert "cannot be read now" in state["trouble"][0] and state["stages"][0]["step"] == 100
    shutil.move(run.with_name("away"), run)
    write(run, pretraining(101))
    state = read(follower).state()
    assert state["trouble"] == [] and state["stages"][0]["step"] == 101


def test_stages_are_shown_with_their_state(run):
    state = read(RunFollower(run, "noise")).state()
    assert [(s["name"], s["state"], s["planned"], s["seconds"]) for s in state["stages"]] == [
        ("pretrain", "finished", 80.0, 100.0), ("zero", "running", 600.0, 61.0), ("eval", "waiting", 30.0, None),
    ]  # fmt: skip
    assert state["left"] is None
    (run / "plan.json").write_text(json.dumps({"left": {"seconds": 90.0, "time": time.time() - 30}}))
    assert read(RunFollower(run, "noise")).state()["left"] == pytest.approx(60, abs=5)
    (alarm,) = state["alarms"]
    assert alarm["title"] == "groups too hard" and alarm["active"] and alarm["step"] == 5
    empty = run.with_name("empty")
    empty.mkdir()
    (empty / "recipe.toml").write_text("stage = 3")
    state = read(RunFollower(empty, "empty")).state()
    assert state["stages"] == [] and state["trouble"] == [] and not state["running"]
    (empty / "recipe.toml").write_text("stage = [")
    assert "recipe.toml cannot be read" in read(RunFollower(empty, "empty")).state()["trouble"][0]


@pytest.mark.parametrize(("file", "text"), [("plan.json", "[" * 100_000), ("recipe.toml", "a = " + "[" * 3000)])
def test_deeply_nested_files_end_nothing(run, file, text):
    (run / file).write_text(text)
    state = read(RunFollower(run, "noise")).state()
    assert steps(read(RunFollower(run, "noise"))) == list(range(1, 101))
    assert ["recipe.toml cannot be read" in words for words in state["trouble"]] == [True] * (file == "recipe.toml")


def test_the_command_for_a_chat_is_one_for_a_shell(browser, tmp_path):
    run = make_run(tmp_path / "it's mine" / "noise")
    (run / "01-pretrain" / "model").mkdir()
    (run / "01-pretrain" / "model" / "config.json").write_text("{}")
    with serving(RunFollower(run, "noise")) as url, opened(browser, url, 1280, "light") as page:
        chat, serve = map(shlex.split, page.locator("#models code").all_text_contents())
        assert chat == ["bessemer", "chat", f"{run}/pretrain"] and serve == ["bessemer", "serve", str(run)]


def test_reading_writes_nothing(run):
    def files():
        return {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}

    before = files()
    read(RunFollower(run, "noise")).state()
    assert files() == before


def test_thinning_loses_no_peak():
    y = [math.sin(n / 50) + (9 if n == 70_001 else 0) for n in range(100_000)]
    x, thin = thinned(range(100_000), y)
    assert len(thin) <= 2 * BUCKETS + 2 and x == sorted(x) and (x[0], x[-1]) == (0, 99_999)
    assert max(thin) == y[70_001] and all(y[at] == value for at, value in zip(x, thin, strict=True))
    for number in range(BUCKETS):  # against the definition
        low, high = 100_000 * number // BUCKETS, 100_000 * (number + 1) // BUCKETS
        inside = [value for at, value in zip(x, thin, strict=True) if low <= at < high]
        assert {min(inside), max(inside)} == {min(y[low:high]), max(y[low:high])}
    assert thinned([1, 2], [3, 4]) == ([1, 2], [3, 4]) and smoothed([1], [1]) == ([], [])
    sx, sy = smoothed(range(1000), [float(n % 2) for n in range(1000)])
    assert len(sx) == BUCKETS and all(abs(value - 0.5) < 0.1 for value in sy)


def test_a_long_run_with_bad_values_is_small_and_valid_json(tmp_path):
    root = make_run(tmp_path / "long", steps=5)
    bad = {"train/loss": math.nan, "train/mtp_1": math.inf, "train/lr": 10**400, "moe/load/1": [math.nan, 1]}
    write(root, *(line("pretrain", n, **{"train/loss": n % 89}) for n in range(6, 20_000)))
    write(root, line("pretrain", 20_000, **bad), '{"stage": 3}', line("pretrain", -1), "[]", "{", end="")
    follower = read(RunFollower(root, "long"))
    with serving(follower) as url:
        raw = httpx.get(f"{url}/api/curves", params={"stage": "pretrain", "panel": "Training loss"}).text
        (loss, _) = json.loads(raw, parse_constant=lambda name: pytest.fail(name))["lines"]
        assert len(raw) < 40_000 and loss["points"] == 19_999 and max(loss["y"]) == 88 and loss["sx"]
        assert loss["last"] == pytest.approx(44, abs=3)  # the end of the bold line, not the last step's 63
        query = {"stage": "pretrain", "panel": "Training loss", "low": 100, "high": 110}
        near = httpx.get(f"{url}/api/curves", params=query).json()["lines"][0]
        assert near["x"] == list(range(100, 111)) and near["y"] == [n % 89 for n in range(100, 111)]
        query |= {"over": "minutes", "low": 0.99, "high": 1.01}  # a step takes a second
        assert httpx.get(f"{url}/api/curves", params=query).json()["lines"][0]["x"] == [1.0]
        assert httpx.get(f"{url}/api/curves", params=query | {"over": "years"}).status_code == 422
        state = httpx.get(f"{url}/api/state").json()["runs"][0]
    messages = [alarm["message"] for alarm in state["alarms"] if alarm["title"] == "not finite"]
    assert messages[0] == "train/loss was not finite once at step 20000" and len(messages) == 3
    assert "3 damaged lines" in state["trouble"][0]


def test_only_local_requests_are_answered(run):
    with serving(read(RunFollower(run, "noise"))) as url:
        page = httpx.get(url)
        assert "script-src 'self'" in page.headers["content-security-policy"] and "<script type=" in page.text
        foreign = httpx.get(f"{url}/api/state", headers={"Host": "evil.example"})
        assert foreign.status_code == 403 and "evil.example" in error_of(foreign)["message"]
        response = httpx.get(f"{url}/api/state", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in response.headers
        assert httpx.post(f"{url}/api/state").status_code == 405
        assert httpx.get(f"{url}/static/..%2fhttp.py").status_code == 404


def test_wrong_arguments_are_one_line(run, tmp_path, call):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        for arguments, words in (
            ([tmp_path / "none"], "not a run directory"),
            ([tmp_path], "not a run directory (no recipe.toml in it)"),
            ([run, run], "a run is named twice"),
            ([run, "--port", listener.getsockname()[1]], "in use; choose another one with --port"),
        ):
            status, out, err = call("watch", *arguments, "--no-browser")
            assert status == 2 and not out and err.startswith("error: ") and words in err and err.count("\n") == 1


def test_the_server_of_a_run_has_the_page(run_server):
    def state():
        return httpx.get(f"{run_server.url}/watch/api/state").json()

    wait_for(lambda: not state()["runs"][0]["reading"], "the run is read")
    assert state()["chat"] == "../" and [run["model"] for run in state()["runs"]] == ["r1"]
    assert "watch.js" in httpx.get(f"{run_server.url}/watch/").text
    assert httpx.get(f"{run_server.url}/health").json()["watch"] is True
    root = run_server.models.run
    locked = build(find_models(root, ServeConfig(api_key="sesame")))
    assert not any(getattr(route, "path", "").startswith("/watch") for route in locked.routes)


@contextmanager
def opened(browser, url, width, scheme, locale="en-US"):
    """The page; it must raise no complaint and contact no other host."""
    options = {"color_scheme": scheme, "locale": locale}
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    page, complaints = context.new_page(), []
    page.set_default_timeout(60_000)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith(url) or complaints.append(request.url))
    page.goto(url)
    page.wait_for_selector("#pictures .chart .line", state="attached")
    yield page
    owned = page.evaluate("window.owned")
    context.close()
    assert complaints == [] and owned is None


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_grows_with_its_runs(browser, run, tmp_path, width, scheme):
    other = make_run(tmp_path / "second" / "noise", steps=50)
    followers = [RunFollower(root, name) for root, name in zip((run, other), ("noise", "second/noise"), strict=True)]
    with serving(*followers) as url, opened(browser, url, width, scheme) as page:
        page.click("#stages >> text=/^zero$/")
        page.wait_for_selector("#answers summary")
        facts, prompt = (page.locator(f"#answers summary {part}").first for part in (".unit", ".prompt"))
        gap = prompt.bounding_box()["x"] - sum(facts.bounding_box()[side] for side in ("x", "width"))
        assert gap >= 8 or prompt.bounding_box()["y"] > facts.bounding_box()["y"]  # beside it, or in the next line
        assert re.search(r"not well-formed\s+Use 2", page.locator("#answers summary").first.text_content())
        page.click("#answers summary >> nth=0")
        answer = page.locator("#answers details[open] pre").last.text_content()
        assert answer.startswith("</pre><script>window.owned = 1</script><img") and "\u241b[2J\ufffdright" in answer
        page.wait_for_selector("#alarms >> text=/groups too hard/")  # alarms are read after the answers
        clock = page.locator("#clock tr", has_text="pretrain").first.locator(".n")
        wait_for(lambda: clock.all_text_contents() == ["1 min 20 s", "1 min 40 s", "125 %"], "the clock")
        page.click("#stages >> text=/^pretrain$/")
        figure = page.locator("figure", has=page.locator(".title:text-is('Training loss')"))
        figure.locator(".legend li >> nth=3").wait_for()  # two metrics for each of two runs
        figure.focus()
        page.keyboard.press("ArrowLeft")
        assert figure.locator(".tip .at").text_content() == "100"
        assert figure.locator(".tip .row").first.text_content().startswith("noise · next token")
        path = figure.locator("path.c1").last.get_attribute("d")
        write(run, *map(pretraining, range(101, 121)))
        wait_for(lambda: figure.locator("path.c1").last.get_attribute("d") != path, "the curve grew")
        page.keyboard.press("PageDown")
        assert figure.locator(".tip .at").text_content() == "120"
        page.keyboard.press("+")
        figure.locator(".whole").wait_for()
        page.keyboard.press("Escape")
        figure.locator(".whole").wait_for(state="hidden")
        figure.scroll_into_view_if_needed()
        box = figure.locator("svg").first.bounding_box()
        page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 60, steps=3)
        page.mouse.up()
        figure.locator(".whole").wait_for()
        shown = [float(text) for text in figure.locator("text[text-anchor=middle]").all_text_contents()]
        assert min(shown) > 30 and max(shown) < 100, shown  # of 120 steps
        page.click("figure .whole >> nth=0")
        figure.locator(".whole").wait_for(state="hidden")
        page.click("#runs button >> nth=1")
        wait_for(lambda: figure.locator(".legend li").count() == 2, "one run is hidden")
        page.locator("#maps figure").first.scroll_into_view_if_needed()
        page.wait_for_selector("#maps .unit >> text=/4 experts, steps 10 to 120/")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert violations(page) == []
        shutil.move(run, run.with_name("away"))
        page.wait_for_selector("#notice >> text=cannot be read now")
        shutil.move(run.with_name("away"), run)
        wait_for(lambda: page.locator("#notice").text_content() == "", "the run is back")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(251, 250, 248)", "dark": "rgb(22, 21, 20)"}[scheme]
        page.click("#language")
        check_chinese(page)
        with opened(browser, url, width, scheme, "zh-TW") as chinese:  # the browser's own language, and back
            check_chinese(chinese)
            chinese.click("#language")
            chinese.wait_for_selector("html[lang=en] #alarms >> text=/groups too hard/")


def test_no_two_lines_of_a_plot_look_alike(browser, run):
    names = [f"{prefix}{n}" for prefix in ("val/bpb/", "moe/max_vio/") for n in range(12)]
    write(run, *(line("pretrain", step, **{name: step + n for n, name in enumerate(names)}) for step in (101, 102)))
    with serving(RunFollower(run, "noise")) as url, opened(browser, url, 1280, "light") as page:
        page.click("#stages >> text=/^pretrain$/")
        for title in ("Validation", "Expert imbalance"):
            keys = page.locator("figure", has=page.locator(f".title:text-is('{title}')")).locator(".legend li")
            keys.nth(11).wait_for()
            looks = keys.locator("line").evaluate_all(
                "all => all.map(getComputedStyle).map(one => one.stroke + one.strokeDasharray)"
            )
            assert len(looks) == len(set(looks)) == 12, title


def check_chinese(page):
    page.wait_for_selector("html[lang=zh-CN] #alarms >> text=/题目过难/")
    alarm = page.locator("#alarms .alarm").first.text_content()
    assert "90% 的组内奖励没有差异，20.0% 的回答正确。可能的原因：题目太难" in alarm and "自第 5 步起" in alarm
    page.click("#stages >> text=/^pretrain$/")
    figure = page.locator("figure", has=page.locator(".title:text-is('训练损失')"))
    figure.locator(".legend li >> text=/下一个词元/").first.wait_for()
    wait_for(lambda: "1 分 20 秒" in page.locator("#clock").text_content(), "the clock")
    page.locator("#maps figure").first.scroll_into_view_if_needed()
    page.wait_for_selector("#maps .unit >> text=/4 个专家，第 10 至 \\d+ 步。最后专家/")
    named = page.locator("button, label, h2, summary, th, .title, .chart .unit, nav a").all_text_contents()
    untranslated = {"pretrain", "zero", "eval", "MTP 1", "English"}  # names, and the language to switch to
    assert {word for word in map(str.strip, named) if re.fullmatch(r"[ -~]+", word)} <= untranslated
    assert violations(page) == []


def test_a_run_is_read_only_while_somebody_watches(run, monkeypatch):
    monkeypatch.setattr("bessemer.addons.serve.run_follower.UNWATCHED", 0.2)
    monkeypatch.setattr("bessemer.addons.serve.run_follower.EVERY", 0.05)
    follower = RunFollower(run, "noise")
    follower.start()
    thread = follower._thread
    thread.join(10)
    assert not thread.is_alive() and steps(follower)[-1] == 100
    follower.start()
    time.sleep(0.05)
    assert follower._thread is not thread
