"""A SLURM of two nodes on this machine: controller, munge and two slurmd, in a folder of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")

CONFIGURATION = """
ClusterName=dehvf
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until the credentials of its last run have expired.
AuthInfo=socket={root}/munge/socket,cred_expire=5
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
TaskProlog={root}/prolog.sh
ReturnToService=2
SlurmctldPort={port}
# When SLURM notices a dead node; on real clusters after minutes.
SlurmdTimeout=45
# A step that waits for the dead node's srun is not to cost the living node.
UnkillableStepTimeout=180
KillWait=10
SchedulerParameters=sched_interval=2,bf_interval=2
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/ctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/ctld.log
SlurmdLogFile={root}/slurmd.%n.log
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing() -> list[str]:
    """What this machine lacks for a SLURM of its own."""
    lacks = [name for name in PROGRAMS if shutil.which(name) is None]
    return lacks + ([] if os.geteuid() == 0 else ["root"])


class Cluster:
    """The running daemons, and SLURM's commands against them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._frozen: dict[str, set[int]] = {}

    def start(self) -> None:
        """Starts everything and waits until both nodes answer."""
        for folder in ("state", "spool.n1", "spool.n2", "munge"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        (self.root / "munge").chmod(0o755)
        key = self.root / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host = socket.gethostname().partition(".")[0]
        port, first, last = _free_ports()
        (self.root / "slurm.conf").write_text(
            CONFIGURATION.format(root=self.root, host=host, port=port, first=first, last=last)
        )
        prolog = self.root / "prolog.sh"
        prolog.write_text(f'#!/bin/sh\ncat "{self.root}/sick.$SLURMD_NODENAME" 2>/dev/null || true\n')
        prolog.chmod(0o755)
        folder = self.root / "munge"
        self._run_daemon(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/socket"),
            *(f"--pid-file={folder}/pid", f"--log-file={folder}/log", f"--seed-file={folder}/seed"),
        )
        wait_for(lambda: (folder / "socket").exists(), 20, "munge")
        self._run_daemon("slurmctld", "slurmctld", "-D")
        for name in ("n1", "n2"):
            self.start_node(name)
        wait_for(self.is_idle, 60, "two idle nodes")

    def is_idle(self) -> bool:
        """Whether both nodes answer and do nothing."""
        return self.call("sinfo", "-h", "-o", "%D %t", check=False).strip() == "2 idle"

    def set_on_node(self, name: str, **env: str) -> None:
        """Gives the tasks on one node an environment of their own; none of it takes it away."""
        lines = [f"export {key}={value}\n" for key, value in env.items()]
        (self.root / f"sick.{name}").write_text("".join(lines))

    def start_node(self, name: str) -> None:
        """Starts a node's daemon; nothing of a node that was cut off outlives that."""
        _send(self._frozen.pop(name, set()), signal.SIGKILL)
        self._run_daemon(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """Ends a node: its daemon, its step managers, its tasks. Others find their connections broken."""
        # Frozen before, they die at once as far as anybody can tell: srun's second process, for one, ends the
        # step on every node if it sees srun die.
        self.cut_off_node(name)
        _send(self._frozen.pop(name), signal.SIGKILL)

    def cut_off_node(self, name: str) -> None:
        """Freezes a node, as a power cut does for others: their connections to it stand, in silence."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()
        frozen: set[int] = set()
        while found := self._on_node(name) - frozen:
            _send(found, signal.SIGSTOP)
            frozen |= found
        self._frozen[name] = frozen

    def _on_node(self, name: str) -> set[int]:
        tasks = _processes(f"SLURMD_NODENAME={name}")
        return tasks | {parent for parent in map(_parent, tasks) if "slurmstepd" in _command(parent)}

    def signal_ranks(self, number: signal.Signals) -> None:
        """Signals the first process of every task alone, as SLURM does with proctrack/cgroup."""
        for pid in _processes("SLURM_CLUSTER_NAME=dehvf"):
            if "slurmstepd" in _command(_parent(pid)) and "supervise.py rank" in _command(pid):
                os.kill(pid, number)

    def loader_workers(self, name: str, job: str) -> set[int]:
        """A job's DataLoader processes on a node, by the name that torch gives them."""
        found = _processes(f"SLURMD_NODENAME={name}", f"SLURM_JOB_ID={job}")
        return {pid for pid in found if "data_worker" in _text(f"/proc/{pid}/comm")}

    def ranks(self, name: str, job: str) -> set[int]:
        """The processes that train on a node."""
        found = _processes(f"SLURMD_NODENAME={name}", f"SLURM_JOB_ID={job}")
        trainers = {pid for pid in found if _command(pid).split()[1:2] == ["dehvf_ds/train.py"]}
        return {pid for pid in trainers if _parent(pid) not in trainers}

    def stop(self) -> None:
        """Ends all jobs and daemons."""
        self.call("scancel", "-u", "root", check=False)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not self.call("squeue", "-h", check=False).strip(), 20, "no jobs")
        for process in reversed(list(self._daemons.values())):
            process.terminate()
        for process in self._daemons.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()

    def call(self, *command: str, check: bool = True, cwd: Path | None = None, **env: str) -> str:
        """Runs one of SLURM's commands and returns what it prints."""
        found = subprocess.run(
            command, env=self._environment | env, cwd=cwd, capture_output=True, text=True, timeout=60
        )
        assert not check or found.returncode == 0, f"{command}: {found.stdout}{found.stderr}"
        return found.stdout

    def submit(self, *arguments: str, cwd: Path, **env: str) -> str:
        """Submits a script with CPU settings; returns the job's number."""
        options = ["--parsable", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"]
        return self.call("sbatch", *options, *arguments, cwd=cwd, **env).strip()

    def show(self, job: str) -> dict[str, str]:
        """What scontrol knows of a job."""
        words = self.call("scontrol", "show", "job", job, "-o").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, timeout_s: float = 120) -> dict[str, str]:
        """Waits until a job has ended for good."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        try:
            wait_for(lambda: self.show(job)["JobState"] in ended, timeout_s, f"end of job {job}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.tell(job)}") from None
        return self.show(job)

    def tell(self, job: str) -> str:
        """What SLURM and a job's log say, for whoever reads why a test failed."""
        commands = (("scontrol", "show", "job", job), ("sinfo", "-N"))
        said = [self.call(*command, check=False) for command in commands]
        texts = [_text(path) for path in (self.show(job).get("StdOut", ""), self.root / "ctld.log")]
        return "\n".join([*said, *(text[-6000:] for text in texts)])

    def _run_daemon(self, name: str, *command: str) -> None:
        with (self.root / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(command, env=self._environment, stdout=out, stderr=out)


PATIENCE = 2
"""How much slower than the machine that the tests were written on another may be."""


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Asks until it holds."""
    end = time.monotonic() + PATIENCE * timeout_s
    while not condition():
        assert time.monotonic() < end, f"no {what} within {PATIENCE * timeout_s:g} s"
        time.sleep(0.25)


@contextlib.contextmanager
def running(root: Path) -> Iterator[Cluster]:
    """A cluster for a while."""
    cluster = Cluster(root)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports() -> tuple[int, int, int]:
    for base in range(16800, 17800, 10):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(base, base + 3):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return base, base + 1, base + 2
    raise AssertionError("no free ports")


def _processes(*settings: str) -> set[int]:
    """Those whose environment has all of these."""
    found = {path.parent.name: _text(path).split("\0") for path in Path("/proc").glob("[0-9]*/environ")}
    return {int(pid) for pid, lines in found.items() if set(settings) <= set(lines)}


def _text(path: str | Path) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


def _send(pids: set[int], number: signal.Signals) -> None:
    """Signals processes, children first.

    Of a process group that is left without a parent outside of it the kernel wakes whoever is frozen, with a
    SIGHUP: srun would live long enough to end the step on every node.
    """
    for pid in sorted(pids, key=_depth, reverse=True):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _parent(pid: int) -> int:
    return int([*_text(f"/proc/{pid}/stat").rpartition(")")[2].split()[1:2], 0][0])


def _depth(pid: int) -> int:
    return 1 + _depth(parent) if (parent := _parent(pid)) else 0


def _command(pid: int) -> str:
    return _text(f"/proc/{pid}/cmdline").replace("\0", " ")
