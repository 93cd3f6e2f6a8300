"""Share of the positions of an epoch's steps that are padding, without and with data.bucket_steps.

    python benchmarks/padding.py --data demo_data/scenes/shards/train --max-tokens 48 --bucket-steps 0 8 64
    python benchmarks/padding.py --data data/scienceqa/train --task scienceqa --max-tokens 512 --micro-batch 4

Pictures are not looked at. The last, partial step of the epoch is left out.
"""

from __future__ import annotations

import torch
from bench import flags
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dehvf_ds.config import DataConfig, ScienceqaConfig
from dehvf_ds.data.collate import ImageTransform, load_tokenizer
from dehvf_ds.data.examples import open_examples
from dehvf_ds.data.loader import build_loader


class Blank(ImageTransform):
    """Gives pictures of one pixel."""

    image_size = 1

    def __init__(self) -> None:
        pass

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        """Looks at nothing."""
        return torch.zeros(3, 1, 1)


def main() -> None:
    """Parses the flags; prints a line for each number of steps that rows are sorted among."""
    parser = flags(__doc__, backbones=True)
    parser.add_argument("--data", default="demo_data/scenes/shards/train")
    parser.add_argument("--task", default="caption", choices=("caption", "scienceqa", "chat"))
    parser.add_argument("--lectures", action="store_true", help="train ScienceQA's lecture and solution, too")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--global-batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--bucket-steps", type=int, nargs="+", default=[0, 4, 16, 64])
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.language_model)
    for steps in args.bucket_steps:
        config = DataConfig(
            train=args.data,
            task=args.task,
            max_tokens=args.max_tokens,
            num_workers=0,
            bucket_steps=steps,
            scienceqa=ScienceqaConfig(lecture=args.lectures, solution=args.lectures),
        )
        examples = open_examples(config, seed=0)
        num_rows = text = positions = largest = 0
        for rank in range(args.ranks):
            loader = build_loader(
                config,
                examples,
                tokenizer,
                Blank(),
                seed=0,
                rank=rank,
                world_size=args.ranks,
                micro_batch_size=args.micro_batch,
                accumulation=args.global_batch // (args.micro_batch * args.ranks),
                start_sample=0,
                num_steps=len(examples) // args.global_batch,
            )
            for batch in loader:
                facts = batch.count()
                num_rows, text = num_rows + facts.num_rows, text + facts.num_text_tokens
                positions += facts.num_positions
                largest = max(largest, facts.num_positions)
        print(
            f"bucket_steps {steps}: {100 * (1 - text / positions):.1f} % of {positions} positions padding "
            f"({num_rows} rows of {text / num_rows:.1f} tokens; at most {largest} in a micro-batch)",
            flush=True,
        )


if __name__ == "__main__":
    main()
