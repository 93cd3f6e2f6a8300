"""Forward, loss, gradients and decoding in half precision on a device, against fp32 on the CPU.

fp16 is computed with, as an exported model may be; runs do not train in it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import build_model
from torch import Tensor

from dehvf_ds.model import DehvfForConditionalGeneration

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Relative, by norm; eight bits of mantissa in bf16, eleven in fp16, through four layers.
LOGITS = {"bf16": 6e-2, "fp16": 1e-2}
LOSS = {"bf16": 5e-3, "fp16": 1e-3}
# Nats a token. Logits that are 3 % off turn near ties around: 0.52 was measured on an H200, while a token
# that has nothing to do with the model lies some 4 below.
REGRET = {"bf16": 1.0, "fp16": 0.1}
GRADIENT = {"bf16": 0.2, "fp16": 3e-2}
NEW_TOKENS = 8
BACKBONES = {"llama-clip": ("llama", "clip"), "qwen3-siglip": ("qwen3", "siglip")}


@pytest.fixture(params=BACKBONES)
def backbones(request: pytest.FixtureRequest, device: str) -> tuple[str, str]:
    if (device, request.param) == ("cpu", "qwen3-siglip"):
        pytest.skip("rehearsed with llama-clip")
    return BACKBONES[request.param]


@pytest.fixture(params=["ffn", "prefix", "none"])
def fusion(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DTYPES)
def precision(request: pytest.FixtureRequest, device: str) -> str:
    if (device, request.param) == ("cpu", "fp16"):
        pytest.skip("rehearsed with bf16")
    return request.param


@pytest.fixture
def reference(backbones: tuple[str, str], fusion: str) -> DehvfForConditionalGeneration:
    return exaggerated(backbones, fusion, seed=2)


def exaggerated(backbones: tuple[str, str], fusion: str, *, seed: int) -> DehvfForConditionalGeneration:
    """In fp32 on the CPU; every weight large enough that answers differ and the branch acts."""
    model = build_model(*backbones, fusion=fusion, trained=True)
    generator = torch.Generator().manual_seed(seed)
    trained = model.trainable_parameters()
    for name, parameter in model.named_parameters():
        if name not in trained and parameter.ndim >= 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return model


def on_device(
    model: DehvfForConditionalGeneration, device: str, precision: str
) -> DehvfForConditionalGeneration:
    """A copy with its parameters in half precision; buffers stay in fp32, as loading leaves them."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[precision])
    return model.to(device)


def moved(inputs: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found.float().cpu() - expected).norm() / expected.norm()).item()


def test_forward(device, precision, reference, inputs, fact) -> None:
    given = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        expected = reference(**given).logits
        found = on_device(reference, device, precision)(**moved(given, device)).logits
    assert (found.device.type, found.dtype) == (device, DTYPES[precision])
    # Padding and, before the text, the prefix of rows without a picture attend to nothing.
    real = inputs["attention_mask"].bool()
    num_tokens = real.shape[1]
    found, expected = found[:, -num_tokens:].cpu()[real], expected[:, -num_tokens:][real]
    fact(f"logits {distance(found, expected):.1e} off")
    assert distance(found, expected) < LOGITS[precision]


def test_loss_and_gradients(device, precision, backbones, fusion, inputs, fact) -> None:
    """Of the middle one of five models: gradients of some magnify whatever was rounded a hundredfold."""
    off = [loss_and_gradients(device, precision, backbones, fusion, inputs, seed) for seed in range(5)]
    loss, gradient = (sorted(column)[2] for column in zip(*off, strict=True))
    fact(f"loss {loss:.1e} off, gradient {gradient:.1e} off (at most {max(g for _, g in off):.1e})")
    assert loss < LOSS[precision]
    assert gradient < GRADIENT[precision]


def loss_and_gradients(device, precision, backbones, fusion, inputs, seed: int) -> tuple[float, float]:
    """How far a model's are from those of fp32, relative, the weights being the same to the bit."""
    reference = exaggerated(backbones, fusion, seed=seed)
    model = on_device(reference, device, precision)
    for parameter in reference.parameters():
        parameter.data = parameter.data.to(DTYPES[precision]).float()
    losses = []
    for one, given in ((reference, inputs), (model, moved(inputs, device))):
        one.train()
        output = one(**given)
        output.loss.backward()
        losses.append(output.loss.item())
        assert output.loss_sum.dtype == torch.float32
    wanted, got = reference.trainable_parameters(), model.trainable_parameters()
    expected = torch.cat([p.grad.flatten() for p in wanted.values()])  # pyright: ignore
    found = torch.cat([got[name].grad.flatten() for name in wanted])  # pyright: ignore
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in got)
    return abs(losses[1] / losses[0] - 1), distance(found, expected)


def test_activation_checkpointing_changes_no_gradient(device, reference, inputs) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = on_device(reference, device, "bf16").train()
        if checkpointing:
            model.recompute_layers()
        model(**moved(inputs, device)).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.trainable_parameters().values()]))  # pyright: ignore
    assert distance(gradients[1], gradients[0].float().cpu()) < 1e-2


def prompts(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of 10, 7 and 4 tokens padded on the left; the second without a picture."""
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :3] = 0
    mask[2, :6] = 0
    given = {name: inputs[name] for name in ("input_ids", "pixel_values", "has_image")}
    return given | {"attention_mask": mask}


def log_probabilities(model, given: dict[str, Tensor], new_ids: Tensor) -> Tensor:
    """Of every token at each generated position, ``[rows, new, vocab]``, the generated ones given."""
    mask = torch.cat([given["attention_mask"], torch.ones_like(new_ids)], dim=1)
    ids = torch.cat([given["input_ids"], new_ids], dim=1)
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=given["pixel_values"],
            has_image=given["has_image"],
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        ).logits
    return logits[:, -new_ids.shape[1] - 1 : -1].float().log_softmax(dim=-1)


def generate(model, given: dict[str, Tensor], **settings: Any) -> Tensor:
    """Exactly ``NEW_TOKENS`` new ids a row, on the CPU."""
    device, dtype = model.device, model.dtype
    given = moved(given, device) | {"pixel_values": given["pixel_values"].to(device, dtype)}
    fixed = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    ids = given.pop("input_ids")
    return model.generate(ids, **given, **fixed, pad_token_id=0, **settings).cpu()


def test_greedy_takes_what_fp32_finds_likeliest(device, precision, reference, inputs, fact) -> None:
    given = prompts(inputs)
    new_ids = generate(on_device(reference, device, precision), given)
    assert new_ids.shape == (3, NEW_TOKENS)
    likely = log_probabilities(reference, given, new_ids)
    likely[..., 2] = -torch.inf  # no end within min_new_tokens
    regret = likely.amax(dim=-1) - likely.gather(2, new_ids[..., None])[..., 0]
    fact(f"at most {regret.max():.1e} nats below the likeliest token")
    assert regret.max() < REGRET[precision]
    # The rows do not all say the same: a comparison of constants would hold anything.
    assert len({tuple(row) for row in new_ids.tolist()}) == 3


def test_beams_find_texts_as_likely_as_in_fp32(device, precision, reference, inputs, fact) -> None:
    given = prompts(inputs)

    def likelihoods(new_ids: Tensor) -> Tensor:
        likely = log_probabilities(reference, given, new_ids)
        return likely.gather(2, new_ids[..., None])[..., 0].sum(dim=1)

    found = likelihoods(generate(on_device(reference, device, precision), given, num_beams=3))
    expected = likelihoods(generate(reference, given, num_beams=3))
    fact(f"{(expected - found).max():.1e} nats below the text of fp32, at most")
    # Near ties send beams other ways; a text that has nothing to do with the model lies some 30 nats below.
    assert (expected - found).max() < 2.0


def test_a_batch_padded_on_the_left_says_what_its_rows_say_alone(device, reference, inputs) -> None:
    given = prompts(inputs)
    model = on_device(reference, device, "bf16")
    together = generate(model, given)
    for row in range(3):
        start = int((given["attention_mask"][row] == 0).sum())
        alone = {name: value[row : row + 1] for name, value in given.items()}
        alone |= {name: alone[name][:, start:] for name in ("input_ids", "attention_mask")}
        likely = log_probabilities(reference, alone, together[row : row + 1])[0]
        likely[..., 2] = -torch.inf
        regret = likely.amax(dim=-1) - likely.gather(1, together[row][:, None])[:, 0]
        assert regret.max() < REGRET["bf16"]


def test_questions_are_decoded_by_the_evaluators_own_road(device, reference, fusion, inputs) -> None:
    from tiny_models import byte_tokenizer

    from dehvf_ds.batch import Batch
    from dehvf_ds.evaluation.decode import Decoding, decode, likeliest_options, summed_loss

    model = on_device(reference, device, "bf16")
    batch = Batch(**(inputs | prompts(inputs)))
    first, *others = decode(model, batch, byte_tokenizer(), Decoding(max_new_tokens=4))
    assert len(others) == 2
    assert 0 < first.num_tokens <= 4
    option, *_ = likeliest_options(model, batch, [5, 6, 7], [3, 3, 3])
    assert option in (0, 1, 2)
    loss_sum, num_tokens = summed_loss(model, batch)
    assert num_tokens == batch.num_supervised()
    assert 0 < loss_sum / num_tokens < 20
