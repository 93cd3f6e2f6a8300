"""Recipes and DeepSpeed JSONs that come with the package: found by name, from whatever directory."""

from __future__ import annotations

from pathlib import Path

from dehvf_ds.config.errors import UserError

_PACKAGE = Path(__file__).parents[1]

RECIPES_DIR = _PACKAGE / "recipes"

# A wheel has them inside the package, a clone beside it.
DEEPSPEED_DIR = next(
    (path for path in (_PACKAGE / "ds_configs", _PACKAGE.parent / "ds_configs") if path.is_dir()),
    _PACKAGE / "ds_configs",
)


def find_recipe(given: str) -> Path:
    """The file that ``--config`` means: a path, or a shipped recipe by its name.

    ``coco_llama13b`` and ``dehvf_ds/recipes/coco_llama13b.yaml`` name the same shipped recipe from every
    working directory; a file that lies there under the given path comes first.

    Raises:
        UserError: neither.
    """
    found = _find(given, RECIPES_DIR, ".yaml", (".", "recipes", "dehvf_ds/recipes"))
    if found is None:
        where = looked_in(given)
        raise UserError(
            f"--config {given}: no such file{where}, nor a recipe; recipes: {_names(RECIPES_DIR, '.yaml')}"
        )
    return found


def find_deepspeed_json(given: str) -> Path:
    """The file that ``--deepspeed`` means: a path, or a shipped one: ``ds_configs/zero3.json``, ``zero3``.

    Raises:
        UserError: neither.
    """
    found = _find(given, DEEPSPEED_DIR, ".json", (".", "ds_configs", "dehvf_ds/ds_configs"))
    if found is None:
        where, names = looked_in(given), _names(DEEPSPEED_DIR, ".json")
        raise UserError(
            f"--deepspeed {given}: no such file{where}, nor one that is shipped; shipped: {names}"
        )
    return found


def looked_in(path: str | Path) -> str:
    """Where a relative path was looked for, to go after "no such file"; nothing for an absolute one."""
    return "" if Path(path).is_absolute() else f" in {Path.cwd()}"


def _find(given: str, directory: Path, suffix: str, folders: tuple[str, ...]) -> Path | None:
    path = Path(given)
    if path.is_file():
        return path
    shipped = directory / f"{path.name.removesuffix(suffix)}{suffix}"
    return shipped if path.parent.as_posix() in folders and shipped.is_file() else None


def _names(directory: Path, suffix: str) -> str:
    return ", ".join(sorted(path.stem for path in directory.glob(f"*{suffix}")))
