"""Engines: every missing run once, whatever dies; the others run where one fails."""

import dataclasses
import io
import re
import signal
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from filelock import FileLock
from ray.cluster_utils import Cluster
from test_study import checkout  # noqa: F401  (a fixture)

from cifar_lib import results, study, study_engine, study_runs
from cifar_lib.study_engine import LocalEngine, Task, missing, tasks_of, train_task, train_tasks
from cifar_lib.study_experiments import Experiment
from cifar_lib.study_ray import RayEngine


class InThisProcess:
    """An engine that trains at once, where it is asked to."""

    def __init__(self, *_) -> None:
        self.ended, self.room, self.closed = [], 1, False

    def start(self, task):
        self.ended.append((task, train_task(task, 1)))
        self.room = 0

    def finished(self, timeout):
        ended, self.ended, self.room = self.ended, [], 1
        return ended

    def close(self):
        self.closed = True


def make_task(folder: Path, digits, config, seed=0) -> Task:
    name = f"{seed}-{config.fingerprint(digits.info.sha256)}"
    return Task(f"e/{seed}", "full", config, seed, folder / "e" / name)


def epochs_logged(task: Task) -> list[str]:
    """The epochs that were trained, in order, over all attempts."""
    return re.findall(r"seed \d epoch (\d+)/", (task.folder / "train.log").read_text())


def test_an_engine_trains_what_is_missing_and_says_so(tmp_path, digits, tiny):
    tasks = [make_task(tmp_path, digits, tiny(epochs=2), seed) for seed in (0, 1)]
    bad = make_task(tmp_path, digits, tiny(model="nothing"), seed=2)
    said: list[str] = []
    engine = InThisProcess()
    failed = train_tasks([tasks[0], bad, tasks[1]], engine, said.append)
    assert list(failed) == [bad.folder.name]
    assert failed[bad.folder.name].startswith("e/2, seed 2: ValueError: ")
    assert "\n" not in failed[bad.folder.name] and engine.closed
    for task in tasks:
        (line,) = [
            s for s in said if s.startswith(f"      {task.label}: seed {task.seed} epoch 2/2")
        ]
        assert line.endswith(" s") and "val loss" in line
    assert [s for s in said if s.endswith(": done")] == [
        "  1/3 e/0, seed 0: done",
        "  3/3 e/1, seed 1: done",
    ]
    assert "  2/3 e/2, seed 2: FAILED: ValueError" in "\n".join(said)
    assert missing([*tasks, bad]) == [bad]


def test_the_log_of_a_waiting_run_is_not_read_each_time_another_ends(
    tmp_path, digits, tiny, monkeypatch
):
    class Queue(InThisProcess):
        def start(self, task):
            self.ended.append((task, ""))
            self.room = 60 - len(self.ended)

        def finished(self, timeout):
            return [self.ended.pop()]

    read = []
    monkeypatch.setattr(study_engine, "_log_lines", lambda folder: read.append(folder) or [])
    monkeypatch.setattr(study_engine, "time", SimpleNamespace(monotonic=lambda: 1.0))
    tasks = [make_task(tmp_path, digits, tiny(epochs=1), seed) for seed in range(60)]
    assert train_tasks(tasks, Queue(), lambda _: None) == {}
    assert len(read) == 2 * len(tasks)  # when it begins and when it ends


def test_an_engine_is_closed_when_it_is_interrupted(tmp_path, digits, tiny):
    class Interrupted(InThisProcess):
        def finished(self, timeout):
            raise KeyboardInterrupt

    engine = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        train_tasks([make_task(tmp_path, digits, tiny(epochs=1))], engine, print)
    assert engine.closed


def test_a_worker_with_other_data_or_without_the_storage_says_so(tmp_path, digits, tiny):
    task = make_task(tmp_path, digits, tiny())
    assert "does not see" in train_task(task, 1)
    assert not task.folder.exists()
    other = Task("e", "full", tiny(), 0, task.folder.with_name("0-ffffffffffff"))
    other.folder.mkdir(parents=True)
    assert "has other data" in train_task(other, 1)
    assert not list(other.folder.iterdir())


def test_who_comes_second_waits_and_finds_the_run(tmp_path, digits, tiny, monkeypatch):
    task = make_task(tmp_path, digits, tiny(epochs=1))
    task.folder.mkdir(parents=True)
    asked, said = threading.Event(), []

    class Lock(FileLock):
        def acquire(self, *args, **options):
            asked.set()
            return super().acquire(*args, **options)

    with FileLock(task.folder / ".claim"):
        monkeypatch.setattr(study_engine, "FileLock", Lock)
        second = threading.Thread(target=lambda: said.append(train_task(task, 1)))
        second.start()
        assert asked.wait(60)
        study_runs.complete_run(task.folder, task.config, 0, digits, "full")
        assert said == []
    second.join(60)
    assert said == [""] and epochs_logged(task) == ["1"]


def test_runs_that_experiments_share_are_one_task(tmp_path, monkeypatch, tiny):
    monkeypatch.setattr(study_runs, "ROOT", tmp_path)
    parameters = tiny().model_dump()
    one = Experiment("full", "n", "one", parameters, [0, 1])
    two = Experiment("full", "n", "two", parameters, [1, 2])
    reads = Experiment("full", "n", "reads", {"reports_dir": "reports/full"}, [0])
    tasks = tasks_of([one, two, reads])
    assert [(task.label, task.seed) for task in tasks] == [("one", 0), ("one", 1), ("two", 2)]
    assert tasks[0].folder.parent == tmp_path / "runs/one"


# --- a study with an engine -----------------------------------------------------------------

SWEEP_NOTEBOOK = """\
sweep: str = "none.yaml"  # the sweep file
seeds: list = []  # instead of the file's
experiment: str = "smoke"  # its name
preset: str = "smoke"  # its preset
report_dir: str = ""  # where to"""
WRITE_SUMMARY = """\
from pathlib import Path
Path(report_dir, "summary.json").write_text("{}")"""
SWEEP = """\
question: Q?
base: {dataset: digits, n_train: 100, width: 0.125, batch_size: 50, epochs: 1, precision: fp32}
seeds: [0, 1]
variants: {default: , other: {translate: 1}, bad: {learning_rate: 0.3, seeds: [0]}}
"""


@pytest.fixture
def swept(checkout, monkeypatch):  # noqa: F811
    """A checkout with two sweeps; their notebooks train nothing, so that the engine does it all."""
    cells = [nbformat.v4.new_code_cell(text) for text in (SWEEP_NOTEBOOK, WRITE_SUMMARY)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, checkout / "notebooks/swept.ipynb")
    entries = [f"    - {{notebook: swept, params: toy/{n}.yaml}}\n" for n in ("good", "mixed")]
    (checkout / "params/study.yaml").write_text("presets:\n  own:\n" + "".join(entries))
    (checkout / "params/toy/mixed.yaml").write_text(SWEEP)
    (checkout / "params/toy/good.yaml").write_text(SWEEP.replace("bad:", "also:"))
    monkeypatch.setattr(study, "LocalEngine", InThisProcess)
    real = study_engine.complete_run

    def complete_run(folder, config, *rest):
        if "mixed" in str(folder) and config.learning_rate == 0.3:
            raise FloatingPointError("astray")
        return real(folder, config, *rest)

    monkeypatch.setattr(study_engine, "complete_run", complete_run)
    return checkout


def run_study(**options) -> tuple[list[str], str]:
    console = io.StringIO()
    failed = study.study("own", console=console, jobs=2, **options)
    return [experiment.name for experiment in failed], console.getvalue()


def test_a_study_trains_its_sweeps_beforehand_and_each_run_once(swept):
    failed, said = run_study(only="*/good")
    assert failed == [] and said.count(": done\n") == 5 and "swept/good: done in" in said
    assert "swept/good: running, about 1 min left" in said  # of five, four are trained already
    assert "good/other: seed 1 epoch 1/1" in said
    failed, said = run_study(only="*/good")
    assert "swept/good: up to date" in said and "epoch 1/1" not in said
    assert run_study()[1].count(" epoch 1/1") == 0  # the other sweep finds all of it
    failed, said = run_study(only="*/good", force=True)
    assert said.count(" epoch 1/1") == 5 and "swept/good: done in" in said
    failed, said = run_study(only="*/good", n_seeds=3)
    assert said.count(" epoch 1/1") == 4  # seed 2 of three variants, seed 1 of the third


def test_an_engine_leaves_a_sweeps_published_runs_alone(swept, monkeypatch):
    (swept / "params/study.yaml").write_text(
        "presets:\n  own:\n    - {notebook: swept, params: toy/good.yaml}\n"
        "    - {notebook: toy, params: toy/one.yaml}\n"  # it needs its weights
    )
    experiments = study.load_preset("own")
    every = tasks_of(experiments)
    monkeypatch.setattr(
        study_engine, "published_runs", lambda: {task.folder.name: None for task in every[1:]}
    )
    assert [task.figures_suffice for task in every] == 5 * [True] + [False]
    assert missing(every) == [every[0], every[-1]]
    quick = tasks_of([dataclasses.replace(e, preset="quick") for e in experiments])
    assert missing(quick) == quick
    assert [task.label for task in study._tasks_to_train(experiments, force=False)] == [
        every[-1].label,
        every[0].label,
    ]


def test_a_failed_run_is_one_line_and_its_sweep_alone_is_not_executed(swept):
    (swept / "params/toy/mixed.yaml").write_text(SWEEP.replace("translate: 1", "translate: 2"))
    (swept / "params/toy/good.yaml").write_text(SWEEP.replace("0.3", "0.2"))
    failed, said = run_study()
    assert failed == ["mixed"]
    assert "swept/good: done in" in said and "swept/mixed: FAILED: 1 of 5 runs" in said
    assert said.splitlines()[-1] == "failed: mixed/bad, seed 0: FloatingPointError: astray"
    assert not (swept / "reports/own/swept/mixed").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine", "slurm"], "--engine: got 'slurm'; allowed are local, ray"),
        (["--address", "auto"], "--address: got 'auto'; it goes with --engine ray"),
        (["--engine", "ray", "--address", "head"], "--address: got 'head'; allowed are auto and"),
        (["--engine", "ray", "--force"], "--engine ray: ray is not installed; pip install"),
    ],
)
def test_a_mistake_about_engines_is_one_line(swept, call, monkeypatch, words, said):
    monkeypatch.setitem(sys.modules, "ray", None)
    status, _, err = call("study", "--preset", "own", *words)
    assert status == 2 and said in err and err.count("\n") == 1


# --- processes ------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpus", "taken"), [(0, []), (1, [0, 0, 0]), (2, [0, 1, 0])])
def test_processes_have_the_gpus_in_turn(monkeypatch, gpus, taken):
    monkeypatch.setattr(study_engine.torch.cuda, "device_count", lambda: gpus)
    chosen = []
    monkeypatch.setattr(study_engine.torch.cuda, "set_device", chosen.append)
    for number in range(3):
        study_engine.take_gpu(number)
    assert chosen == taken


def test_a_process_that_died_while_it_waited_is_replaced(tmp_path, digits, tiny):
    task = make_task(tmp_path, digits, tiny(epochs=1))
    task.folder.mkdir(parents=True)
    engine = LocalEngine(2)
    try:
        process, _ = engine.idle[-1]
        process.kill()
        process.join()
        engine.start(task)
        assert engine.finished(timeout=60) == [(task, "")] and missing([task]) == []
        assert [process.name for process, _ in engine.idle] == ["0", "1"]  # and so the same GPU
    finally:
        engine.close()


def test_a_killed_process_is_replaced_and_its_run_trained(tmp_path, digits, tiny, monkeypatch):
    task = make_task(tmp_path, digits, tiny(epochs=2))
    task.folder.mkdir(parents=True)
    engine = LocalEngine(1)

    def start_and_kill() -> list[tuple[Task, str]]:
        engine.start(task)
        ((process, _, _),) = engine.busy.values()
        process.kill()
        return engine.finished(timeout=60)

    try:
        assert start_and_kill() == []  # not lost: another process has it now
        assert engine.room == 0 and engine.finished(timeout=60) == [(task, "")]
        assert epochs_logged(task) == ["1", "2"] and missing([task]) == []
        monkeypatch.setattr(study_engine, "RETRIES", 0)
        assert start_and_kill() == [(task, "its process died 1 times, exit status -9")]
    finally:
        engine.close()
    assert not any(process.is_alive() for process, _ in engine.idle)


# --- Ray ------------------------------------------------------------------------------------


def node_options(cpus: int) -> dict[str, int]:
    """A small node. Ray waits 30 s for ports that it is not given, too short on a busy machine."""
    names = ("metrics_agent_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in names]
    ports = {name: s.getsockname()[1] for name, s in zip(names, sockets, strict=True)}
    for bound in sockets:
        bound.close()
    return {"num_cpus": cpus, "object_store_memory": 80 * 2**20, **ports}


@pytest.fixture
def cluster(monkeypatch):
    """A Ray cluster of one node with two cores."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    started = Cluster(True, head_node_args={"include_dashboard": False, **node_options(2)})
    yield started
    started.shutdown()


@pytest.mark.timeout(600)  # it starts a dozen processes, and other work may hold the machine
def test_ray_trains_what_is_missing_and_says_why_a_run_failed(
    tmp_path, digits, tiny, cluster, capfd
):
    tasks = [make_task(tmp_path, digits, tiny(epochs=2), seed) for seed in (0, 1)]
    bad = make_task(tmp_path, digits, tiny(model="nothing"), seed=2)
    said: list[str] = []
    capfd.readouterr()
    engine = RayEngine(jobs=2, address=cluster.address)
    assert (engine.cpus, engine.gpus, engine.room) == (1, 0, 6)
    failed = train_tasks([tasks[0], bad, tasks[1]], engine, said.append)
    assert list(failed) == [bad.folder.name] and "ValueError: model" in failed[bad.folder.name]
    assert missing([*tasks, bad]) == [bad]
    for task in tasks:
        assert epochs_logged(task) == ["1", "2"]
        assert any(line.startswith(f"      {task.label}: seed") for line in said)
    assert not engine.ray.is_initialized()
    output = capfd.readouterr()
    assert len((output.out + output.err).splitlines()) <= 3, "Ray's own lines bury the progress"


@pytest.mark.long  # on a busy machine Ray may not start within the time it allows itself
def test_ray_starts_on_this_machine(tmp_path, digits, tiny):
    task = make_task(tmp_path, digits, tiny(epochs=1))
    before = signal.getsignal(signal.SIGTERM)
    engine = RayEngine(jobs=1)
    assert signal.getsignal(signal.SIGTERM) is before
    assert train_tasks([task], engine, print) == {}
    assert missing([task]) == []


def test_a_cluster_without_a_cpu_is_one_line(monkeypatch):
    nodes = [{"Alive": True, "Resources": {"memory": 1.0}}]
    ray = SimpleNamespace(init=lambda **_: None, nodes=lambda: nodes)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(ValueError, match="--engine ray: no node has a CPU; add one, then start"):
        RayEngine(address="auto")


@pytest.mark.parametrize("address", ["127.0.0.1:9", "127.0.0.1"])
def test_ray_says_where_there_is_no_cluster(address, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match=f"no Ray cluster at '{address}': ") as caught:
        RayEngine(address=address)
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_a_sweep_survives_the_loss_of_a_node(tmp_path, digits, tiny, monkeypatch):
    epochs = 16
    config = tiny(n_train=None, epochs=epochs, batch_size=10)
    tasks = [make_task(tmp_path, digits, config, seed) for seed in range(8)]
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(True, head_node_args={"include_dashboard": False, **node_options(0)})
    running: dict[str, int] = {}  # epochs of the runs that have begun and not ended
    ended, killed = [], []
    try:
        nodes = [cluster.add_node(**node_options(1)) for _ in range(2)]

        def say(line: str) -> None:
            print(line, flush=True)
            if found := re.match(r" +(e/\d): seed \d epoch (\d+)/", line):
                running[found[1]] = int(found[2])
            elif found := re.match(r" +\d/8 (e/\d), seed \d: done", line):
                ended.append(found[1])
                running.pop(found[1], None)
            half_way = len(running) == 2 and all(2 <= k < epochs - 5 for k in running.values())
            if len(ended) >= 3 and half_way and not killed:
                killed.append(sorted(running))
                cluster.remove_node(nodes[0], allow_graceful=False)

        assert train_tasks(tasks, RayEngine(address=cluster.address), say) == {}
    finally:
        cluster.shutdown()
    assert len(killed) == 1 and sorted(ended) == [task.label for task in tasks]  # nothing lost
    logs = {task.label: (task.folder / "train.log").read_text() for task in tasks}
    resumed = [label for label, log in logs.items() if "resuming after epoch" in log]
    assert len(resumed) == 1 and resumed[0] in killed[0]
    for task in tasks:  # nothing run twice
        expected = list(map(str, range(1, epochs + 1)))
        logged = epochs_logged(task)
        if task.label in resumed:  # killed between keeping an epoch and saying so, it is not said
            after = re.search(r"resuming after epoch (\d+)", logs[task.label])[1]
            logged = sorted({*logged, after}, key=int) if after not in logged else logged
        assert logged == expected
        assert results.load_run(task.folder).metrics["epoch"].tolist() == list(map(int, expected))


def test_processes_share_the_threads_that_one_run_would_have(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(study_engine.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(LocalEngine, "_start_process", lambda self, number: None)
    assert [LocalEngine(jobs).threads for jobs in (1, 3, 9)] == [8, 2, 1]
    given = []
    monkeypatch.setattr(study_engine.torch, "set_num_threads", given.append)
    train_task(Task("e", "full", tiny(), 0, tmp_path / "0-f"), 5)
    assert given == [5]


def test_ray_gives_each_run_its_share(tmp_path, tiny, monkeypatch):
    asked, resources = [], {"CPU": 8.0, "GPU": 2.0}
    sent = SimpleNamespace(remote=lambda task, threads: asked.append(threads))
    remote = SimpleNamespace(options=lambda **given: asked.append(given) or sent)
    ray = SimpleNamespace(
        init=lambda **_: None,
        cluster_resources=lambda: resources,
        nodes=lambda: [{"Alive": True, "Resources": resources}],
        remote=lambda **given: asked.append(given) or (lambda _: remote),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    engine = RayEngine(jobs=4)
    assert (engine.cpus, engine.gpus, engine.room) == (2, 0.5, 10)
    for device in ("auto", "cpu"):
        engine.start(Task("e", "full", tiny(device=device), 0, tmp_path))
    assert asked == [
        {"max_retries": study_engine.RETRIES},
        {"num_cpus": 2, "num_gpus": 0.5, "name": "e"},
        2,
        {"num_cpus": 2, "num_gpus": 0, "name": "e"},
        2,
    ]
