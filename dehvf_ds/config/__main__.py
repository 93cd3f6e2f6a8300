"""Prints one value of a run's configuration, for scripts.

python -m dehvf_ds.config data.train --config coco_llama13b
"""

import sys
from operator import attrgetter

from dehvf_ds.config import UserError, parse_run_config, to_plain


def main(argv: list[str]) -> int:
    """Prints the value of the key that comes first, under the flags after it; returns the exit code."""
    key, *flags = argv or [""]
    try:
        value = to_plain(attrgetter(key)(parse_run_config(flags)))
    except (AttributeError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("" if value is None else value)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
