"""What DeepSpeed really gathers, against the formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import run_ranks
from tiny_models import text_config, vision_config
from transformers import AutoModel, AutoModelForCausalLM

WORKER = Path(__file__).parent / "gathers_worker.py"
PREFETCH = 1_200
DEEP = 24_000
"""Live elements in the ratio of the shipped configuration to 13B: three layers; a prefetch of 1/6."""

WHOLE = 1_000_000
"""A window that the whole model fits into."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpointing", "window"),
    [(False, DEEP), (True, DEEP), (True, WHOLE)],
    ids=["kept", "recomputed", "recomputed within the window"],
)
def test_zero3_gathers_and_holds_what_the_formulas_say(
    tmp_path: Path, checkpointing: bool, window: int
) -> None:
    text = text_config()
    text.num_hidden_layers = 16
    AutoModelForCausalLM.from_config(text).save_pretrained(tmp_path / "llm")
    AutoModel.from_config(vision_config()).save_pretrained(tmp_path / "tower")
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": window,
        "stage3_max_reuse_distance": window,
        "stage3_prefetch_bucket_size": PREFETCH,
    }
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    run_ranks(WORKER, [str(tmp_path), json.dumps(checkpointing)], 2)
    found = json.loads((tmp_path / "gathers.json").read_text())
    assert found["planned"] == pytest.approx(found["gathered"], rel=0.05)
    # The formula adds the copies that unpacking makes, and keeps the tower where the window has room for it;
    # DeepSpeed lets go what is not used again.
    tower = found["tower"] if window == WHOLE else 0
    assert found["planned_live"] - PREFETCH - tower == pytest.approx(found["live"], rel=0.1)
