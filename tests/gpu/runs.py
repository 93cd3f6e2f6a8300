"""Runs of the programs on one device, each a process of its own, started once and found by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from processes import REPOSITORY
from transformers import AutoConfig, AutoModelForCausalLM

STEPS = 6
SAVED = 3
TIMEOUT_S = 200

CAPTIONS = ["--eval.tokenizer", "simple"]
QUESTIONS = ["--data.task", "scienceqa", "--data.max_tokens", "400"]


class Runs:
    """Training runs by name, on ``cuda`` or ``cpu``; ``world`` is what ``tiny_entries.build_world`` made."""

    def __init__(self, device: str, world: Path) -> None:
        self.device = device
        self.world = world
        self._futures: dict[str, Future[str]] = {}
        self._resumed: dict[str, tuple[list[dict[str, Any]], Future[None]]] = {}
        self._pool = ThreadPoolExecutor(max_workers=8 if device == "cuda" else 1)

    def __enter__(self) -> Runs:
        if self.device == "cuda":
            for name in ("zero2", "zero3", "zero3-checkpointing", "zero2-bulky", "zero3-bulky"):
                self._start(name)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def directory(self, name: str) -> Path:
        """A run's directory."""
        return self.world / "runs" / f"{self.device}-{name}"

    def finished(self, name: str) -> Path:
        """Waits for a run's end; returns its directory."""
        self._start(name)
        self._futures[name].result()
        return self.directory(name)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """A finished run's metrics, by step."""
        path = self.finished(name) / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def losses(self, name: str) -> list[float]:
        """A finished run's losses."""
        return [line["train/loss"] for line in self.lines(name)]

    def arguments(self, name: str) -> list[str]:
        """A run's flags; its name begins with the DeepSpeed JSON's."""
        stage, _, kind = name.partition("-")
        flags = [
            *("--config", str(self.world / "recipe.yaml"), "--run_dir", str(self.directory(name))),
            *("--deepspeed", str(self._deepspeed_json(stage)), "--data.num_workers", "2"),
        ]
        if kind == "bulky":
            sizes = ["--train.steps", "3", "--train.global_batch_size", "32", "--train.save_every", "0"]
            llm = ["--model.language_model", str(self._bulky_llm())]
            return [*flags, *sizes, *llm, "--train.micro_batch_size", "32"]
        flags += ["--train.steps", str(STEPS), "--train.save_every", str(SAVED), "--train.warmup_steps", "2"]
        data, task = ("scienceqa", QUESTIONS) if stage == "zero2" else ("test", CAPTIONS)
        flags += [*task, "--data.val", str(self.world / data), "--data.val_samples", "4"]
        flags += ["--train.validate_every", str(SAVED), "--eval.every_steps", str(SAVED)]
        flags += ["--eval.max_samples", "4", "--eval.max_new_tokens", "8", "--eval.batch_size", "3"]
        if stage == "zero2":
            flags += ["--data.train", str(self.world / "scienceqa")]
        return [*flags, "--train.activation_checkpointing", str(kind == "checkpointing").lower()]

    def resumed(self, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Leaves a finished run as a kill after step ``SAVED`` did, and resumes it to its end.

        Returns the metrics of the whole run and of the resumed one, by step.
        """
        for one in ("zero2", "zero3") if self.device == "cuda" else (name,):
            if one not in self._resumed:
                self._resumed[one] = self.lines(one), self._pool.submit(self._train_again, one)
        whole, again = self._resumed[name]
        again.result()
        return whole, self.lines(name)

    def _train_again(self, name: str) -> None:
        for path in (self.directory(name) / "checkpoints").glob("step_*"):
            if int(path.name.removeprefix("step_")) > SAVED:
                shutil.rmtree(path)
        self.run("dehvf_ds/train.py", self.arguments(name))

    def run(self, entry: str, args: list[str]) -> str:
        """Runs a program as one process, from another folder; returns what it printed."""
        inherited = os.environ.get("PYTHONPATH")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *([inherited] if inherited else [])]),
            "HF_HUB_OFFLINE": "1",
        }
        if self.device == "cpu":
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
            environment.pop(name, None)
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / entry), *args],
            env=environment,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{entry}, exit code {done.returncode}:\n{done.stdout[-5000:]}"
        return done.stdout

    def _start(self, name: str) -> None:
        if name not in self._futures:
            args = self.arguments(name)
            self._futures[name] = self._pool.submit(self.run, "dehvf_ds/train.py", args)

    def _deepspeed_json(self, stage: str) -> Path:
        """The shipped configuration, in bf16 also where the CPU has no fast one."""
        content = json.loads((REPOSITORY / f"ds_configs/{stage}.json").read_text())
        path = self.world / f"{self.device}-{stage}.json"
        path.write_text(json.dumps(content | {"bf16": {"enabled": True}}))
        return path

    def _bulky_llm(self) -> Path:
        """Half a billion random parameters, so that weights and activations outweigh work spaces.

        Fewer in a rehearsal; of the tokenizer's vocabulary, as others are refused.
        """
        path = self.world / "bulky"
        if not path.is_dir():
            config = AutoConfig.from_pretrained(self.world / "llm")
            sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8}
            config.update(sizes | {"num_attention_heads": 16, "head_dim": 128, "num_key_value_heads": 16})
            if self.device == "cpu":
                config.update({"hidden_size": 128, "intermediate_size": 256})
            with torch.device(self.device):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(path)
            for file in (self.world / "llm").glob("tokenizer*"):
                shutil.copy(file, path)
            del model
            if self.device == "cuda":
                torch.cuda.empty_cache()
        return path
