"""Memory of a full model gather and of its decoding on the CPU, against what the plan says of them.

python benchmarks/inside.py --model runs/demo --data demo_data/scenes/shards/val
"""

from __future__ import annotations

import torch
from bench import MIB, PeakMemory, flags, resident_bytes

from dehvf_ds.config import InTrainingConfig, ScienceqaConfig
from dehvf_ds.data.collate import build_image_transform, load_tokenizer
from dehvf_ds.distributed import World
from dehvf_ds.evaluation.dataset import Questions, open_questions
from dehvf_ds.model.adapter import TrainedModel, find_trained
from dehvf_ds.planning.estimate import evaluation_bytes
from dehvf_ds.planning.memory import Sharding, count_parameters
from dehvf_ds.training.zero import full_copy


def main() -> None:
    """Prints the four numbers."""
    parser = flags(__doc__)
    parser.add_argument("--model", required=True, help="a run of captions")
    parser.add_argument("--data", required=True, help="shards of captions")
    args = parser.parse_args()
    trained = find_trained(args.model)
    model = trained.load("fp32")
    questions = caption_questions(trained, args.data)
    settings = InTrainingConfig(every_steps=1)
    # What libraries take at their first use is not the copy's.
    questions.ask(model, [0])
    before = resident_bytes()
    copy = full_copy(model, World(0, 0, 1, 1, torch.device("cpu")))
    held = resident_bytes() - before
    with PeakMemory() as decoding:
        questions.ask(copy, range(settings.batch_size))
    sharding = Sharding.read({"zero_optimization": {"stage": 3}}, nodes=1, gpus_per_node=1)
    planned = list(evaluation_bytes(model.config, count_parameters(model), sharding, settings).values())
    print(f"copy: {held / MIB:.0f} MiB measured, {planned[1] / MIB:.0f} planned")
    print(
        f"decoding: {decoding.bytes / MIB:.0f} MiB measured, {planned[2] / MIB:.0f} planned (an upper bound)"
    )


def caption_questions(trained: TrainedModel, data: str) -> Questions:
    """Captions to ask of a trained model, as evaluation asks them."""
    return open_questions(
        data,
        "caption",
        load_tokenizer(trained.tokenizer_source),
        build_image_transform(trained.processor_source, trained.config.image_size),
        prompt=trained.config.prompt,
        scienceqa=ScienceqaConfig(),
    )


if __name__ == "__main__":
    main()
