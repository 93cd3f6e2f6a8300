"""A copy beside the engine decodes as the engine's model does, and leaves the training as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from tiny_models import LORA, text_config, vision_config
from transformers import AutoModel, AutoModelForCausalLM

from dehvf_ds.distributed import World
from dehvf_ds.model.backbones import build_config, load_model
from dehvf_ds.training.zero import full_copy

WORKER = Path(__file__).parent / "full_model_worker.py"


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("replica")
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(text_config()).save_pretrained(directory / "llm")
    AutoModel.from_config(vision_config()).save_pretrained(directory / "tower")
    return directory


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_of_a_full_model_is_equal_and_apart(tmp_path: Path, job: Path, tied: bool) -> None:
    text = text_config()
    text.tie_word_embeddings = tied
    AutoModelForCausalLM.from_config(text).save_pretrained(tmp_path / "llm")
    config = build_config(str(tmp_path / "llm"), str(job / "tower"), feature_layers=[1, 4], lora=LORA)
    model = load_model(config, str(tmp_path / "llm"), str(job / "tower"), dtype=torch.bfloat16)
    copy = full_copy(model, World(0, 0, 1, 1, torch.device("cpu")))
    theirs, ours = model.state_dict(), copy.state_dict()
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
        assert ours[name].dtype == value.dtype
        assert ours[name].data_ptr() != value.data_ptr()
    embedding, head = copy.get_input_embeddings().weight, copy.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) == tied


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3, 2])
def test_decoding_beside_zero_changes_nothing(job: Path, stage: int) -> None:
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    (job / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    run_ranks(WORKER, [str(job)], 2)
    found = json.loads((job / "result.json").read_text())
    assert found["losses"][0] == found["losses"][1]
    assert found["losses_of_both"][0] == pytest.approx(found["losses_of_both"][1], rel=1e-6)
    # Ranks decode other rows, to other lengths.
    assert found["num_tokens"] == [3, 8]
