"""The life of a SLURM job: starts the ranks, watches them, ends the job or requeues it.

The scripts in slurm/ run this file by its path, with the standard library alone: ``import dehvf_ds`` loads
torch, and outside a container the host's Python (3.9 or newer) runs it. ``train`` and ``eval`` are the job's
script, ``rank`` wraps the command of each rank. Pure functions decide what to do: ``watch_ranks``,
``after_ranks``, ``after_check``, ``take_over``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Literal

# Exit codes of train.py, eval.py and node_check.py, which cannot be imported here.
MISTAKE, SICK, CANNOT_SAVE, STOPPED, NOT_FOUND = 2, 3, 74, 85, 127
FINAL = (0, MISTAKE, CANNOT_SAVE)
ON_REQUEST = (STOPPED, 128 + signal.SIGUSR1, 128 + signal.SIGTERM)
"""Stopped by a signal; the latter two before Python could handle it."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
CHECK_S, LOOK_S = 420.0, 1.0
"""Time limit of the node check; seconds between two looks of the successor."""


@dataclass(frozen=True)
class Action:
    """A decision: what to do, the job's exit code, a line for its log, nodes to exclude."""

    do: Literal["wait", "go on", "give up", "end", "requeue", "ask"]
    code: int = 0
    message: str = ""
    sick: tuple[str, ...] = ()


def watch_ranks(
    failed: str, since_failure_s: float, running_s: float, linger_s: float, limit_s: float
) -> Action:
    """Decides, while srun runs, whether to kill the remaining ranks.

    After a failure the others get ``linger_s`` to end by themselves, so that each can name its own error; but
    srun would wait minutes for a dead node. ``failed`` has a line for each rank that failed, its number and
    exit code; the first is the cause.
    """
    codes = re.findall(r"(?m)^\d+ (\d+)$", failed)
    if codes and since_failure_s > linger_s:
        ranks = ";".join(failed.splitlines())
        message = f"error: ranks that failed (rank, exit code): {ranks}; giving the others up"
        return Action("give up", int(codes[0]), message)
    if running_s > limit_s:
        return Action("give up", 124, f"error: not done after {limit_s:g} s; giving it up")
    return Action("wait")


def after_ranks(code: int, is_ours: bool, step: str, failed_before: bool) -> Action:
    """Decides after training or evaluation ended with ``code``; ``failed_before`` means at this ``step``.

    ``is_ours`` is whether the job still runs or SLURM has requeued it, unlike after scancel.
    """
    if code in FINAL or not is_ours:
        return Action("end", code)
    if code in ON_REQUEST:
        return Action("requeue", code, "stopped on request; the job goes on later")
    if failed_before:
        return Action("end", code, f"error: failed twice at step {step} (exit code {code}); not requeued")
    message = f"failed at step {step} with exit code {code}; the job goes on from its last checkpoint"
    return Action("requeue", code, message)


def after_check(
    code: int, is_ours: bool, reports: Mapping[str, int], tasks: int, sick: list[str] | None, exclude: bool
) -> Action:
    """Decides after the node check ended with ``code``; ``is_ours`` as for ``after_ranks``.

    ``reports`` counts those of each node's ``tasks``, in the order of the nodes. ``sick`` are the nodes that
    the first task named, None if it could not decide; ``exclude``: the job may continue without them.
    """
    if code == 0:
        return Action("go on")
    if code == MISTAKE or not is_ours:
        return Action("end", code)
    if code in ON_REQUEST:
        return after_ranks(STOPPED, is_ours, "start", False)
    if not any(reports.values()):
        message = f"error: no task was able to begin (exit code {code}); the ranks' logs say why"
        return Action("end", MISTAKE, message)
    message = ""
    if sick is None:
        # The first task's own node, unless tasks on other nodes never began.
        sick = [node for node, number in reports.items() if number < tasks] or list(reports)[:1]
        message = f"error: no word from node {' '.join(sick)}"
    return Action("requeue" if exclude and sick else "end", SICK, message, tuple(sick))


def take_over(quiet_s: float, patience_s: float, is_requeued: bool, answers: bool | None) -> Action:
    """On the second node: whether to act in place of the first, with which the job's script and srun die.

    SLURM needs minutes to notice, and then asks for the job's full size again. Once the job is back in the
    queue (``is_requeued``) this task ends within KillWait, too soon to learn whether the first node set
    what the next start needs; setting it twice does no harm. ``answers`` is None until the first node has
    been asked.
    """
    if is_requeued:
        return Action("requeue")
    # Where the file system alone is slow, the node answers.
    if quiet_s < patience_s or answers:
        return Action("wait")
    return Action("ask" if answers is None else "requeue")


class Job:
    """This job, by SLURM's variables and commands."""

    def __init__(self) -> None:
        env = os.environ
        self.id, self.restarts = env.get("SLURM_JOB_ID", "0"), int(env.get("SLURM_RESTART_COUNT", "0"))
        self.num_nodes = int(env.get("SLURM_JOB_NUM_NODES", "1"))
        # SLURM_NTASKS keeps its value when a job continues with fewer nodes.
        tasks = int(env.get("SLURM_NTASKS", self.num_nodes)) // self.num_nodes
        self.tasks_per_node = int(env.get("SLURM_NTASKS_PER_NODE", tasks))
        self.log_dir = Path(env["LOG_DIR"])
        if "SLURM_JOB_ID" in env or "DEHVF_CONTAINER" in env:
            self.log_dir.mkdir(parents=True, exist_ok=True)
        self.excluded = self.log_dir / "sick"

    @cached_property
    def nodes(self) -> list[str]:
        """Its nodes; empty without SLURM's commands."""
        return ask("scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", ""))[0].split()

    def show(self) -> dict[str, str]:
        """SLURM's description of it; empty if SLURM does not answer."""
        words = ask("scontrol", "show", "job", self.id, "-o")[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def is_requeued(self) -> bool:
        """Whether SLURM has requeued it: a node died, or a more important job came."""
        return int(self.show().get("Restarts", "0")) > self.restarts

    def is_ours(self) -> bool:
        """Whether it still runs or is requeued, and not ended for good. Tries for five minutes."""
        for _ in range(60):
            if known := self.show():
                return known["JobState"] == "RUNNING" or int(known["Restarts"]) > self.restarts
            time.sleep(5)
        return False

    def requeue(self, tell: Callable[[str], None]) -> None:
        """Puts it back into the queue, to start on the nodes that are left. Asks for five minutes.

        Args:
            tell: takes what goes wrong.
        """
        limit, attempts = int(os.environ.get("MAX_REQUEUES") or "20"), 0
        while not self.is_requeued():
            if self.restarts >= limit:
                return tell(f"error: requeued {limit} times already (MAX_REQUEUES); submit it again to go on")
            error, attempts = ask("scontrol", "requeue", self.id)[1], attempts + 1
            if not error:
                break
            # Not every site lets jobs go back.
            if attempts == 60 or re.search("disabled|denied", error):
                return tell(f"error: not requeued: {error}")
            # SLURM may have put it back in between, and ends this process within KillWait.
            time.sleep(1 if attempts < 5 else 5)
        settings, attempts = self._settings_of_next_start(), 0
        # That start waits for the end of this script.
        while settings and (error := ask("scontrol", "update", f"JobId={self.id}", *settings)[1]):
            attempts += 1
            if attempts == 40:
                message = "error: SLURM took no new settings; the job waits for as many nodes as it had"
                return tell(f"{message}: {error}")
            time.sleep(0.5)
        return None

    def _settings_of_next_start(self) -> list[str]:
        settings = []
        # SLURM asks again for as many tasks as the job had, so that one node fewer would not be enough
        # although --nodes=MIN-MAX allows it. With the tasks of one node --nodes alone decides.
        if self.num_nodes > 1:
            settings.append(f"NumTasks={self.tasks_per_node}")
        if nodes := sorted(set(_read(self.excluded).split())):
            before = self.show().get("ExcNodeList", "").replace("(null)", "")
            settings.append(f"ExcNodeList={','.join([*nodes, *filter(None, [before])])}")
        return settings


class Supervisor:
    """The job's script."""

    def __init__(self) -> None:
        self.job, self._terminated = Job(), False
        # SIGUSR1 (--signal, scancel) is for the ranks only. SIGTERM may arrive here before they end.
        signal.signal(signal.SIGTERM, lambda number, frame: setattr(self, "_terminated", True))
        signal.signal(signal.SIGUSR1, lambda number, frame: None)
        # A rank runs in a container of srun (pyxis, enroot), of apptainer, or in none.
        self._options, self._inside, self._python = [], [], sys.executable
        if image := os.environ.get("DEHVF_CONTAINER"):
            here, logs = Path.cwd(), self.job.log_dir
            mounts = ",".join(filter(None, [f"{here}:{here},{logs}:{logs}", os.environ.get("DEHVF_MOUNTS")]))
            if "--container-image" in ask("srun", "--help")[0]:
                self._python = "python"
                self._options = [f"--container-image={image}", f"--container-mounts={mounts}"]
                self._options.append(f"--container-workdir={here}")
            else:
                self._inside = ["apptainer", "exec", "--nv", "--bind", mounts, "--pwd", str(here), image]

    def train(self, flags: list[str]) -> int:
        """Checks the nodes and trains; returns the exit code. ``--check`` makes a dry run, without a job."""
        env = os.environ
        if "--check" in flags:
            flags.remove("--check")
            env["DS_ACCELERATOR"] = "cpu"
            alone = ["srun", "--nodes=1", "--ntasks=1", *self._options] if self._options else self._inside
            return subprocess.call([*alone, "python", "dehvf_ds/train.py", *flags, "--dry-run"])
        if "SLURM_ARRAY_JOB_ID" in env:
            say("error: these scripts requeue whole jobs, so no job arrays; submit a job for each run")
            return MISTAKE
        own = ["--train.timeout_minutes", env.get("TIMEOUT_MINUTES") or "4"]
        own += ["--run_dir", env.get("RUN_DIR") or f"runs/{Path(_given(flags, '--config')[0]).stem}"]
        if directory := env.get("DEHVF_STAGE"):
            own += ["--data.cache_dir", directory]
        flags = [*own, *flags]
        if (env.get("HEALTH_CHECK") or "1") == "1" and (code := self._check_nodes(flags)) is not None:
            return code
        code = self._launch("python", "dehvf_ds/train.py", *flags)
        return self._finish(code, Path(_given(flags, "--run_dir")[-1]))

    def evaluate(self, flags: list[str]) -> int:
        """Evaluates; returns the exit code. After a requeue it continues from its saved predictions."""
        return self._finish(self._launch("python", "dehvf_ds/eval.py", *flags), self.job.log_dir)

    def _launch(self, *command: str, deadline_s: float = float("inf")) -> int:
        """Runs a command in every task of the job; returns its exit code."""
        job, linger_s = self.job, float(os.environ.get("LINGER_S") or "30")
        # Created at once: NFS caches that a name is missing.
        failures = job.log_dir / f"failed.{job.restarts}"
        failures.write_text("")
        # Not every version of srun inherits --cpus-per-task.
        options = ["--kill-on-bad-exit=0", f"--cpus-per-task={os.environ.get('SLURM_CPUS_PER_TASK', '1')}"]
        options += [f"--ntasks={job.num_nodes * job.tasks_per_node}", *self._options]
        # -S: site-packages are slow on a shared file system.
        rank = [self._python, "-S", __file__, "rank", *self._inside]
        srun = subprocess.Popen(["srun", *options, *rank, *command], stdin=subprocess.DEVNULL)
        running_s = since_failure_s = 0
        while True:
            # Tells the successor that this process lives; works on a full disk, too.
            with contextlib.suppress(OSError):
                (job.log_dir / "heartbeat").touch()
            # SLURM ends a job that lost a node, and this process within KillWait.
            if self._terminated and job.is_requeued():
                self._terminated = False
                job.requeue(say)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return _as_a_shell(srun.wait(timeout=1))
            failed = _read(failures)
            # Counted, not measured: a job may be suspended.
            running_s, since_failure_s = running_s + 1, since_failure_s + bool(failed)
            action = watch_ranks(failed, since_failure_s, running_s, linger_s, deadline_s)
            if action.do == "give up":
                say(f"{action.message}; logs of the ranks: {job.log_dir}")
                # Every rank writes its threads' stacks into its log.
                ask("scancel", "--signal=USR2", job.id)
                time.sleep(2)
                srun.kill()
                srun.wait()
                return action.code

    def _check_nodes(self, flags: list[str]) -> int | None:
        """Checks every node and their communication; returns the exit code if the job ends here."""
        job, folder = self.job, self.job.log_dir / f"nodes.{self.job.restarts}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        command = ["python", "-m", "dehvf_ds.cluster.node_check", "--into", str(folder)]
        command += ["--nodes", ",".join(job.nodes), "--tasks-per-node", str(job.tasks_per_node)]
        code = self._launch(*command, "--", *flags, deadline_s=CHECK_S)
        counts = Counter(path.stem.rpartition(".")[0] for path in folder.glob("*.json"))
        reports, named = {node: counts[node] for node in job.nodes}, folder / "sick"
        sick = _read(named).split() if named.is_file() else None
        exclude = os.environ.get("EXCLUDE_SICK") == "1"
        action = after_check(code, code in FINAL or job.is_ours(), reports, job.tasks_per_node, sick, exclude)
        return None if action.do == "go on" else self._end(action)

    def _finish(self, code: int, directory: Path) -> int:
        """Ends or requeues the job; failures are recorded in ``directory``."""
        job, history, step = self.job, directory / "failures.txt", last_step(directory)
        failed_before = re.search(rf"(?m)^job {job.id} .* step {step}$", _read(history)) is not None
        action = after_ranks(code, code in FINAL or job.is_ours(), step, failed_before)
        if action.do == "requeue" and code not in ON_REQUEST:
            _append(history, f"job {job.id} restart {job.restarts} code {code} step {step}")
        return self._end(action)

    def _end(self, action: Action) -> int:
        if action.message:
            say(action.message)
        if action.do == "requeue":
            for node in action.sick:
                _append(self.job.excluded, node)
            self.job.requeue(say)
        return action.code


class Successor:
    """Beside the rank of the second node's first task: see ``take_over``."""

    def __init__(self, job: Job) -> None:
        self.has_acted, self.beats = False, 0
        self._job, self._patience_s = job, float(os.environ.get("SUCCESSION_S") or "60")
        self._quiet_s, self._last = 0.0, 0
        self._asked: subprocess.Popen[bytes] | None = None

    def look(self, is_ending: bool) -> None:
        """Acts if the job's script has given no sign for too long; ``is_ending`` if SLURM ends this task."""
        with contextlib.suppress(OSError), (self._job.log_dir / "heartbeat").open() as file:
            # Opened, since NFS looks anew only then.
            if (beat := os.fstat(file.fileno()).st_mtime_ns) != self._last:
                self.beats, self._last, self._quiet_s, self._asked = self.beats + 1, beat, 0.0, None
                return
        # Seconds of this process's own: a node may be suspended.
        self._quiet_s += LOOK_S
        code = None if self._asked is None else self._asked.poll()
        answers = None if code is None else code == 0
        is_requeued = is_ending and self._job.is_requeued()
        action = take_over(self._quiet_s, self._patience_s, is_requeued, answers)
        first = self._job.nodes[0]
        if action.do == "requeue":
            self.has_acted = True
            if not is_requeued:
                self._tell(f"error: {first}, where the job's script ran, does not answer; the job goes on")
            self._job.requeue(self._tell)
        elif action.do == "ask" and self._asked is None:
            command = ["timeout", "--kill-after=2", "20", "srun", "--overlap", "--nodes=1", "--ntasks=1"]
            with _shielded():
                self._asked = subprocess.Popen([*command, f"--nodelist={first}", "true"])
        elif answers:
            self._quiet_s, self._asked = 0.0, None

    def _tell(self, line: str) -> None:
        # What srun would have passed on.
        _append(Path(self._job.show().get("StdOut", os.devnull)), line)


def run_rank(command: Sequence[str]) -> int:
    """Runs one rank's command; returns its exit code, and writes a failure's to a file for the supervisor.

    Output goes into the rank's own log, that of rank 0 and all errors also into the job's. Signals are passed
    on: most clusters (proctrack/cgroup) signal this process only, others every process of the task.
    """
    job, env, received, child = Job(), os.environ, [], None
    rank, path = env["SLURM_PROCID"], job.log_dir / f"rank-{env['SLURM_PROCID']}.log"
    # For the stacks of its threads on SIGUSR2.
    env["DEHVF_STACKS"] = str(path)

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        if child is not None:
            child.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    # It would end a child that has not set its handler yet.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    _append(path, f"--- {now} on {env.get('SLURMD_NODENAME')}, restart {job.restarts}")
    streams, pipe = [sys.stderr, sys.stdout] if rank == "0" else [sys.stderr], subprocess.PIPE
    with _shielded():
        tees = [subprocess.Popen(["tee", "-a", str(path)], stdin=pipe, stdout=stream) for stream in streams]
    try:
        with path.open("a") as log:
            out = tees[1].stdin if rank == "0" else log
            child = subprocess.Popen(command, stderr=tees[0].stdin, stdout=out)
    except OSError as error:
        say(f"error: {command[0]}: {error.strerror or error}")
        _append(job.log_dir / f"failed.{job.restarts}", f"{rank} {NOT_FOUND}")
        return NOT_FOUND
    signal.signal(signal.SIGUSR2, pass_on)
    for number in list(received):
        child.send_signal(number)
    is_second = (env.get("SLURM_NODEID"), env.get("SLURM_LOCALID")) == ("1", "0")
    # A pyxis image may lack SLURM's commands.
    successor = Successor(job) if is_second and job.nodes else None
    awake_s = 0.0
    while child.poll() is None:
        time.sleep(0.25)
        awake_s += 0.25
        if successor and not successor.has_acted and awake_s % LOOK_S == 0:
            successor.look(signal.SIGTERM in received)
    code = _as_a_shell(child.returncode)
    for tee in tees:
        # A process that outlives the rank may keep its output open.
        with contextlib.suppress(subprocess.TimeoutExpired):
            tee.communicate(timeout=2)
    if code:
        _append(job.log_dir / f"failed.{job.restarts}", f"{rank} {code}")
    # The first node's death may show as a crash only: stays until the script has given signs of life, the
    # first of which may be old.
    enough = successor.beats + 2 if successor and code not in (0, MISTAKE) else 0
    while successor and successor.beats < enough and not successor.has_acted:
        time.sleep(LOOK_S)
        successor.look(signal.SIGTERM in received)
    return code


def last_step(directory: Path) -> str:
    """The last step in a run's metrics; ``start`` before the first."""
    steps = []
    with contextlib.suppress(OSError), (directory / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 16)))
        steps = re.findall(rb'"step": *(\d+)', file.read())
    return steps[-1].decode() if steps else "start"


def ask(*command: str) -> tuple[str, str]:
    """Runs one of SLURM's commands; returns its output and its error, one of which is empty."""
    pipe = subprocess.PIPE
    try:
        with _shielded():
            process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    except OSError as error:
        return "", str(error)
    output, error = process.communicate()
    return ("", error.strip() or f"exit code {process.returncode}") if process.returncode else (output, "")


def say(line: str) -> None:
    """Prints to the job's log."""
    print(line, file=sys.stderr if line.startswith("error") else sys.stdout, flush=True)


def _given(flags: Sequence[str], name: str) -> list[str]:
    """The values of each ``NAME VALUE`` or ``NAME=VALUE``."""
    return re.findall(rf"(?:^|\0){name}[=\0]([^\0]*)", "\0".join(flags))


def _as_a_shell(code: int) -> int:
    return code if code >= 0 else 128 - code


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


def _append(path: Path, line: str) -> None:
    # The disk may be full.
    with contextlib.suppress(OSError):
        # A run that fails before its first step has no directory yet.
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            print(line, file=file)


@contextlib.contextmanager
def _shielded() -> Iterator[None]:
    """Processes started inside ignore the job's signals, which may go to every process of a task."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def main(argv: list[str]) -> int:
    """Runs ``train``, ``eval`` or ``rank``; returns the exit code."""
    part, *rest = argv
    if part == "rank":
        return run_rank(rest)
    return {"train": Supervisor.train, "eval": Supervisor.evaluate}[part](Supervisor(), rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
