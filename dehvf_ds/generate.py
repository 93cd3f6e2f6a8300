"""Describes pictures, or answers about them, from the shell.

python dehvf_ds/generate.py --model DIR --image FILE [FILE ...] [--prompt TEXT]
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, dehvf_ds/ is first on the path, where our module names would shadow other packages'.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dehvf_ds.batch import Sample
from dehvf_ds.config import UserError, parse_generate_config
from dehvf_ds.data.collate import Collator
from dehvf_ds.data.images import decode_image
from dehvf_ds.data.tokenizer import load_tokenizer
from dehvf_ds.data.transforms import build_image_transform
from dehvf_ds.distributed import has_fast_bf16, read_world, run_entry
from dehvf_ds.evals.decode import Decoding, decode_answers
from dehvf_ds.model import ModelError
from dehvf_ds.model.weights import find_trained


def main(argv: list[str]) -> int:
    """Prints a line a picture; returns the exit code.

    Raises:
        UserError: no such model or picture.
    """
    config = parse_generate_config(_spread_images(argv))
    samples = [Sample(key=path, image=_read_image(path), record={}) for path in config.image]
    try:
        trained = find_trained(config.model, config.language_model, config.vision_tower)
        model = trained.load(config.dtype, fast_bf16=has_fast_bf16()).to(read_world().device)  # pyright: ignore[reportArgumentType]
    except ModelError as error:
        raise UserError(str(error)) from None
    tokenizer = load_tokenizer(trained.tokenizer_source)
    transform = build_image_transform(trained.processor_source, trained.config.image_size)
    collator = Collator(
        tokenizer,
        transform,
        task="caption",
        max_tokens=512,
        prompt=config.prompt or trained.config.prompt,
        for_generation=True,
    )
    decoding = Decoding(max_new_tokens=config.max_new_tokens)
    (texts,) = decode_answers(model, [collator(samples)], tokenizer, decoding)
    for path, text in zip(config.image, texts, strict=True):
        print(text if len(samples) == 1 else f"{path}\t{text}", flush=True)
    return 0


def _spread_images(argv: list[str]) -> list[str]:
    """Lets ``--image a b c`` stand for the list that the parser takes."""
    if "--image" not in argv:
        return argv
    start = argv.index("--image") + 1
    end = next((i for i in range(start, len(argv)) if argv[i].startswith("--")), len(argv))
    flags = [f"--image+={path}" for path in argv[start:end]]
    return [*argv[: start - 1], *flags, *argv[end:]]


def _read_image(path: str):
    try:
        return decode_image(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"--image {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"--image {path}: {error}") from None


if __name__ == "__main__":
    run_entry(main)
