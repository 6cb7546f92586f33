"""Tools that models call, tasks that have them, and environments behind servers: right, bounded, and never the end of a
run."""

import json
import random
import sys
import threading
import time
import types
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bessemer.errors import UserError
from bessemer.tasks import base, environment, get, sandbox
from bessemer.tasks.env_server import ServerEnvironment
from bessemer.tasks.environment import EnvironmentFailure, Invocation, LocalTool, ModelTurn, bounded
from bessemer.tasks.tools import CALCULATOR, calculate, run_python

ISOLATED = pytest.mark.skipif(sandbox.level() == "none", reason="no isolation here")


def expression(rng, depth):
    """A random expression as text for the calculator, and for Python's own reader with exact numbers."""
    if depth == 0 or rng.random() < 0.2:
        number = rng.randint(0, 30)
        decimals = f"{number}.{rng.randint(0, 99):02d}" if rng.random() < 0.2 else str(number)
        return decimals, f"Fraction('{decimals}')"
    kind = rng.random()
    if kind < 0.15:
        text, python = expression(rng, depth - 1)
        return f"-({text})", f"-({python})"
    if kind < 0.3:
        text, python = expression(rng, depth - 1)
        power = rng.randint(0, 3)
        return f"({text})^{power}", f"({python})**{power}"
    sign = rng.choice("+-*/")
    (left, one), (right, other) = expression(rng, depth - 1), expression(rng, depth - 1)
    if rng.random() < 0.5:
        return f"({left}) {sign} ({right})", f"({one}){sign}({other})"
    return f"{left}{sign}{right}", f"{one}{sign}{other}"


def test_the_calculator_is_exact():
    rng, checked = random.Random(3), 0
    for _ in range(600):
        text, python = expression(rng, 3)
        try:
            expected = str(eval(python, {"Fraction": Fraction}))  # of this test's own text
        except ZeroDivisionError:
            with pytest.raises(ValueError, match="division by zero"):
                calculate(text)
            continue
        assert calculate(text) == expected, text
        checked += 1
    assert checked > 450
    assert calculate("-2^2") == "-4" and calculate("2^-1") == "1/2" and calculate("2**3^2") == "512"
    assert calculate(" 1 000".replace(" 0", "0")) == "1000" and calculate("0.1+0.2") == "3/10"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "ends where a number"), ("1+", "ends where a number"), ("(1", "not closed"), ("1)", "follows where"),
        ("2 3", "follows where"), ("1/0", "division by zero"), ("0^-1", "division by zero"), ("2^(1/2)", "integer"),
        ("9^9^9", "more than 400 digits"), ("9" * 401, "more than 400 digits"), ("(" * 100, "levels deep"),
        ("-" * 100 + "1", "levels deep"), ("1" * 501, "longer than"), ("__import__('os')", "no digit"),
        ("٣+1", "no digit"), ("1e9", "no digit"), ("10^300*10^300", "more than 400 digits"),
    ],
)  # fmt: skip
def test_what_the_calculator_cannot_read_it_says_in_words(text, complaint):
    start = time.monotonic()
    with pytest.raises(ValueError, match=complaint):
        calculate(text)
    assert time.monotonic() - start < 5
    assert calculate("1^" + "9" * 300) == "1" and calculate("(0-1)^" + "9" * 300) == "-1"


def answers(tools, *calls, seconds=10.0):
    """What an episode of a task with these tools answers to a turn with these calls."""
    task = get("tools:calculator:arithmetic")
    task.tools, task.seconds = tools, seconds
    episode = task.reset(task.problem("train", 0), 1)
    observation = episode.step(ModelTurn("", tuple(calls)))
    assert all(message["role"] == "tool" for message in observation.messages) and observation.done == (not calls)
    return [message["content"] for message in observation.messages]


def test_calls_are_answered_in_their_order_and_faults_with_words():
    hang = threading.Event()
    tools = [
        CALCULATOR,
        LocalTool("sleep", "", {"type": "object", "properties": {}}, lambda: str(hang.wait(20))),
        LocalTool("bug", "", {"type": "object", "properties": {}}, lambda: str(1 // 0)),
        LocalTool("flag", "", {"type": "object", "properties": {"n": {"type": "integer"}}}, lambda n=1: "x" * n),
    ]
    got = answers(
        tools,
        Invocation("calculator", {"expression": "6*7"}),
        Invocation("calculator", {"expression": "1/0"}),
        Invocation("calculator", {}),
        Invocation("calculator", {"expression": 3}),
        Invocation("calculator", {"expression": "1", "digits": 2}),
        Invocation("calc", {"expression": "1"}),
        Invocation("x", {}, "the arguments are not JSON"),
        Invocation("bug", {}),
        Invocation("flag", {"n": True}),
        Invocation("flag", {"n": 2}),
    )
    assert got == [
        "42", "error: division by zero", "error: calculator needs the argument expression",
        "error: the argument expression of calculator must be of type string",
        "error: calculator has no argument digits",
        "error: there is no tool calc; there is calculator, sleep, bug, flag", "error: the arguments are not JSON",
        "error: ZeroDivisionError: integer division or modulo by zero",
        "error: the argument n of flag must be of type integer", "xx",
    ]  # fmt: skip
    start = time.monotonic()
    got = answers(tools, Invocation("sleep", {}), Invocation("sleep", {}), seconds=0.1)
    assert got == ["error: sleep did not return within 0.1 s"] * 2 and time.monotonic() - start < 10
    assert answers(tools) == []
    hang.set()


def test_calls_that_never_return_stop_the_run_before_they_fill_the_process(monkeypatch):
    for thread in threading.enumerate():  # of tests before, which are about to end
        if thread.name == environment.STUCK:
            thread.join(5)
    monkeypatch.setattr(environment, "MOST_STUCK", 2)
    hang = threading.Event()
    with pytest.raises(TimeoutError):
        bounded(lambda: hang.wait(20), 0.01)
    with pytest.raises(UserError, match="2 calls of tools or environments have not returned"):
        bounded(lambda: hang.wait(20), 0.01)
    hang.set()


@ISOLATED
def test_python_runs_in_the_sandbox():
    assert run_python("print(6*7)") == "42" and "printed nothing" in run_python("x = 1")
    assert run_python("print(1)\n1/0") == "error: ZeroDivisionError: division by zero\n1\n"
    assert run_python("while True: print('x' * 9999)").startswith("error: it printed too much")
    assert "error" in run_python("open('/etc/shadow').read()")
    with pytest.raises(ValueError, match="longer than"):
        run_python("#" * 200_000)


def test_python_is_refused_where_nothing_isolates_it(monkeypatch):
    monkeypatch.setattr(sandbox, "level", lambda: "none")
    monkeypatch.delenv(sandbox.FORCE, raising=False)
    with pytest.raises(UserError, match="code is not run here"):
        get("tools:python:arithmetic")


def test_a_task_with_tools_is_that_task(tmp_path):
    task, plain = get("tools:calculator:arithmetic"), get("arithmetic")
    assert [task.problem("test", i) for i in range(20)] == [plain.problem("test", i) for i in range(20)]
    problem = task.problem("train", 3)
    right = f"<think>t</think><answer>{problem.meta['value']}</answer>"
    assert task.verify(problem, right) == plain.verify(problem, right) and task.written(5) == plain.written(5)
    assert [one["function"]["name"] for one in task.schemas] == ["calculator"] and get("products").schemas == []
    file = tmp_path / "sums.jsonl"
    file.write_text('{"question": "What is 2+2?", "answer": "4"}\n' * 1)
    named = f"tools:calculator:jsonl:{file}@train"
    assert get(named).size("train") == 1 and base.file_of(named) == str(file)
    assert base.shared_file(named, f"jsonl:{file}") == str(file) and base.without_tools(named) == f"jsonl:{file}@train"
    for wrong, hint in (("tools:calc:arithmetic", "calculator"), ("tools:calculator", "names no task"),
                        ("tools:calculator:arithmetc", "arithmetic")):  # fmt: skip
        with pytest.raises(UserError, match=hint):
            get(wrong)
    broken = get("tools:no-calculator:products").reset(problem, 1)
    call = Invocation("calculator", {"expression": "1+1"})
    assert broken.step(ModelTurn("", (call,))).messages[0]["content"] == "error: the calculator is not available"


def test_pages_of_products_guess_or_call():
    task = get("products", calls=0.3, slip=0.2, right=0.1)
    pages = [task.written(i) for i in range(1500)]
    callers = [page for page in pages if page.author == "caller"]
    assert 0.26 < len(callers) / 1500 < 0.34 and all(len(page.messages) == 4 for page in callers)
    right = [task.verify(page.problem, page.response).correct for page in callers]
    assert 0.74 < sum(right) / len(callers) < 0.86
    for page in callers:
        call = page.turns[0]["tool_calls"][0]["function"]
        assert call["name"] == "calculator" and page.turns[1]["content"] == calculate(
            json.loads(call["arguments"])["expression"]
        )
        assert page.response == f"<answer>{page.turns[1]['content']}</answer>"
    guesses = [page for page in pages if page.author == "guesser"]
    assert all(page.turns == () for page in guesses)
    assert 0.05 < sum(task.verify(page.problem, page.response).correct for page in guesses) / len(guesses) < 0.15
    sets = [{tuple(sorted(task.problem(s, i).meta["numbers"])) for i in range(500)} for s in base.SPLITS]
    assert not sets[0] & sets[1]


class Server(ThreadingHTTPServer):
    """A game of guessing: the right number is the seed modulo 10. `fault` is what goes wrong at the second step."""

    daemon_threads = True

    def __init__(self, fault=""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.games, self.resets, self.hang = fault, {}, 0, threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/reset":
            server.resets += 1
            server.games[fields["episode_id"]] = [fields["seed"] % 10, 0]
            return self.say({"observation": {"message": "guess"}, "reward": None, "done": False})
        game = server.games[fields["episode_id"]]
        game[1] += 1
        if game[1] == 2 and server.fault:
            return self.fail(server.fault)
        right = fields["action"].get("message") == str(game[0])
        self.say({"observation": {"message": "yes" if right else "no"}, "reward": float(right), "done": right})

    def fail(self, fault):
        if fault == "hang":
            self.server.hang.wait(20)
        elif fault == "dies":
            self.server.shutdown()
            self.server.server_close()
            self.connection.close()
        elif isinstance(fault, int):
            self.send_error(fault)
        else:
            self.say(fault)

    def say(self, what):
        body = what if isinstance(what, bytes) else json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def serve():
    servers = []

    def serve(fault=""):
        servers.append(Server(fault))
        return servers[-1]

    yield serve
    for server in servers:
        server.hang.set()
        server.shutdown()
        server.server_close()


def test_an_environment_behind_a_server(serve):
    server = serve()
    task = get(f"env:{server.url}/")
    assert not task.repeatable and task.parallel > 1
    problem = task.problem("train", 0)
    assert problem == task.problem("train", 0) and problem.meta["seed"] % 2 == 0
    assert task.problem("test", 0).meta["seed"] % 2 == 1, "no seed is in both splits"
    one, other = task.reset(problem, 1), task.reset(problem, 1)
    assert one.start == [{"role": "user", "content": "guess"}] == other.start and len(server.games) == 2
    right = str(problem.meta["seed"] % 10)
    wrong = one.step(ModelTurn("x"))
    assert wrong.messages == [{"role": "user", "content": "no"}] and not wrong.done
    assert one.step(ModelTurn(right)).done and one.verdict("").correct
    called = other.step(ModelTurn("c", (Invocation("look", {"at": 1}),)))
    assert called.messages[0]["role"] == "tool" and not other.verdict("").correct
    for wrong_url in ("env:ftp://x", "env:", "env:http:///x"):
        with pytest.raises(UserError, match="no URL of a server"):
            get(wrong_url)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (500, "status 500"), (302, "status 302"), (b"<html>", "no JSON"), (b"[" * 100_000, "no JSON"),
        ({"done": True}, "no observation"), ([1], "no observation"), (b"x" * (1 << 21), "more than"),
        ({"observation": "x", "reward": "much"}, "reward"), ({"observation": "x", "done": 1}, "done"),
        ("hang", "timed out"), ("dies", "127.0.0.1"),
    ],
)  # fmt: skip
def test_a_server_that_goes_wrong_in_the_middle_fails_the_episode(serve, fault, complaint):
    server = serve(fault)
    task = get(f"env:{server.url}")
    task.seconds = 0.5 if fault == "hang" else 10.0
    episode = task.reset(task.problem("train", 0), 1)
    assert episode.step(ModelTurn("x")).messages
    with pytest.raises(EnvironmentFailure, match=complaint):
        episode.step(ModelTurn("x"))


def test_a_reset_without_a_server_is_tried_again(serve, monkeypatch):
    server = serve()
    url = server.url
    server.shutdown()
    server.server_close()
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    task = get(f"env:{url}")
    with pytest.raises(EnvironmentFailure, match="refused"):
        task.reset(task.problem("train", 0), 1)
    assert slept == [0.2, 1.0]
    failing = get(f"env:{serve().url}")
    failing.url += "/nowhere"
    monkeypatch.setattr(Handler, "do_POST", lambda self: self.send_error(404))
    with pytest.raises(EnvironmentFailure, match="status 404"):
        failing.reset(failing.problem("train", 0), 1)
    assert len(slept) == 2, "an answer is an answer"


def test_a_server_on_a_websocket():
    pytest.importorskip("websockets")
    from websockets.sync.server import serve as serve_socket

    def play(connection):
        total = 0
        for text in connection:
            message = json.loads(text)
            if message["data"] == {"message": "break"}:
                return connection.send(json.dumps({"type": "error", "data": {"message": "bad", "code": "X"}}))
            total += message["type"] == "step"
            data = {"observation": {"count": total}, "reward": 0.5 if total else None, "done": total == 2}
            connection.send(json.dumps({"type": "observation", "data": data}))

    with serve_socket(play, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        task = get(f"env:ws://127.0.0.1:{server.socket.getsockname()[1]}/ws")
        one, other = (task.reset(task.problem("test", 0), 1) for _ in range(2))
        assert one.start[0]["content"] == '{"count": 0}'
        assert not one.step(ModelTurn("a")).done and one.step(ModelTurn("b")).done and one.verdict("").correct
        with pytest.raises(EnvironmentFailure, match="bad"):
            other.step(ModelTurn("break"))
        with pytest.raises(EnvironmentFailure):
            other.step(ModelTurn("c"))
        one.close()
        other.close()
        server.shutdown()
    with pytest.raises(EnvironmentFailure):
        task.reset(task.problem("test", 0), 1)


def test_a_class_of_one_s_own_says_what_an_action_and_an_observation_are(serve, tmp_path):
    file = tmp_path / "game.py"
    file.write_text(
        "from bessemer.tasks.env_server import ServerEnvironment\n"
        f"class Game(ServerEnvironment):\n    url = {serve().url!r}\n"
        "    def action(self, action):\n        return {'message': action.text.strip('<>')}\n"
        "    def text(self, observation):\n        return observation['message'].upper()\n"
    )
    with pytest.warns(UserWarning, match="your own code"):
        task = get(f"{file}:Game")
    assert isinstance(task, ServerEnvironment)
    problem = task.problem("train", 4)
    episode = task.reset(problem, 1)
    assert episode.start[0]["content"] == "GUESS" and episode.step(ModelTurn(f"<{problem.meta['seed'] % 10}>")).done


class StandIn:
    """What `env_verifiers` uses of the package verifiers 0.1, by its documentation: a loop that asks its client for
    every answer, and a rubric."""

    tool_defs = (types.SimpleNamespace(name="add", description="Adds.", parameters={"type": "object"}),)

    def __init__(self, rewrites=False, breaks=False):
        self.rubric, self.rewrites, self.breaks = self, rewrites, breaks

    def get_dataset(self):
        return [{"prompt": [{"role": "user", "content": f"Guess {n}."}], "answer": str(n)} for n in range(3)]

    get_eval_dataset = get_dataset

    async def rollout(self, row, client, model, sampling_args):
        prompt = list(row["prompt"])
        for turn in range(3):
            response = await client.get_response(prompt, model, sampling_args)
            if self.breaks:
                raise ValueError("bug")
            if row["answer"] in response.message.content:
                return {"answer": row["answer"], "said": response.message.content, "turns": turn}
            prompt = [*prompt, {"role": "assistant", "content": response.message.content}]
            prompt = [*(prompt[1:] if self.rewrites else prompt), {"role": "user", "content": "no"}]
        return {"answer": row["answer"], "said": ""}

    async def score_rollout(self, state):
        state["reward"] = float(state["answer"] in state["said"])


def test_an_environment_of_verifiers(monkeypatch):
    made = {}
    module = types.ModuleType("verifiers")
    module.Client, module.load_environment = object, lambda name: made.setdefault(name, StandIn(*name.split("/")[1:]))
    kinds = types.ModuleType("verifiers.types")
    kinds.ToolCall = kinds.ResponseMessage = kinds.Response = types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "verifiers", module)
    monkeypatch.setitem(sys.modules, "verifiers.types", kinds)
    task = get("verifiers:guess")
    assert task.size("test") == 3 and task.schemas[0]["function"]["name"] == "add"
    problem = task.problem("train", 2)
    episode = task.reset(problem, 1)
    assert episode.start == [{"role": "user", "content": "Guess 2."}] and problem.prompt == "Guess 2."
    assert episode.step(ModelTurn("1")).messages == [{"role": "user", "content": "no"}]
    assert episode.step(ModelTurn("is it 2?")).done and episode.verdict("").correct
    lost = task.reset(problem, 1)
    for n in range(3):
        assert lost.step(ModelTurn("no idea")).done == (n == 2)
    assert not lost.verdict("").correct and lost.verdict("").answer == "0"
    given_up = task.reset(problem, 1)
    given_up.step(ModelTurn("1"))
    given_up.close()
    assert not given_up.verdict("").correct
    made["guess"].rewrites = True
    with pytest.raises(EnvironmentFailure, match="rewrote the conversation"):
        task.reset(problem, 1).step(ModelTurn("1"))
    made["guess"].rewrites, made["guess"].breaks = False, True
    with pytest.raises(EnvironmentFailure, match="ValueError: bug"):
        task.reset(problem, 1).step(ModelTurn("1"))
    del module.load_environment
    with pytest.raises(UserError, match=r"verifiers<0\.4"):
        get("verifiers:guess")
