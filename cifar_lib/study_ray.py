"""Ray as an engine: each run a task, on this machine or on a cluster whose nodes share `runs/`."""

import logging
import os
import signal
import socket
from typing import Any

from cifar_lib.config import ROOT
from cifar_lib.study_engine import RETRIES, Task, train_task


class RayEngine:
    """Hands each run to Ray with its cores or its GPU; Ray tries it again where a node dies."""

    def __init__(self, jobs: int | None = None, address: str | None = None) -> None:
        """Starts Ray here, or connects to a cluster.

        Args:
            jobs: runs at a time on one machine; None is one a core, or one a GPU if it has any.
            address: `auto` or `host:port` of a cluster's head; None starts Ray on this machine.

        Raises:
            ValueError: Ray is not installed or does not start, or no cluster is at the address.
        """
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # asks no network
        try:
            import ray
        except ImportError:
            raise ValueError(
                "--engine ray: ray is not installed; pip install -e '.[ray]'"
            ) from None
        self.ray = ray
        # What a node's own environment may lack; the data's checksum is compared all the same.
        variables = {k: v for k, v in os.environ.items() if k.startswith("CIFAR")}
        options: dict[str, Any] = {
            "runtime_env": {"env_vars": variables | {"PYTHONPATH": str(ROOT)}},
            "log_to_driver": False,  # progress comes from train.log
            "logging_level": logging.ERROR,
        }
        if address is None:  # runs/ carries everything, so the object store stays small
            options |= {"include_dashboard": False, "object_store_memory": 100 * 2**20}
        on_sigterm = signal.getsignal(signal.SIGTERM)  # Ray sets one of its own, and leaves it
        for attempt in (1, 2, 3):
            try:
                if address and address != "auto":  # Ray itself would try for minutes
                    host, _, port = address.rpartition(":")
                    socket.create_connection((host, int(port)), timeout=10).close()
                ray.init(address=address or "local", **options)
                break
            except Exception as error:  # Ray's own are of many kinds
                # Its processes must start within 30 s; the second time they are in memory.
                if address or attempt == 3:
                    what = f"no Ray cluster at {address!r}" if address else "Ray does not start"
                    reason = str(error).splitlines()[0]
                    raise ValueError(f"--engine ray: {what}: {reason}") from None
            finally:
                signal.signal(signal.SIGTERM, on_sigterm)
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = min((m["CPU"] for m in machines if m.get("CPU")), default=0)
        if not cores:
            raise ValueError("--engine ray: no node has a CPU; add one, then start again")
        gpus = min((m["GPU"] for m in machines if m.get("GPU")), default=0)
        self.cpus = max(1, int(cores // jobs)) if jobs else 1
        self.gpus = min(1, gpus / jobs) if jobs else min(1, gpus)
        self.train = ray.remote(max_retries=RETRIES)(train_task)
        self.tasks: dict[Any, Task] = {}

    @property
    def room(self) -> int:
        """How many more tasks to queue: so many that no node waits, few for Ray's scheduler."""
        resources = self.ray.cluster_resources()
        slots = resources.get("GPU", 0) / self.gpus if self.gpus else 0
        return int(2 * max(slots, resources.get("CPU", 0) / self.cpus)) + 2 - len(self.tasks)

    def start(self, task: Task) -> None:
        """Hands a run to Ray."""
        gpus = 0 if task.config.device == "cpu" else self.gpus
        remote = self.train.options(num_cpus=self.cpus, num_gpus=gpus, name=task.label)
        self.tasks[remote.remote(task, self.cpus)] = task

    def finished(self, timeout: float) -> list[tuple[Task, str]]:
        """Waits at most `timeout` seconds; returns tasks that ended, and why where they failed."""
        done = []
        self.ray.wait(list(self.tasks), timeout=timeout)  # for the first; then all that ended
        for reference in self.ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=0)[0]:
            try:
                error = self.ray.get(reference)
            except self.ray.exceptions.RayError as lost:  # after all its retries
                error = f"{type(lost).__name__}: {str(lost).splitlines()[0]}"
            done.append((self.tasks.pop(reference), error))
        return done

    def close(self) -> None:
        """Ends Ray where it was started here; leaves a cluster."""
        self.ray.shutdown()
