"""The artifact: what was trained comes back, alone or on its bases, and nothing else passes for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_artifacts import DECODER, build_bases, save, trained_model
from tiny_models import build_model, text_config, vision_config
from transformers import AutoModel, AutoModelForCausalLM

from dehvf_ds.model import ModelError
from dehvf_ds.model.adapter import find_trained, load_adapter
from dehvf_ds.model.ffn import fold_lora


@pytest.fixture
def bases(tmp_path: Path) -> dict[str, str]:
    return build_bases(tmp_path)


@pytest.mark.parametrize("fusion", ["ffn", "prefix", "none"])
def test_base_and_artifact_make_the_trained_model_again_and_folding_changes_no_logit(
    tmp_path, bases, inputs, fusion
) -> None:
    model = trained_model(bases, fusion=fusion)
    if fusion == "none":  # a tower that is not used needs no weights
        (Path(bases["vision_tower"]) / "model.safetensors").unlink()
    save(model, bases, tmp_path / "run" / "adapter")
    loaded = find_trained(tmp_path / "run").load()
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert json.loads((tmp_path / "run/adapter/manifest.json").read_text())["step"] == 7
    inputs.pop("labels")
    fold_lora(loaded)
    assert not any("lora_" in name for name in loaded.state_dict())
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_peft_loads_the_adapters_alone_on_the_plain_base(tmp_path, bases, inputs) -> None:
    model = trained_model(bases, fusion="none")
    save(model, bases, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(bases["language_model"])
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter" / "lora").eval()
    ids = inputs["input_ids"]
    torch.testing.assert_close(plain(ids).logits, model(ids).logits)
    with plain.disable_adapter():
        assert not torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-3)


def test_another_base_is_refused_by_name_and_a_copy_in_half_precision_taken(tmp_path, bases) -> None:
    save(trained_model(bases), bases, tmp_path / "adapter")
    decoder = AutoModelForCausalLM.from_pretrained(bases["language_model"], dtype=torch.bfloat16)
    decoder.save_pretrained(tmp_path / "half", max_shard_size="20KB")
    find_trained(tmp_path / "adapter", language_model=str(tmp_path / "half"))
    AutoModel.from_config(vision_config()).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"trained on .*tower; .*other differs from it in the weights"):
        find_trained(tmp_path / "adapter", vision_tower=str(tmp_path / "other"))
    shorter = text_config(**DECODER, num_hidden_layers=3)
    AutoModelForCausalLM.from_config(shorter).save_pretrained(tmp_path / "shorter")
    with pytest.raises(ModelError, match=r"is not the language model .* num_hidden_layers differ"):
        find_trained(tmp_path / "adapter", language_model=str(tmp_path / "shorter"))


def test_weights_of_another_versions_function_are_refused(tmp_path, bases) -> None:
    model = trained_model(bases)
    save(model, bases, tmp_path / "adapter")
    model.config.save_pretrained(tmp_path / "merged")
    find_trained(tmp_path / "merged")
    for file in (tmp_path / "adapter/manifest.json", tmp_path / "merged/config.json"):
        content = json.loads(file.read_text())
        assert content.pop("version") == 4
        # The first version wrote none.
        for older, version in (({}, 1), ({"version": 2}, 2)):
            file.write_text(json.dumps(content | older))
            with pytest.raises(ModelError, match=rf"function of the trained weights \({version}, not 4\)"):
                find_trained(file.parent)


def test_what_is_no_whole_artifact_of_such_a_model_is_named(tmp_path, bases) -> None:
    model = trained_model(bases)
    save(model, bases, tmp_path / "adapter")
    next(iter(model.trainable_parameters().values())).data[0] = float("nan")
    with pytest.raises(ModelError, match="not written, empty or not finite"):
        save(model, bases, tmp_path / "broken")
    for path in ("nowhere", "broken"):
        with pytest.raises(ModelError, match=f"{path}: no such directory"):
            find_trained(tmp_path / path)
    with pytest.raises(ModelError, match="do not fit the model"):
        load_adapter(build_model(router="last"), tmp_path / "adapter")
    file = tmp_path / "adapter" / "visual.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ModelError, match=r"visual\.safetensors: changed since it was written"):
        find_trained(tmp_path / "adapter")
    for content in ("", "[]", "{}", "null", '{"files": 3, "bases": {}}', "\0"):
        (tmp_path / "adapter/manifest.json").write_text(content)
        with pytest.raises(ModelError, match=r"adapter/manifest.json: damaged \(.*\); copy it again"):
            find_trained(tmp_path / "adapter")
