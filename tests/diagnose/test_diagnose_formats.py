"""One history in the form of every trainer gives the same diagnosis; damaged, strange and hostile logs are named.

The lines are written here, as the trainers' sources write them: TRL 1.16 and transformers 5, verl 0.8, prime-rl 0.8 and
0.2, OpenRLHF 0.11, trackio 0.43, W&B's two kinds of CSV.
"""

import csv
import gzip
import json
import math
import sqlite3

import pytest

from bessemer.addons.diagnose.command import main
from bessemer.addons.diagnose.diagnosis import diagnose
from bessemer.addons.diagnose.formats import Unreadable

STEPS = 60


def history(steps=STEPS):
    """Entropy falls from 0.8 to nothing while everything else is well."""
    for step in range(1, steps + 1):
        yield step, {
            "reward": 0.3 + 0.003 * step, "entropy": 0.8 * 0.88**step, "kl": 0.001 * step, "norm": 0.4, "lr": 1e-6,
            "length": 200 + step, "cut": 0.02, "loss": 0.01,
        }  # fmt: skip


TRL = {"reward": "reward", "entropy": "entropy", "kl": "kl", "norm": "grad_norm", "lr": "learning_rate",
       "length": "completions/mean_length", "cut": "completions/clipped_ratio", "loss": "loss"}  # fmt: skip
VERL = {"reward": "critic/score/mean", "entropy": "actor/entropy", "kl": "actor/kl_loss", "norm": "actor/grad_norm",
        "lr": "actor/lr", "length": "response_length/mean", "cut": "response_length/clip_ratio"}  # fmt: skip
PRIME = {"reward": "reward", "length": "num_output_tokens", "cut": "is_truncated"}
PRIME = {here: f"train/agg/effective/agent/{there}/mean" for here, there in PRIME.items()}
PRIME_TRAINER = {"entropy": "entropy/all/mean", "loss": "loss/mean"}
OPEN = {"reward": "reward", "entropy": "entropy_loss", "kl": "kl", "norm": "actor_grad_norm", "lr": "actor_lr",
        "length": "response_length", "cut": "response_clip_ratio"}  # fmt: skip
OURS = {"reward": "rl/reward", "entropy": "rl/entropy", "kl": "rl/kl", "norm": "rl/grad_norm", "lr": "rl/lr",
        "length": "rl/length", "cut": "rl/truncated"}  # fmt: skip


def renamed(values, names):
    return {there: values[here] for here, there in names.items()}


def trainer_state(path):
    log = [renamed(values, TRL) | {"step": step, "epoch": step / 100} for step, values in history()]
    path.write_text(
        json.dumps({"global_step": STEPS, "log_history": [*log, {"train_runtime": 5.0, "step": STEPS}]}, indent=2)
    )


def trl_console(path):
    lines = ["Loading checkpoint shards: 100%|##########| 2/2\n"]
    for step, values in history():
        lines.append(f"  {step}%|#  | {step}/100 [00:0{step}<01:00]{ {**renamed(values, TRL), 'epoch': 0.1} }\n")
    path.write_text("".join(lines))


def trl_console_quoted(path):
    path.write_text(
        "".join(
            f"{ {name: f'{value:.4g}' for name, value in renamed(values, TRL).items()} }\n" for _, values in history()
        )
    )


def verl_console(path):
    with path.open("w") as file:
        print("(TaskRunner pid=71) {'actor_rollout_ref': {'actor': {'clip_ratio': 0.2}}}", file=file)
        for step, values in history():
            named = {"actor/kl_coef": 0.001, "global_seqlen/min": 7} | renamed(values, VERL)
            said = " - ".join(f"{name}:{value!r}" for name, value in named.items())
            print(f"\x1b[36m(TaskRunner pid=71)\x1b[0m step:{step} - {said} - timing_s/gen:np.float64(3.5)", file=file)


def verl_file(path):
    lines = (json.dumps({"step": step, "data": {"actor/kl_coef": 0.001} | renamed(values, VERL)})
             for step, values in history())  # fmt: skip
    path.write_text("\n".join(lines))


def prime_file(path):
    with path.open("w") as file:
        for step, values in history():
            for part in (renamed(values, PRIME), {"optim/lr": 1e-6, "optim/grad_norm": 0.4},
                         renamed(values, PRIME_TRAINER)):  # fmt: skip
                print(json.dumps({"step": step, "time": 1e9} | part), file=file)


def prime_console(path):
    with path.open("w") as file:
        for step, values in history():
            print(f"12:00:01 SUCCESS [orch] Step {step} |   3.21s | Reward {values['reward']:.4f} | "
                  "Trainable 60/64 (93.8%) | Turns 1.0 | Branches 1.0 | Max Off-Policy 1 | "
                  "Error 0.0% | Cancelled 0.0% | Truncation 2.0%", file=file)  # fmt: skip
            print(f"12:00:02 SUCCESS Step {step} |   2.10s | Loss 0.0100 | Entropy {values['entropy']:.4f} | "
                  "Mismatch KL 0.0007 | Grad. Norm 0.4000 | LR 1.00e-06 | Throughput 900 tokens/s | MFU 9.1%",
                  file=file)  # fmt: skip


def prime_json_console(path):
    prime_console(path)
    lines = [
        json.dumps({"timestamp": "t", "level": "SUCCESS", "message": line[16:]})
        for line in path.read_text().splitlines()
    ]
    path.write_text("\n".join(lines))


def openrlhf_console(path):
    with path.open("w") as file:
        print("INFO 08-13 10:00:00 ppo_trainer.py:224] Sample: ['{\"a\": 1}', 0.5]", file=file)
        for step, values in history():
            print(f"INFO 08-13 10:00:01 ppo_trainer.py:547] ✨ Global step {step}: "
                  f"{ {'policy_loss': -0.01, 'ppo_kl': 0.0} | renamed(values, OPEN)}", file=file)  # fmt: skip


def own_lines(path):
    lines = (
        json.dumps({"step": step, "tokens": 10 * step, "values": renamed(values, OURS)}) for step, values in history()
    )
    path.write_text("\n".join(lines) + "\n")


def wandb_history(path):
    with path.open("w", newline="") as file:
        names = ["", "_step", "_runtime", *(f"train/{name}" for name in TRL.values()), "train/global_step"]
        out = csv.writer(file)
        out.writerow(names)
        for step, values in history():
            out.writerow([step - 1, step, 1.5, *renamed(values, TRL).values(), step])


def wandb_panel(path):
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        names = [f"my run - train/{name}{kind}" for name in TRL.values() for kind in ("", "__MIN", "__MAX")]
        out.writerow(["Step", *names])
        for step, values in history():
            out.writerow([step, *(each for value in renamed(values, TRL).values() for each in (value, -9, 99))])


def trackio(path):
    database = sqlite3.connect(path)
    database.execute(
        "CREATE TABLE metrics (id INTEGER PRIMARY KEY, run_id TEXT, timestamp TEXT, run_name TEXT, "
        "step INTEGER, metrics TEXT)"
    )
    for step, values in history():
        metrics = {f"train/{name}": value for name, value in renamed(values, TRL).items()} | {"train/global_step": step}
        row = ("a", "t", "calm-lake-1", step - 1, json.dumps(metrics).encode())  # a BLOB
        database.execute("INSERT INTO metrics (run_id, timestamp, run_name, step, metrics) VALUES (?, ?, ?, ?, ?)", row)
    database.commit()
    database.close()


FORMS = {
    "trainer_state.json": (trainer_state, "trl"), "trl.log": (trl_console, "trl"),
    "quoted.log": (trl_console_quoted, "trl"),
    "verl.log": (verl_console, "verl"), "verl.jsonl": (verl_file, "verl"), "prime.jsonl": (prime_file, "prime-rl"),
    "prime.log": (prime_console, "prime-rl"), "prime_json.log": (prime_json_console, "prime-rl"),
    "open.log": (openrlhf_console, "openrlhf"), "metrics.jsonl": (own_lines, "bessemer"),
    "history.csv": (wandb_history, "trl"), "panel.csv": (wandb_panel, "trl"), "trackio.db": (trackio, "trl"),
}  # fmt: skip


def only_run(path, own=None):
    (run,) = diagnose(path, own).runs
    return run


def codes(path):
    return [finding.code for finding in only_run(path).findings]


@pytest.mark.parametrize("file", FORMS)
def test_every_form_tells_the_same(file, tmp_path):
    make, trainer = FORMS[file]
    make(tmp_path / file)
    run = only_run(tmp_path / file)
    assert run.named.key == trainer and run.records in (STEPS, STEPS + 1)
    (finding,) = run.findings
    assert finding.code == "entropy-collapse" and 25 <= finding.since <= 33
    curve = [value for _, value in finding.curves["entropy"]]
    assert curve[:3] == pytest.approx([0.8 * 0.88**n for n in (1, 2, 3)], rel=2e-3) and len(curve) == STEPS
    values = {metric: column for metric, column in next(run.named.rows())[1].items()}
    assert values["truncated"] == pytest.approx(0.02) and values["length"] == 201 if "length" in values else True
    assert values["reward"] == pytest.approx(0.303, abs=1e-3) and values["lr"] == 1e-6
    assert "accuracy" not in run.named.called and "format-hacking" in run.not_judged


def test_a_reward_is_no_accuracy_unless_it_is_called_so_and_a_share(tmp_path):
    def log(scale):
        path = tmp_path / "trainer_state.json"
        records = [
            {"step": n, "reward": 0.1, "reward_std": 0.3, "completions/mean_length": 50.0,
             "rewards/accuracy_reward/mean": 0.1 * scale, "rewards/format_reward/mean": min(1.0, 0.5 + 0.02 * n)}
            for n in range(1, 41)
        ]  # fmt: skip
        path.write_text(json.dumps({"log_history": records}))
        return path

    assert codes(log(1)) == ["format-hacking"]
    run = only_run(log(20))
    assert run.findings == [] and "accuracy" in run.named.refused and "accuracy" in run.not_judged["format-hacking"]
    named = only_run(log(1), {"accuracy": "rewards/format_reward/mean"})
    assert named.named.called["accuracy"] == "rewards/format_reward/mean" and named.findings == []


def test_a_kl_that_is_not_computed_is_no_frozen_reference(tmp_path):
    verl = "".join(
        f"step:{n} - actor/kl_loss:0.0 - actor/grad_norm:0.3 - actor/lr:1e-06 - critic/score/mean:0.2{{}}\n"
        for n in range(60)
    )
    (tmp_path / "a.log").write_text(verl.replace("{}", ""))
    (tmp_path / "b.log").write_text(verl.replace("{}", " - actor/kl_coef:0.001"))
    assert codes(tmp_path / "a.log") == [] and codes(tmp_path / "b.log") == ["frozen-reference"]
    for value, expected in ((0.0, []), (-0.02, ["negative-kl"])):
        lines = (
            f"Global step {n}: {{'kl': {value}, 'actor_grad_norm': 0.5, 'actor_lr': 1e-6, 'reward': 0.1}}"
            for n in range(60)
        )
        (tmp_path / "c.log").write_text("\n".join(lines))
        assert codes(tmp_path / "c.log") == expected


def test_a_cut_log_is_read_up_to_the_cut(tmp_path):
    for file in ("trainer_state.json", "verl.jsonl", "open.log", "verl.log"):
        FORMS[file][0](tmp_path / file)
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text(text[: int(len(text) * 0.9)])
        log = diagnose(tmp_path / file)
        assert [finding.code for finding in log.runs[0].findings] == ["entropy-collapse"], file
        assert log.tally.broken or log.tally.notes or "log" in file


def test_a_gzipped_log_and_one_cut(tmp_path):
    verl_file(tmp_path / "a")
    packed = gzip.compress((tmp_path / "a").read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    assert codes(tmp_path / "a.jsonl.gz") == ["entropy-collapse"]
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) * 2 // 3])
    assert diagnose(tmp_path / "a.jsonl.gz").tally.notes


def test_steps_repeated_after_a_resume_count_once_and_a_second_run_is_another(tmp_path):
    verl_file(tmp_path / "a.jsonl")
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:40] + lines[25:]))
    run = only_run(tmp_path / "a.jsonl")
    assert run.records == STEPS and run.run.columns.steps == [*range(1, STEPS + 1)] and "resumed" in run.run.notes[0]
    (tmp_path / "a.jsonl").write_text("\n".join(lines + lines[:40]))
    first, second = diagnose(tmp_path / "a.jsonl").runs
    assert (first.records, second.records) == (STEPS, 40) and first.run.name != second.run.name


def test_values_that_are_not_finite_are_findings_and_do_no_harm(tmp_path):
    for word, form in (("NaN", "json"), ("nan", "console")):
        lines = []
        for n in range(1, 31):
            loss = word if n > 25 else 0.1
            table = {"step": n, "loss": loss, "reward": 0.1, "reward_std": 0.2, "completions/mean_length": 9.0}
            text = json.dumps(table).replace('"NaN"', "NaN") if form == "json" else str(table).replace("'nan'", "nan")
            lines.append(text)
        (tmp_path / "a.log").write_text("\n".join(lines))
        run = only_run(tmp_path / "a.log")
        assert [finding.code for finding in run.findings] == ["not-finite"] and run.findings[0].since == 28
        assert all(math.isfinite(value) for _, value in run.findings[0].curves["loss"])


def trl_records(path, **changed):
    """A healthy run of TRL, pretty-printed; `changed`: the log's name -> its value at a step."""
    log = []
    for step in range(1, STEPS + 1):
        healthy = {"reward": 0.3, "reward_std": 0.4, "entropy": 0.6, "kl": 0.01, "grad_norm": 0.3, "loss": 0.01,
                   "completions/mean_length": 200.0, "step": step}  # fmt: skip
        log.append(healthy | {name.replace("__", "/"): made(step) for name, made in changed.items()})
    path.write_text(json.dumps({"global_step": STEPS, "log_history": log}, indent=2))


def test_what_was_never_finite_is_a_finding(tmp_path):
    trl_records(tmp_path / "a.json", grad_norm=lambda step: math.nan, kl=lambda step: math.nan)
    run = only_run(tmp_path / "a.json")
    assert [(finding.code, finding.since) for finding in run.findings] == [("not-finite", 3)]


def test_nan_weights_explain_answers_without_an_end(tmp_path):
    broken = {name: (lambda step: math.nan if step >= 50 else 0.3) for name in ("grad_norm", "loss", "entropy")}
    trl_records(tmp_path / "a.json", **broken, completions__clipped_ratio=lambda step: 1.0 if step >= 51 else 0.2)
    first, second = only_run(tmp_path / "a.json").findings
    assert (first.code, second.code) == ("not-finite", "never-ending") and second.follows_from == ["not-finite"]


@pytest.mark.parametrize(("pays", "share"), [(1.0, True), (2.0, False)])
def test_a_reward_of_two_for_a_right_answer_is_no_accuracy(tmp_path, pays, share):
    right = 0.45
    trl_records(
        tmp_path / "a.json",
        rewards__correctness_reward_func__mean=lambda step: pays * right,
        rewards__correctness_reward_func__std=lambda step: pays * math.sqrt(right * (1 - right)),
    )
    named = only_run(tmp_path / "a.json").named
    assert ("accuracy" in named.called) is share and ("accuracy" in named.refused) is not share


@pytest.mark.parametrize("resumed", [False, True])
def test_w_and_b_s_own_step_counts_calls_and_not_steps(tmp_path, resumed):
    """transformers gives W&B no step, so `_step` goes on where a resumed run goes back."""
    steps = [*range(1, 51), *range(31, 81)] if resumed else [*range(1, 61)]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["_step", "train/reward_std", "train/kl", "train/loss", "train/global_step"])
        for call, step in enumerate(steps):
            far = 3.0 if step >= (60 if resumed else 40) or 40 <= call <= 49 else 0.01
            out.writerow([2 * call, 0.4, far, 0.01, step])
            out.writerow([2 * call + 1, "", "", 0.01, ""])  # of a call without a step
    run = only_run(tmp_path / "a.csv")
    assert run.run.columns.steps == [*range(1, max(steps) + 1)]
    assert [(finding.code, finding.since) for finding in run.findings] == [("kl-runaway", 62 if resumed else 42)]


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_two_processes_write_into_one_log_and_one_is_ahead(tmp_path, ahead):
    """prime-rl's orchestrator samples for later steps than the trainer trains on."""
    prime_console(tmp_path / "a.log")
    lines = (tmp_path / "a.log").read_text().replace("Truncation 2.0%", "Truncation 80.0%").splitlines()
    orchestrator, trainer = lines[::2], lines[1::2]
    mixed = orchestrator[:ahead]
    for n, line in enumerate(trainer):
        mixed += [*orchestrator[n + ahead : n + ahead + 1], line]
    (tmp_path / "a.log").write_text("\n".join(mixed))
    run = only_run(tmp_path / "a.log")
    assert run.run.columns.steps == [*range(1, STEPS + 1)] and not run.run.notes
    assert {"never-ending", "entropy-collapse"} <= {finding.code for finding in run.findings}


@pytest.mark.parametrize("kind", ["gzip", "cut gzip", "BOM", "UTF-16", "NULs"])
def test_a_trainer_state_in_other_encodings(tmp_path, kind):
    trainer_state(tmp_path / "a")
    text = (tmp_path / "a").read_text()
    packed = gzip.compress(text.encode())
    made = {"gzip": packed, "cut gzip": packed[: len(packed) * 4 // 5], "BOM": text.encode("utf-8-sig"),
            "UTF-16": text.encode("utf-16"), "NULs": text.encode()[:-9] + bytes(9)}  # fmt: skip
    (tmp_path / "a.json").write_bytes(made[kind])
    run = only_run(tmp_path / "a.json")
    assert [finding.code for finding in run.findings] == ["entropy-collapse"]
    assert run.records == STEPS or kind == "cut gzip"


def test_a_table_with_a_byte_order_mark(tmp_path):
    wandb_panel(tmp_path / "a.csv")
    text = (tmp_path / "a.csv").read_text()
    (tmp_path / "a.csv").write_text(text.replace("my run", "grpo - lr 1e-6"), encoding="utf-8-sig")
    run = only_run(tmp_path / "a.csv")
    assert [finding.code for finding in run.findings] == ["entropy-collapse"] and not run.run.by_order


def test_two_runs_of_one_name_in_trackio(tmp_path):
    """Logged at the same time, they are told apart by their ids."""
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute("CREATE TABLE metrics (id INTEGER PRIMARY KEY, run_id TEXT, run_name TEXT, step INT, metrics)")
        for step in range(1, 61):
            for key, kl in (("x", 0.01), ("y", 2.0)):
                values = json.dumps({"kl": kl, "reward": 0.3, "reward_std": 0.4})
                database.execute("INSERT INTO metrics VALUES (NULL, ?, 'grpo', ?, ?)", (key, step, values))
    first, second = diagnose(tmp_path / "a.db").runs
    assert first.records == second.records == 60 and first.run.name != second.run.name
    assert not first.findings and [finding.code for finding in second.findings] == ["kl-runaway"]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("empty.log", b"", "empty"),
        ("run-x.wandb", b":W&B\x00\x01\x02" * 9, "export"),
        ("events.out.tfevents.1", b"\x18\x00\x00\x00" * 9, "TensorBoard"),
        ("training_args.bin", b"PK\x03\x04\x00\x00" * 9, "never opened"),
        ("x.log", b"\x00\x01\x02\x03" * 50, "binary"),
        ("words.log", b"nothing of interest\n" * 50, "no record"),
        ("other.db", b"SQLite format 3\0" + b"\1" * 90, "SQLite"),
        ("x.json", b"[1, 2, 3]", "no record"),
        ("unknown.jsonl", b'{"step": 1, "my_gain": 2.0}\n{"step": 2, "my_gain": 2.5}\n', "my_gain"),
        ("deep.json", b"[" * 100_000, "no record"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(name, content, word, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Unreadable, match=word):
        diagnose(tmp_path / name)
    assert main([str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error and "Traceback" not in error


def test_folders(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert main([str(tmp_path / "run")]) == 2 and main([str(tmp_path / "absent")]) == 2
    for step in (20, 100):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir()
        trainer_state(tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json")
    capsys.readouterr()
    assert main([str(tmp_path / "run")]) == 1 and "checkpoint-100" in capsys.readouterr().out
    trainer_state(tmp_path / "run" / "trainer_state.json")  # an older run's, of 60 steps
    assert main([str(tmp_path / "run")]) == 1 and "checkpoint-100" in capsys.readouterr().out
    (tmp_path / "logs").mkdir()
    for step in range(20):  # as verl saves models beside its log
        (tmp_path / "logs" / f"global_step_{step}").mkdir()
        for name in ("config.json", "tokenizer.json", "trainer.json"):
            (tmp_path / "logs" / f"global_step_{step}" / name).write_text('{"a": 1}')
    verl_console(tmp_path / "logs" / "train.log")
    (tmp_path / "logs" / "notes.txt").write_text("buy milk\n")
    assert main([str(tmp_path / "logs"), "--json"]) == 1
    assert [log["log"].endswith("train.log") for log in json.loads(capsys.readouterr().out)["logs"]] == [True]


def test_a_metric_s_name_that_no_log_has_is_said(tmp_path, capsys):
    trainer_state(tmp_path / "a.json")
    assert main([str(tmp_path / "a.json"), "--metric", "accuracy=rewards/typo/mean"]) == 2
    assert "rewards/typo/mean" in capsys.readouterr().err


def test_hostile_text_is_neither_run_nor_shown_raw(tmp_path, capsys):
    lines = [
        f"step:{n} - actor/entropy:{0.8 * 0.8**n} - <script>alert(1)</script>/\x1b]0;x\x07:1.0 - actor/lr:1e-06"
        for n in range(60)
    ]
    lines.append("{'loss': __import__('os').system('touch /tmp/owned'), 'reward': 1.0}")
    (tmp_path / "a.log").write_text("\n".join(lines))
    assert main([str(tmp_path / "a.log"), "--html", str(tmp_path / "p.html")]) == 1
    assert "\x1b" not in capsys.readouterr().out and "<script" not in (tmp_path / "p.html").read_text()


def test_a_name_in_a_log_does_not_steer_the_terminal(tmp_path, capsys):
    evil = "rewards/\x1b[2Jaccuracy\r/mean"
    for name, code in ((evil, 0), ("\x1b]0;evil\x07", 2)):
        lines = [json.dumps({"step": n, name: 0.5} | ({"reward_std": 0.5} if code == 0 else {})) for n in range(9)]
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        assert main([str(tmp_path / "a.jsonl")]) == code
        printed = "".join(capsys.readouterr())
        assert "accuracy" in printed or "evil" in printed
        assert not {"\x1b", "\r", "\x07"} & {*printed}


def test_memory_is_bounded_by_what_is_kept(tmp_path):
    """A line without an end, and a million lines that are no records, cost no memory that stays."""
    import tracemalloc

    with (tmp_path / "a.log").open("w") as file:
        file.write("x" * (6 << 20) + "\n")
        for step, values in history():
            file.write("INFO something else happens here, over and over\n" * 2000)
            file.write(f"step:{step} - actor/entropy:{values['entropy']} - actor/lr:1e-06\n")
    tracemalloc.start()
    try:
        assert codes(tmp_path / "a.log") == ["entropy-collapse"]
        assert tracemalloc.get_traced_memory()[1] < 30 << 20
    finally:
        tracemalloc.stop()


def test_the_command_prints_curves_and_codes(tmp_path, capsys):
    trainer_state(tmp_path / "trainer_state.json")
    assert main([str(tmp_path), "--metric", "format=reward"]) == 1
    text = capsys.readouterr().out
    assert "ENTROPY COLLAPSE since step" in text and "▇" in text and "epsilon_high" in text and "not judged" in text
    assert main([str(tmp_path), "--metric", "nonsense"]) == 2
    assert main([str(tmp_path), "--json"]) == 1
    (run,) = json.loads(capsys.readouterr().out)["logs"][0]["runs"]
    assert run["findings"][0]["code"] == "entropy-collapse" and run["understood"]["kl"] == "kl"
    calm = [{"step": n, "reward": 0.1, "reward_std": 0.3, "completions/mean_length": 50.0} for n in range(50)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": calm}))
    assert main([str(tmp_path)]) == 0 and "no alarm" in capsys.readouterr().out
