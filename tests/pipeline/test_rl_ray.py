"""Separate rollout workers on a real Ray: the run of one process bit for bit, even if workers are killed meanwhile."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rl_stage
import torch
from rl_parts import collective_of

from bessemer.addons.distributed import ray_cluster, ray_worker, worker_pool
from bessemer.addons.distributed.rank0_sampler import TrainedPolicy
from bessemer.addons.distributed.ray_sampler import RaySampler
from bessemer.addons.distributed.ray_worker import RolloutWorker
from bessemer.addons.distributed.worker_pool import WorkerPool
from bessemer.addons.watch.replay import replay
from bessemer.config.recipe import Recipe
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.hf.model_directory import load
from bessemer.pipeline.stages.rl import RL
from bessemer.train import setup
from bessemer.train.runtime import Runtime, Whole
from bessemer.workers import side_by_side

COIN = rl_stage.COIN
ALL = (COIN, "rollouts=4", "top_p=0.9",
       rl_stage.AHEAD_CORRECTED, "max_resamples=2", "kl.reference_every=3", "lr=1e-2")  # fmt: skip
TIMES = (
    "rl/trainer_waited", "rl/workers_waited", "rl/trainer_waited_seconds", "rl/workers_waited_seconds",
    "rl/handover_seconds", "rl/worker_restarts",
)  # fmt: skip
MINUTE = 60


def leaves(stage):
    """What must not depend on where rollouts are sampled."""
    actual = stage.leaves()
    facts = json.loads(actual["metrics"])
    for line in facts:
        for name in TIMES:
            line["values"].pop(name, None)
    return actual | {"metrics": facts, "rollouts": (stage.out / "rollouts.jsonl").read_bytes()}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Two samples each, so that one rollout keeps several workers busy."""
    monkeypatch.setattr(setup, "batch_rows", lambda samples: 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return rl_stage.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def own_ray():
    """One Ray for all tests of this file, started as a run would start it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(ray_cluster.ADDRESS, raising=False)
        patch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
        connection = ray_cluster.RayCluster(weights=1 << 20)
    yield connection.ray
    connection.close()


@pytest.fixture
def messages():
    return []


def start(base, n, kind):
    directory = str(base / "model")
    model, tokenizer = setup.load_model(base / "model")
    version = iter(range(10**6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_pool, "RolloutWorker", kind)
        make = lambda: WorkerPool(ray_cluster.RayCluster(weights=0), "ray", directory, n, 0, print)  # noqa: E731
        trained = TrainedPolicy(Whole(model), collective_of(model), lambda: next(version), Runtime())
        sampler = RaySampler(Engine(model, tokenizer), trained, make)
        sampler.open()
    return sampler


@pytest.fixture(scope="module")
def pooled():
    """The open sampler with one worker that tests share; it closes when a test needs Ray's CPUs for others."""
    checkpoints = []
    yield checkpoints
    for sampler in checkpoints:
        sampler.close()


@pytest.fixture
def ray(own_ray, pooled):
    """Ray with all its CPUs free."""
    while pooled:
        pooled.pop().close()
    return own_ray


@pytest.fixture
def shared(own_ray, base, pooled, messages):
    """An open sampler with one idle worker, which may have worked before."""
    if pooled and (pooled[0].pool._loading or any(pooled[0].pool._queues)):
        pooled.pop().close()  # a test failed in the middle
    if not pooled:
        pooled.append(start(base, 1, RolloutWorker))
    pooled[0].pool.say = messages.append
    return pooled[0]


@pytest.fixture
def opened(ray, base, messages):
    """A function: number of workers, class of worker -> an open sampler with them."""
    samplers = []

    def make(n=1, kind=RolloutWorker):
        samplers.append(start(base, n, kind))
        samplers[-1].pool.say = messages.append
        return samplers[-1]

    yield make
    for sampler in samplers:
        sampler.close()


def pid_of(ray, worker):
    return ray.get(worker.__ray_call__.remote(lambda self: os.getpid()))


ASKED = dict(samples=8, temperature=1.0, max_new_tokens=150, batch_rows=8, seeds=[1, 2, 3, 4])
PROMPTS = [[0, 5, 6, n] for n in range(7, 11)]


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    stage = rl_stage.Stage(base, tmp_path_factory.mktemp("whole") / "run", *ALL)
    stage.run()
    return stage


def test_ray_workers_give_the_local_run_though_one_is_killed(ray, undisturbed, base, tmp_path, monkeypatch):
    """One rollout ahead, two sampling rounds, replayed routing; a worker dies while the second policy is sampled."""
    monkeypatch.setattr(RaySampler, "trainer_workers", lambda rollout: side_by_side(2))  # forked beside Ray's threads
    stage = rl_stage.Stage(base, tmp_path / "run", *ALL, "rollout.engine=ray", "rollout.workers=2")
    loop = stage.loop()
    loop.sampler.open()
    submit, submitted, lines = loop.sampler.pool.submit, [], []
    monkeypatch.setattr(loop.ctx.progress, "say", lines.append)
    victims = [pid_of(ray, loop.sampler.pool.workers[0])]

    def deadly(jobs):
        submit(jobs)
        submitted.extend(jobs)
        if jobs and jobs[0].version == 2 and victims:
            os.kill(victims.pop(), signal.SIGKILL)

    loop.sampler.pool.submit = deadly
    loop.run()
    assert rl_stage.differences(leaves(stage), leaves(undisturbed)) == []
    assert stage.values("rl/staleness") == [0, 2, 2, 2]
    assert sum(stage.values("rl/worker_restarts")) == 1 and len([x for x in lines if "worker died" in str(x)]) == 1
    for name in TIMES[:2]:
        assert all(0 <= share <= 1 for share in stage.values(name)) and len(stage.values(name)) == 4
    assert sum(len(job.batch.samples) == 2 for job in submitted) >= 4 * 4, "a lot of eight is cut into four calls"


def test_ray_without_sample_ahead_gives_the_local_run(ray, base, tmp_path):
    few = (COIN, "rollouts=2", "updates_per_rollout=1", 'rollout.precision="bfloat16"')
    here = rl_stage.Stage(base, tmp_path / "here", *few)
    here.run()
    apart = rl_stage.Stage(base, tmp_path / "apart", *few, "rollout.engine=ray")
    apart.run()
    assert rl_stage.differences(leaves(apart), leaves(here)) == [] and apart.values("rl/staleness") == [0, 0]
    assert replay(apart.as_run(), "zero", 2, from_start=True).differences() == [{}]


def test_weights_arrive_bit_for_bit_and_late_samples_keep_their_version(own_ray, shared):
    sampler = shared
    model = sampler.engine.model
    old, expected = sampler.policy(), sampler.engine.generate(PROMPTS, **ASKED)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, dtype=tensor.dtype) * 0.01)
    new = sampler.policy()
    assert sampler.engine.model.gates() and any("bias_E" in name for name in model.state_dict())
    after = new(PROMPTS, **ASKED).take()
    pack = lambda self: ray_worker.pack_weights(self.engine.model.state_dict())  # noqa: E731
    held = ray_worker.unpack_weights(own_ray.get(sampler.pool.workers[0].__ray_call__.remote(pack)))
    for name, tensor in model.state_dict().items():
        assert torch.equal(held[name], tensor), name
    assert held.keys() == model.state_dict().keys()
    assert after == sampler.engine.generate(PROMPTS, **ASKED) != expected
    assert old(PROMPTS, **ASKED).take() == expected, "asked now, drawn by the weights of then"


def test_workers_sample_while_nobody_polls(own_ray, shared):
    """A worker finishes all calls in its queue without the trainer asking in between."""
    sampler, waited, busy = shared, shared.waited, shared.pool.busy
    answer = sampler.policy()(PROMPTS, **ASKED)
    refs = [ref for queue in sampler.pool._queues for ref in queue]
    assert len(refs) == 4 and not answer.ready()
    done, _ = own_ray.wait(refs, num_returns=len(refs), timeout=MINUTE)
    assert len(done) == 4
    began = time.monotonic()
    assert answer.ready()
    answer.take()
    assert sampler.waited - waited <= time.monotonic() - began and sampler.pool.busy > busy


def test_killing_all_workers_changes_no_sample(ray, opened, messages):
    sampler = opened(2)
    asked = ASKED | dict(samples=128, batch_rows=128)  # long calls, so that they are killed in the middle of one
    expected = sampler.engine.generate(PROMPTS, **asked)
    victims = [pid_of(ray, worker) for worker in sampler.pool.workers]
    answer = sampler.policy()(PROMPTS, **asked)
    first, second = sampler.pool._queues[0]
    ray.wait([first], timeout=MINUTE)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    assert not ray.wait([second], timeout=0)[0], "it was drawing its second call"
    assert answer.take() == expected
    assert len(messages) == 2 and all("a rollout worker died (killed by a signal" in line for line in messages)
    assert any("samples are generated again" in line for line in messages)
    assert sampler.metrics()["rl/worker_restarts"] == 2


def test_a_worker_that_cannot_start_says_why(ray, opened):
    class Lost(RolloutWorker):
        def __init__(self, *args):
            import numpy.nowhere  # noqa: F401

    with pytest.raises(UserError, match=r"cannot start: .*'numpy.nowhere'; install"):
        opened(1, Lost)


def test_workers_that_die_again_and_again_stop_the_run(ray, opened, messages, monkeypatch):
    monkeypatch.setattr(worker_pool, "DEATHS", 2)

    class Doomed(RolloutWorker):
        def generate(self, version, weights, batch):
            if version == 1:  # of the check at the start
                return super().generate(version, weights, batch)
            os.kill(os.getpid(), signal.SIGKILL)

    sampler = opened(1, Doomed)
    with pytest.raises(
        UserError,
        match=r"died 2 times in a row .*killed by a signal",
    ):
        sampler.generate(PROMPTS, **ASKED)
    assert len(messages) == 1


def test_a_worker_with_other_logprobs_is_refused_at_the_start(ray, opened):
    class Turned(RolloutWorker):
        def _make_engine(self):
            engine = super()._make_engine()
            load = engine.load
            engine.load = lambda weights, _: load(
                {n: w.flip(0) if n == "embed.weight" else w for n, w in weights.items()}
            )
            return engine

    with pytest.raises(UserError, match=r"differ by .*Likely causes"):
        opened(1, Turned)


def test_a_worker_with_stale_weights_is_refused_at_the_next_exchange(ray, opened):
    class Stale(RolloutWorker):
        def generate(self, version, weights, batch):
            if version > 1:
                self.engine.load = lambda *_: None  # a reload that returns without a word
            return super().generate(version, weights, batch)

    sampler = opened(1, Stale)
    sampler.generate(PROMPTS, **ASKED)  # the same weights under a new number
    with torch.no_grad():
        for gate in sampler.engine.model.gates().values():
            gate.bias_E.add_(torch.arange(len(gate.bias_E)))
        sampler.engine.model.norm.weight.mul_(1.1)
    with pytest.raises(UserError, match=r"rollout worker on .* does not compute"):
        sampler.generate(PROMPTS, **ASKED)


def test_a_replaced_worker_gets_its_own_start_time(own_ray, shared, messages):
    """The only worker dies when its batch has taken longer than a worker may take to start."""
    sampler, pool, deaths = shared, shared.pool, shared.pool.deaths
    victim = pid_of(own_ray, pool.workers[0])
    expected = sampler.engine.generate(PROMPTS, **ASKED)
    answer = sampler.policy()(PROMPTS, **ASKED)
    os.kill(victim, signal.SIGKILL)
    pool._progress_at -= 2 * worker_pool.START_SECONDS
    own_ray.wait([ref for queue in pool._queues for ref in queue], num_returns=4, timeout=MINUTE)
    pool.poll()
    assert answer.take() == expected and len(messages) == pool.deaths - deaths == 1


def test_idle_workers_do_not_count_as_stalled(shared, messages):
    sampler = shared
    sampler.pool._progress_at -= 2 * worker_pool.PATIENCE
    answer = sampler.policy()(PROMPTS, **ASKED)
    answer.ready()
    assert len(answer.take()) == len(PROMPTS) and not messages


def run(base, folder, number, step, *changes):
    """Run the stage in its own process with its own Ray, which must end with it: (exit status, stderr)."""
    program = Path(rl_stage.__file__)
    command = [sys.executable, str(program), str(base), str(folder), str(int(number)), str(step), *changes]
    process = subprocess.run(command, capture_output=True, text=True, timeout=2 * MINUTE)
    until = time.monotonic() + 15
    while remaining := rays_of(folder):
        assert time.monotonic() < until, f"left behind: {remaining}"
        time.sleep(0.1)
    return process.returncode, process.stderr


def rays_of(folder):
    """Command lines of the processes whose environment says that this folder's run started them."""
    actual = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                is_own = f"BESSEMER_TEST={folder}".encode() in (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes().strip(b"\0")
                if is_own and b"Agent" not in command:  # Ray's two agents check only once a minute
                    actual.append(command)
            except OSError:
                continue
    return actual


def test_a_killed_and_stopped_run_ends_the_same_and_leaves_no_process(undisturbed, base, tmp_path, monkeypatch):
    """Killed after step 4, it resumes with the rollout that waited in its checkpoint; stopped by SIGTERM, it saves what
    its workers were sampling; and it may finish without any worker."""
    folder, apart = tmp_path / "run", ("rollout.engine=ray",)
    monkeypatch.setenv("BESSEMER_TEST", str(folder))
    monkeypatch.delenv(ray_cluster.ADDRESS, raising=False)
    status, errors = run(base, folder, signal.SIGKILL, 4, *ALL, *apart)
    assert status == -signal.SIGKILL, errors
    status, errors = run(base, folder, signal.SIGTERM, 4, *ALL, *apart)
    assert status == 3, errors
    stage = rl_stage.Stage(base, folder, *ALL)
    checkpoints = stage.kept("rollouts")
    assert list(checkpoints) == ["2"] and checkpoints["2"]["step"] == 2
    stage.run()
    assert rl_stage.differences(leaves(stage), leaves(undisturbed)) == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (["rollout.workers=2"], 'sampler local: unknown key "workers"'),
        (["rollout.engine=vllm", "top_p=0.9", "keep_sampling_mask=false"], "keep_sampling_mask = true"),
        (["rollout.engine=vllm-server", "rollout.url=http://x", 'hooks=["sample-ahead"]'], "sample-ahead samples of"),
        (["rollout.engine=vllm-server", "rollout.url=http://x", 'hooks=["routing-replay"]'], "does not reach a vLLM"),
        (["rollout.engine=vllm-server"], "url"),
        (["rollout.engine=vllm", "rollout.precision=bfloat16"], "rollout.precision has no effect with vLLM"),
        (["rollout.engine=rays"], "no sampler 'rays'; did you mean 'ray'"),
        (["rollout.engine=ray", "rollout.worker=2"], 'unknown key "worker"; did you mean "workers"'),
        (["rollout.engine=ray", "rollout.sleep=true"], 'sampler ray: unknown key "sleep"'),
    ],
)
def test_settings_without_effect_are_refused(base, tmp_path, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        stage = rl_stage.Stage(base, tmp_path / "run", *changes)
        RL().resolve(stage.recipe.stage("zero"), stage.recipe)


def test_a_missing_ray_names_its_extra_before_the_run(base, tmp_path, monkeypatch):
    stage = rl_stage.Stage(base, tmp_path / "run", "rollout.engine=ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'bessemer\[scale\]'"):
        RL().resolve(stage.recipe.stage("zero"), stage.recipe)
    monkeypatch.delenv(ray_cluster.ADDRESS, raising=False)
    with pytest.raises(UserError, match=r"pip install 'bessemer\[scale\]'"):
        ray_cluster.RayCluster(weights=0)


def test_the_sampler_does_not_change_the_fingerprint(base, tmp_path):
    """Finished stages stay finished; only settings that change samples enter the identity."""

    def identity(*changes):
        stage = rl_stage.Stage(base, tmp_path / "run", *changes)
        settings = stage.recipe.stage("zero")
        return RL().identity(settings, stage.recipe, RL().resolve(settings, stage.recipe), {})

    written = rl_stage.Stage(base, tmp_path / "run", "rollout.engine=ray", "rollout.workers=7").recipe
    assert Recipe.parse(written.to_toml()).stage("zero").rollout == written.stage("zero").rollout
    plain = identity()
    assert "rollout" not in plain["settings"] and plain["derived"] == {}
    assert identity("rollout.engine=ray", "rollout.workers=7") == plain
    assert identity("rollout.engine=vllm")["derived"] == {"sampler": "vllm"}


def test_a_cluster_that_is_too_small_or_absent_is_refused(ray, base, tmp_path, monkeypatch):
    connection = ray_cluster.RayCluster(weights=0)
    with pytest.raises(UserError, match=r"3 rollout workers .*Ray has 2 CPUs"):
        WorkerPool(connection, "ray", str(base / "model"), 3, 0, print)
    with pytest.raises(UserError, match=r"need 2 GPUs .*Ray has 0 GPUs"):
        WorkerPool(connection, "ray", str(base / "model"), 1, 2, print)
    with pytest.raises(UserError, match=r"does not see .*nowhere"):
        WorkerPool(connection, "ray", str(tmp_path / "nowhere"), 1, 0, print)

    class Other:
        def here(self):
            return True

    other = ray.remote(num_cpus=2)(Other).remote()
    monkeypatch.setattr(worker_pool, "START_SECONDS", 2.0)
    try:
        ray.get(other.here.remote())
        with pytest.raises(UserError, match=r"after 2 s; .* free: 0 CPUs, 0 GPUs"):
            WorkerPool(connection, "ray", str(base / "model"), 1, 0, print)
    finally:
        ray.kill(other)


def test_a_model_too_large_for_shared_memory_is_refused(monkeypatch):
    monkeypatch.delenv(ray_cluster.ADDRESS, raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match="enlarge /dev/shm"):
        ray_cluster.RayCluster(weights=1 << 60)


def test_an_unreachable_cluster_is_refused_at_once(monkeypatch):
    monkeypatch.setenv(ray_cluster.ADDRESS, "127.0.0.1:1")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match=r"no Ray cluster at RAY_ADDRESS=127.0.0.1:1 \(.*refused"):
        ray_cluster.RayCluster(weights=0)


def test_weights_of_another_network_or_number_format(base):
    model = load(base / "model", dtype=torch.float32)
    packed = ray_worker.pack_weights(model.to_compute(torch.bfloat16).state_dict())
    weights = ray_worker.unpack_weights(packed)
    other = load(base / "model", dtype=torch.float32)
    ray_worker.load_weights(other, weights)
    for name, tensor in model.state_dict().items():
        actual = other.state_dict()[name]
        assert actual.dtype == tensor.dtype and torch.equal(actual, tensor), name
    assert {item.dtype for item in packed.values()} == {"bfloat16", "float32"}
    weights.popitem()
    with pytest.raises(UserError, match="is not the trainer's"):
        ray_worker.load_weights(other, weights)
