from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tiny_artifacts import build_bases
from tiny_models import LORA, build_model
from tiny_steps import rows
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CompileConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from dehvf_ds.batch import IGNORE_INDEX
from dehvf_ds.model import ModelError, modeling
from dehvf_ds.model.attention import known_masks
from dehvf_ds.model.backbones import build_config, load_model

FUSIONS = ["ffn", "prefix", "none"]


@pytest.mark.parametrize("lengths", [(9, 5, 7), (6, 6, 6)], ids=["padded", "equal"])
@pytest.mark.parametrize("text", ["llama", "windows", "wide windows"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_model_that_is_told_what_is_padding_computes_the_same_bits(fusion, text, lengths) -> None:
    batch = rows(*lengths, pictures=3 if lengths[0] == 6 else 2).with_facts()
    found = []
    for inputs in (batch.inputs(), batch.training_inputs()):
        kind = "llama" if text == "llama" else "mistral"
        model = build_model(kind, fusion=fusion, trained=True)
        if text != "llama":
            model.language_model.config.sliding_window = 4 if text == "windows" else 64
        loss = model(**inputs).loss_sum
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.trainable_parameters().values())])
    assert all(torch.equal(asked, told) for asked, told in zip(*found, strict=True))
    if text == "windows":
        # The window is seen, or nothing would have been compared.
        model.language_model.config.sliding_window = None
        assert not torch.equal(model(**batch.training_inputs()).loss_sum.detach(), found[0][0])


def test_masks_of_another_are_used_and_stay(monkeypatch) -> None:
    """A library may have put its own function in the place of transformers'."""
    own, calls = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"], []

    def counted(**given):
        calls.append(given["allow_is_causal_skip"])
        return own(**given)

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", counted)
    model = build_model()
    with known_masks("sdpa", masked=True):
        model(**rows(9, 5, 7).training_inputs())
        assert calls == [False]
        model(**rows(9, 5, 7).inputs())
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is counted


@pytest.mark.parametrize(("text", "vision"), [("llama", "clip"), ("mistral", "dino")])
@pytest.mark.parametrize("fusion", ["ffn", "none"])
def test_at_the_start_logits_are_the_base_models_bits(tmp_path, text, vision, fusion, inputs) -> None:
    bases = build_bases(tmp_path, text, vision)
    config = build_config(**bases, fusion=fusion, num_feature_layers=2, rank=8, lora=LORA)
    model = load_model(config, **bases, dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(bases["language_model"]).eval()
    expected = base(inputs["input_ids"]).logits
    del inputs["labels"], inputs["attention_mask"]
    assert torch.equal(model(**inputs).logits, expected)


def test_the_trainable_set_is_exactly_the_branch_and_the_adapters() -> None:
    model = build_model()
    ffns = [f"language_model.model.layers.{i}.mlp" for i in range(4)]
    lora = [f"{ffn}.ffn.down_proj.lora_{side}.default.weight" for ffn in ffns for side in "AB"]
    scales = [f"{ffn}.scale_{end}" for ffn in ffns for end in ("in", "out")]
    fuser = [f"fuser.{name}" for name in ("layer_embedding", "w_hidden", "w_query", "w_key")]
    reader = [f"reader.{name}" for name in ("w_query", "w_out", "key_positions", "value_positions")]
    expected = {*lora, *scales, *fuser, *reader, "projector.w_down", "projector.bias"}
    assert set(model.trainable_parameters()) == expected
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    model.fuser.more = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert set(model.trainable_parameters()) == expected | {"fuser.more.0.weight", "fuser.more.0.bias"}


@pytest.mark.parametrize("fusion", ["ffn", "prefix"])
def test_a_row_without_picture_does_not_see_its_pixels_and_others_do(fusion: str, inputs) -> None:
    model = build_model(fusion=fusion, trained=True)
    labels = inputs.pop("labels")
    before = model(**inputs).logits[:, -labels.shape[1] :]
    inputs["pixel_values"] = torch.randn_like(inputs["pixel_values"])
    after = model(**inputs).logits[:, -labels.shape[1] :]
    torch.testing.assert_close(after[1], before[1])
    assert not torch.allclose(after[0], before[0], atol=1e-4)
    # Without any picture every trainable is still reached.
    inputs["has_image"][:] = False
    assert modeling.IGNORE_INDEX == IGNORE_INDEX
    model(**inputs, labels=labels).loss.backward()
    assert [name for name, p in model.trainable_parameters().items() if p.grad is None] == []


@pytest.mark.parametrize("fusion", FUSIONS)
def test_activation_checkpointing_changes_no_gradient(fusion: str, inputs) -> None:
    plain, checkpointed = (build_model(fusion=fusion, trained=True).train() for _ in range(2))
    checkpointed.recompute_layers()
    plain(**inputs).loss.backward()
    checkpointed(**inputs).loss.backward()
    theirs = checkpointed.trainable_parameters()
    for name, parameter in plain.trainable_parameters().items():
        torch.testing.assert_close(theirs[name].grad, parameter.grad, msg=name)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_cached_batched_generation_equals_decoding_each_row_without_cache(fusion: str, inputs) -> None:
    model = build_model(fusion=fusion, trained=True)
    lengths = [10, 7, 10]
    ids = inputs["input_ids"].clone()
    mask = torch.ones_like(ids)
    ids[1] = torch.cat([torch.zeros(3, dtype=torch.long), ids[1, :7]])
    mask[1, :3] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    batched = model.generate(ids, inputs["pixel_values"], inputs["has_image"], pad_token_id=0, **arguments)
    for row, length in enumerate(lengths):
        text = ids[row : row + 1, -length:]
        seen = {name: inputs[name][row : row + 1] for name in ("pixel_values", "has_image")}
        for step in range(6):
            logits = model(text, **seen).logits[0, -1]
            best = logits.topk(2).values
            assert best[0] - best[1] > 1e-4, "a near-tie: choose another seed"
            assert batched[row, step] == logits.argmax()
            text = torch.cat([text, batched[row : row + 1, step : step + 1]], dim=1)


@pytest.mark.parametrize("beams", [1, 3])
def test_memory_may_be_given_encoded_or_prepared(inputs, beams) -> None:
    model = build_model(trained=True)
    ids, settings = inputs["input_ids"], {"max_new_tokens": 5, "num_beams": beams, "pad_token_id": 0}
    calls = []
    model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    expected = model.generate(ids, inputs["pixel_values"], inputs["has_image"], **settings)
    assert len(calls) == 1, "a picture is encoded once for a whole generation"
    encoded, _ = model.encode_images(inputs["pixel_values"], inputs["has_image"])
    prepared = model.prepare_memory(encoded)
    assert prepared.shape == (*encoded.shape[:2], 2, *encoded.shape[2:])
    for memory in (encoded, prepared):
        assert torch.equal(model.generate(ids, visual_memory=memory, **settings), expected)
    logits = [model(ids, visual_memory=memory).logits for memory in (encoded, prepared)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    prepared.sum().backward()
    assert all(ffn.scale_out.grad.norm() > 0 for ffn in (layer.mlp for layer in model.get_decoder().layers))


def test_a_memory_set_without_gradients_gives_them_when_they_are_asked_for(inputs) -> None:
    model = build_model(trained=True)
    memory = model.encode_images(inputs["pixel_values"], None)[0].detach().requires_grad_()
    with torch.no_grad():
        model(inputs["input_ids"], visual_memory=memory)
    model(inputs["input_ids"], visual_memory=memory).logits.sum().backward()
    assert memory.grad.norm() > 0


@pytest.mark.parametrize("fusion", FUSIONS)
def test_generation_keeps_the_logits_of_the_last_position_alone(fusion: str, inputs) -> None:
    model = build_model(fusion=fusion, trained=True)
    given = {name: inputs[name] for name in ("input_ids", "pixel_values", "has_image")}
    kept = model(**given, logits_to_keep=2).logits
    assert kept.shape[1] == 2
    torch.testing.assert_close(kept, model(**given).logits[:, -2:])
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: shapes.append(out.shape[1]))
    model.generate(**given, max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    assert shapes == [1, 1, 1]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_static_cache_and_a_compiled_step_give_the_same_tokens(fusion: str, inputs) -> None:
    model = build_model(fusion=fusion, trained=True)
    given = {name: inputs[name] for name in ("input_ids", "pixel_values", "has_image")}
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :3] = 0
    given |= {"attention_mask": mask, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**given)
    graphs = []

    def trace(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = CompileConfig(fullgraph=True, backend=trace, mode=None)
    compiled._compile_all_devices = True
    static = {"cache_implementation": "static"}
    for settings in (static, static | {"compile_config": compiled}):
        assert torch.equal(model.generate(**given, **settings), expected)
    given["pixel_values"] = torch.randn_like(given["pixel_values"])
    others = model.generate(**given)
    assert torch.equal(others, expected) == (fusion == "none")
    assert torch.equal(model.generate(**given, **static, compile_config=compiled), others)
    assert len(graphs) == 1, "one graph for every token and picture"


@pytest.mark.parametrize("fusion", FUSIONS)
def test_saved_and_loaded_weights_are_the_same_bits(tmp_path, fusion: str) -> None:
    model = build_model("mistral", "dino", fusion=fusion, trained=True)
    model.save_pretrained(tmp_path)
    saved, found = (m.state_dict() for m in (model, AutoModelForImageTextToText.from_pretrained(tmp_path)))
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[name], found[name]) for name in saved)


def test_the_router_last_projects_the_deepest_level_alone(inputs) -> None:
    model = build_model(router="last", trained=True)
    assert model.config.feature_layers == [4]
    assert model(**inputs).router_weights.shape == (3, 4, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fusion": "soup"}, "fusion 'soup' is not one of"),
        ({"router": "token"}, "router 'token' is not one of"),
        ({"feature_layers": [9]}, "feature layer 9 of a tower with 4 blocks"),
        ({"fusion": "prefix", "prefix_tokens": 5}, "prefix_tokens 5 does not pool 4x4 patches"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(**settings)


@pytest.mark.parametrize("fusion", ["ffn", "prefix"])
def test_one_picture_is_not_shown_to_several_rows(fusion: str, inputs) -> None:
    model = build_model(fusion=fusion, trained=True)
    given = {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"][:1]}
    for call in (model, partial(model.generate, max_new_tokens=2)):
        with pytest.raises(ValueError, match="1 pictures for 3 rows"):
            call(**given)


SHARING = {
    "shared, own and none": [0, 0, 1, None, 0, 1, 2, None],
    "pairs": [0, 0, 1, 1],
    "one for all": [0, 0, 0],
    "one has none": [0, None, 1],
    "nobody has one": [None, None, None],
}


@pytest.mark.parametrize("shown", SHARING.values(), ids=SHARING)
@pytest.mark.parametrize("settings", [{}, {"router": "static"}, {"fusion": "prefix"}], ids=str)
def test_a_picture_that_rows_share_is_encoded_once_and_trains_the_same(settings: dict, shown: list) -> None:
    """Loss, every gradient, router weights and answers equal those of one picture a row."""
    generator = torch.Generator().manual_seed(2)
    count = max((number + 1 for number in shown if number is not None), default=0)
    pictures = torch.randn(max(count, 1), 3, 16, 16, generator=generator) * (count > 0)
    picture = torch.tensor([number or 0 for number in shown])
    has_image = torch.tensor([number is not None for number in shown])
    text = {"input_ids": torch.randint(3, 64, (len(shown), 9), generator=generator), "has_image": has_image}
    one_a_row = {"pixel_values": pictures[picture] * has_image[:, None, None, None]}
    found, looks = [], []
    for seen in (one_a_row, {"pixel_values": pictures, "picture": picture}):
        model = build_model(trained=True, **settings).train()
        model.vision_tower.register_forward_pre_hook(lambda _module, args: looks.append(len(args[0])))
        output = model(**text, **seen, labels=text["input_ids"])
        output.loss_sum.backward()
        numbers = {name: p.grad for name, p in model.trainable_parameters().items()}
        numbers["loss"] = output.loss.detach()
        if output.router_weights is not None:
            numbers["router"] = output.router_weights.detach()[has_image]
        numbers["answers"] = model.eval().generate(
            **text, **seen, max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0
        )
        found.append(numbers)
    assert looks == [len(shown)] * 2 + [len(pictures)] * 2
    for name, wanted in found[0].items():
        assert wanted is not None, name
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("fusion", ["ffn", "prefix"])
def test_numbering_pictures_that_nobody_shares_changes_no_bit_of_the_loss(fusion: str, inputs) -> None:
    model = build_model(fusion=fusion, trained=True)
    numbered = model(**inputs, picture=torch.arange(3))
    assert torch.equal(numbered.loss_sum, model(**inputs).loss_sum)
    with pytest.raises(ValueError, match="2 pictures for 3 rows"):
        model(inputs["input_ids"], pixel_values=inputs["pixel_values"], picture=torch.tensor([0, 1]))
    assert model(**inputs, picture=torch.tensor([0, 1, 3])).loss_sum.isnan()


def test_prompts_may_be_given_as_embeddings(inputs) -> None:
    model = build_model(trained=True)
    seen = {"pixel_values": inputs["pixel_values"], "max_new_tokens": 5, "do_sample": False}
    wanted = model.generate(inputs["input_ids"], **seen)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(model.generate(inputs_embeds=embeds, **seen), wanted)
    assert torch.equal(model.generate(inputs=inputs["input_ids"], **seen), wanted)


@pytest.mark.parametrize("fusion", ["ffn", "prefix"])
def test_a_picture_that_overflows_stays_with_its_own_rows(fusion) -> None:
    model, batch = build_model(fusion=fusion, trained=True).eval(), rows(6, 6, 6)
    batch.pixel_values[1] = float("inf")
    inputs = batch.inputs() | {
        "picture": torch.tensor([0, 1, 0]),
        "has_image": torch.tensor([True, True, False]),
    }
    with torch.no_grad():
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    assert logits.isfinite().flatten(1).all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("fusion", ["ffn", "prefix"])
@pytest.mark.parametrize(
    "wrong", [{"picture": [0]}, {"picture": [0, 0, 0], "has_image": [True]}, {"has_image": [True]}]
)
def test_numbers_of_pictures_are_one_a_row(fusion, wrong) -> None:
    model, inputs = build_model(fusion=fusion), rows(6, 6, 6).inputs()
    with pytest.raises(ValueError, match="rows"):
        model(**inputs | {name: torch.tensor(value) for name, value in wrong.items()})


@pytest.mark.parametrize("fusion", FUSIONS)
def test_logits_are_kept_where_they_are_asked_for(fusion, monkeypatch) -> None:
    model, batch = build_model(fusion=fusion).eval(), rows(6, 6)
    inputs = {name: value for name, value in batch.inputs().items() if name != "labels"}
    whole = model(**inputs).logits
    forward = model.language_model.forward

    def without(
        input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None
    ):
        return forward(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)

    for step in range(2):
        # Not to the bit, which held on a Xeon and not on an EPYC.
        torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, whole[:, -2:])
        some = torch.tensor([1, 3])
        torch.testing.assert_close(model(**inputs, logits_to_keep=some).logits, whole[:, some])
        if step == 0:
            monkeypatch.setattr(model.language_model, "forward", without)


def test_prepared_memory_that_was_written_anew_is_read_anew() -> None:
    model, batch = build_model(trained=True).eval(), rows(6, 6)
    text = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        one, other = (
            model.prepare_memory(model.encode_images(pixels, None)[0])
            for pixels in (batch.pixel_values, batch.pixel_values.flip(0))
        )
        expected = model(**text, visual_memory=other.clone()).logits
        assert not torch.equal(model(**text, visual_memory=one).logits, expected)
        one.copy_(other)
        assert torch.equal(model(**text, visual_memory=one).logits, expected)
