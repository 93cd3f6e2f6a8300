"""Settings that were given and change nothing, because of others."""

from __future__ import annotations

from collections.abc import Callable

from dehvf_ds.config.kinds import settings_of
from dehvf_ds.config.run import RunConfig

_OF_THE_VISUAL_FFN = ("model.router", "model.router_dim", "model.rank", "model.levels", "model.num_levels")
_OF_LORA = ("model.lora.alpha", "model.lora.dropout", "model.lora.targets")
_OF_INSIDE = ("eval.data", "eval.max_samples", "eval.batch_size", "eval.max_new_tokens", "eval.num_beams")

# Names, why they change nothing, and when.
_RULES: tuple[tuple[tuple[str, ...], str, Callable[[RunConfig], bool]], ...] = (
    (("model.prefix_tokens",), "model.fusion is not prefix", lambda c: c.model.fusion != "prefix"),
    (_OF_THE_VISUAL_FFN, "model.fusion is not ffn", lambda c: c.model.fusion != "ffn"),
    (("model.image_size",), "model.fusion none looks at no picture", lambda c: c.model.fusion == "none"),
    (("model.router_dim",), "model.router is not layer", lambda c: c.model.router != "layer"),
    (("model.num_levels",), "model.levels names them", lambda c: c.model.levels is not None),
    (_OF_LORA, "model.lora.rank is 0", lambda c: c.model.lora.rank == 0),
    (("data.prompt", "data.captions"), "data.task is not caption", lambda c: c.data.task != "caption"),
    (
        ("data.scienceqa.image_captions", "data.scienceqa.lecture", "data.scienceqa.solution"),
        "data.task is not scienceqa",
        lambda c: c.data.task != "scienceqa",
    ),
    (("data.cache_gb",), "data.cache_dir is not set", lambda c: c.data.cache_dir is None),
    (("data.max_bad_share",), "data.on_bad is raise", lambda c: c.data.on_bad == "raise"),
    (("data.val_samples", "train.eval_every"), "data.val is not set", lambda c: c.data.val is None),
    ((*_OF_INSIDE, "eval.tokenizer"), "eval.every_steps is 0", lambda c: not c.eval.every_steps),
    (("init_from",), "resume names a checkpoint", lambda c: c.resume not in ("auto", "never")),
)


def ignored_settings(config: RunConfig) -> list[str]:
    """One line for each setting that is not its default and has no effect."""
    settings = settings_of(RunConfig)
    lines = {}
    for names, reason, applies in _RULES:
        if applies(config):
            for name in names:
                value = _value(config, name)
                if value != settings[name].default and name not in lines:
                    lines[name] = f"{name} {value} has no effect: {reason}"
    return list(lines.values())


def _value(config: object, name: str) -> object:
    for part in name.split("."):
        config = getattr(config, part)
    return config
