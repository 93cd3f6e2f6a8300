"""Compiled layers: what is computed, what is kept for backward, and when they run as they did."""

from __future__ import annotations

import pytest
import torch
from tiny_models import LORA, build_model
from tiny_steps import rows
from torch._dynamo.utils import counters

from dehvf_ds.batch import Batch
from dehvf_ds.config import UserError
from dehvf_ds.model import DehvfForConditionalGeneration
from dehvf_ds.training.engine import compile_units

# torch's compiler looks at the gradient of whatever it is shown; outside of pytest it shows nothing of that.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

BATCHES = [
    rows(9, 5, 7, pictures=2),
    rows(6, 6, 6),  # without padding there is no mask
    rows(12, 4, shared=True),
]


@pytest.fixture(autouse=True)
def start_anew() -> None:
    torch.compiler.reset()
    counters.clear()


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def gradients(model: DehvfForConditionalGeneration, batch: Batch) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(**batch.with_facts().training_inputs()).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.trainable_parameters().values())]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fusion", "recomputed", "partitioned"),
    [("ffn", False, False), ("ffn", True, True), ("prefix", True, False), ("none", False, True)],
)
def test_compiled_layers_give_the_same_gradients(fusion: str, recomputed: bool, partitioned: bool) -> None:
    plain, compiled = (build_model(fusion=fusion, trained=True, lora=LORA).train() for _ in range(2))
    if recomputed:
        plain.recompute_layers()
        compiled.recompute_layers()
    compile_units(compiled, partitioned=partitioned, backend="aot_eager")
    for batch in BATCHES:
        expected, found = gradients(plain, batch), gradients(compiled, batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # Of the decoder with and without a mask, in the first layer too, where it ends early in parts, and of the
    # tower: not of every layer, nor of every length.
    assert 3 <= num_graphs() <= 24


def test_inductor_gives_the_same_gradients() -> None:
    plain, compiled = (build_model(trained=True, lora=LORA).train() for _ in range(2))
    compile_units(compiled)
    torch.testing.assert_close(gradients(compiled, BATCHES[0]), gradients(plain, BATCHES[0]))
    assert num_graphs() > 0


def test_in_evaluation_nothing_is_compiled() -> None:
    model = build_model(trained=True)
    compile_units(model, backend="aot_eager")
    model.eval()
    batch = BATCHES[0]
    model(**batch.with_facts().training_inputs())
    model.generate(batch.input_ids, batch.pixel_values, max_new_tokens=3, pad_token_id=0)
    assert num_graphs() == 0
    gradients(model.train(), batch)
    assert num_graphs() > 0


@pytest.mark.parametrize("partitioned", [False, True], ids=["whole", "partitioned"])
def test_a_graph_keeps_frozen_weights_themselves_for_backward(partitioned: bool) -> None:
    """A view would hold on to what ZeRO-3 has gathered, after the layer is done with it."""
    model = build_model(trained=True, lora=LORA).train()
    compile_units(model, partitioned=partitioned, backend="aot_eager")
    gradients(model, BATCHES[0])
    layers = model.language_model.get_decoder().layers
    weights = {p.data_ptr(): p for p in layers.parameters() if not p.requires_grad and p.ndim == 2}
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (weight := weights.get(tensor.untyped_storage().data_ptr())) is not None:
            kept.append(tensor is weight)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**BATCHES[0].with_facts().training_inputs())
    assert len(kept) >= len(layers)
    assert all(kept)


def test_without_a_compiler_it_says_what_to_set(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/no/compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = build_model(trained=True).train()
    compile_units(model)
    with pytest.raises(UserError, match=r"train\.compile: .*/no/compiler.*, set it to false"):
        gradients(model, BATCHES[0])
