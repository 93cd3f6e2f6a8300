"""Prints one value of a run's configuration, for scripts.

python -m dehvf_ds.config data.train --config coco_llama13b
"""

from __future__ import annotations

import sys

from dehvf_ds.config import UserError, parse_run_config, to_plain


def main(argv: list[str]) -> int:
    """Prints the value of the key that comes first, under the flags after it; returns the exit code."""
    try:
        if not argv:
            raise UserError("usage: python -m dehvf_ds.config KEY [flags of train.py]")
        value = to_plain(parse_run_config(argv[1:]))
        for part in argv[0].split("."):
            if not isinstance(value, dict) or part not in value:
                raise UserError(f"{argv[0]}: no such key")
            value = value[part]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("" if value is None else value)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
