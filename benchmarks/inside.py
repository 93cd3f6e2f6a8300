"""Memory of a whole copy and of its decoding on the CPU, against what the plan says of them.

python benchmarks/inside.py --model runs/demo --data demo_data/scenes/shards/val
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dehvf_ds.config import InsideConfig, ScienceqaConfig
from dehvf_ds.data.collate import build_image_transform, load_tokenizer
from dehvf_ds.distributed import World
from dehvf_ds.evaluation.dataset import open_questions
from dehvf_ds.model.adapter import find_trained
from dehvf_ds.planning.memory import Sharding, count_parameters, evaluation_bytes
from dehvf_ds.training.full_model import full_copy

MIB = 2**20


def main() -> None:
    """Prints the four numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a run of captions")
    parser.add_argument("--data", required=True, help="shards of captions")
    args = parser.parse_args()
    trained = find_trained(args.model, None, None)
    model = trained.load("fp32")
    questions = open_questions(
        args.data,
        "coco",
        load_tokenizer(trained.tokenizer_source),
        build_image_transform(trained.processor_source, trained.config.image_size),
        prompt=trained.config.prompt,
        scienceqa=ScienceqaConfig(),
    )
    settings = InsideConfig(every_steps=1)
    # What libraries take at their first use is not the copy's.
    questions.ask(model, [0])
    before = resident()
    copy = full_copy(model, World(0, 0, 1, 1, torch.device("cpu")))
    with_copy = resident()
    peak = Peak()
    questions.ask(copy, range(settings.batch_size))
    decoding = peak.end() - with_copy
    sharding = Sharding.read({"zero_optimization": {"stage": 3}}, nodes=1, gpus_per_node=1)
    planned = list(evaluation_bytes(model.config, count_parameters(model), sharding, settings).values())
    print(f"copy: {(with_copy - before) / MIB:.0f} MiB measured, {planned[1] / MIB:.0f} planned")
    print(f"decoding: {decoding / MIB:.0f} MiB measured, {planned[2] / MIB:.0f} planned (an upper bound)")


class Peak:
    """The largest resident size of this process, looked at every 5 ms from now on."""

    def __init__(self):
        self._bytes, self._ended = 0, False
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended:
            self._bytes = max(self._bytes, resident())
            time.sleep(0.005)

    def end(self) -> int:
        """Stops looking; bytes."""
        self._ended = True
        self._thread.join()
        return self._bytes


def resident() -> int:
    """Resident bytes of this process."""
    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    main()
