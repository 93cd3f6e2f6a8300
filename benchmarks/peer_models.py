"""What benchmarks/peers.py compares: ours, LLaVA of transformers, and the code of MemVP and ADEM-VL."""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import init_empty_weights
from bench import LORA, REPOSITORY, run_config
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from dehvf_ds.batch import IGNORE_INDEX, Batch
from dehvf_ds.distributed import read_world
from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration
from dehvf_ds.model.ffn import fold_lora
from dehvf_ds.training import engine as engine_module
from dehvf_ds.training.deepspeed_json import read_deepspeed_json
from dehvf_ds.training.engine import parameter_groups
from dehvf_ds.training.step import train_step

PROMPT_TOKENS = 8
"""Of every row, without labels."""

PICTURE_PLACE = 3
"""LLaVA's token where a patch goes; random texts have ids from 10."""

IMAGE_PREFIX = [10, 11, 12]
"""Stands for "Image: ", which ADEM-VL puts before its class token."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Frozen weights that all variants share, the model of ours over them, and a step's rows."""

    language: PreTrainedModel
    tower: PreTrainedModel
    config: DehvfConfig
    batch: Batch
    is_part: bool
    """whether they have a few of a larger model's layers"""

    def twins(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Language model and tower as modules of their own over the same tensors."""
        twins = []
        for model in (self.language, self.tower):
            shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
            twins.append(copy.deepcopy(model, shared))
        return twins[0], twins[1]


class Variant:
    """A way to teach a language model to see, on ``batch``, which may be replaced."""

    model: nn.Module
    batch: Batch
    optimizer: torch.optim.Optimizer

    def start(self) -> None:
        """Makes optimizer and trainer."""
        self.optimizer = torch.optim.AdamW(parameter_groups(self.trainable(), 0.02), lr=1e-4)

    def trainable(self) -> dict[str, nn.Parameter]:
        """What trains."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def loss(self) -> Tensor:
        """The mean loss per supervised token."""
        raise NotImplementedError

    def train_step(self) -> None:
        """An optimizer step; here that of a plain torch loop."""
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.trainable().values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def end(self) -> None:
        """Ends training: adapters that can be folded are."""
        self.model.eval()

    def generate(self, new_tokens: int) -> object:
        """Answers the first row's prompt greedily, of a length that is fixed."""
        ids = self.batch.input_ids[:1, :PROMPT_TOKENS]
        given = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
        return self.answer(ids, self.batch.pixel_values[:1], given | {"pad_token_id": 0})

    def answer(self, ids: Tensor, pixels: Tensor, given: dict[str, Any]) -> object:
        """Calls ``generate`` of a transformers model."""
        raise NotImplementedError


class Ours(Variant):
    """This trainer's engine and step, and its model's ``generate``."""

    def __init__(self, shape: Shape, fusion: str) -> None:
        config = copy.deepcopy(shape.config)
        config.fusion = fusion
        self.batch = shape.batch
        self.model = DehvfForConditionalGeneration(config, *shape.twins()).train()

    def start(self) -> None:  # noqa: D102
        self.world = read_world()
        config = run_config(len(self.batch.input_ids))
        ds_config = read_deepspeed_json(str(REPOSITORY / "ds_configs/zero2.json"), config, self.world.size)
        ds_config["bf16"] = {"enabled": False}
        with patch.object(engine_module, "load_model", lambda *_, **__: self.model):
            self.engine, _ = engine_module.build_engine(config, self.model.config, ds_config, self.world)

    def loss(self) -> Tensor:  # noqa: D102
        return self.model(**self.batch.to("cpu").inputs()).loss

    def train_step(self) -> None:  # noqa: D102
        train_step(self.engine, [self.batch], self.world, torch.float32, seed=0, step=1)

    def end(self) -> None:  # noqa: D102
        super().end()
        fold_lora(self.model)

    def answer(self, ids: Tensor, pixels: Tensor, given: dict[str, Any]) -> object:  # noqa: D102
        return self.model.generate(ids, pixels, attention_mask=torch.ones_like(ids), **given)


class Llava(Variant):
    """LLaVA and PEFT's LoRA under transformers.Trainer, whose loop waits in a thread before each step."""

    def __init__(self, shape: Shape) -> None:
        self.batch = shape.batch
        self.model = build_llava(*shape.twins(), shape.config).train()
        self.config: LlavaConfig = self.model.base_model.model.config

    def start(self) -> None:  # noqa: D102
        given: dict[str, Any] = {"per_device_train_batch_size": 1, "max_steps": 10**6, "use_cpu": True}
        given |= {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
        # DeepSpeed's process group is not the Trainer's: alone it wraps the model in nothing.
        with patch.dict(os.environ, {"LOCAL_RANK": "-1"}):
            trainer = Trainer(
                self.model,
                TrainingArguments(tempfile.gettempdir(), remove_unused_columns=False, **given),
                data_collator=lambda rows: rows[0],
                train_dataset=_Rows(self),
                callbacks=[step_by_step := _StepByStep()],
            )
        assert trainer.args.distributed_state.distributed_type == "NO"
        self.step_by_step = step_by_step
        threading.Thread(target=trainer.train, daemon=True).start()
        step_by_step.done.acquire()

    def loss_with(self, projector: Any) -> Tensor:
        """The loss with our projector's values, on features that are normed as ours are."""
        own = [m for m in self.model.modules() if isinstance(m, LlavaMultiModalProjector)]
        normed = lambda _, given: (layer_norm(given[0], given[0].shape[-1:]),)  # noqa: E731
        with ExitStack() as stack:
            for module in own:
                stack.callback(module.register_forward_pre_hook(normed).remove)
                for layer, name in ((module.linear_1, "in"), (module.linear_2, "out")):
                    layer.weight.copy_(getattr(projector, f"w_{name}").T)
                    layer.bias.copy_(getattr(projector, f"b_{name}"))
            return self.loss()

    def loss(self) -> Tensor:  # noqa: D102
        return self.model(**llava_inputs(self.batch, self.config)).loss

    def train_step(self) -> None:  # noqa: D102
        self.step_by_step.go.release()
        self.step_by_step.done.acquire()

    def end(self) -> None:  # noqa: D102
        self.model = self.model.merge_and_unload().eval()

    def answer(self, ids: Tensor, pixels: Tensor, given: dict[str, Any]) -> object:  # noqa: D102
        places = torch.full((1, self.config.image_seq_length), self.config.image_token_id)
        ids = torch.cat([places, ids], dim=1)
        mask = torch.ones_like(ids)
        return self.model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **given)


class _StepByStep(TrainerCallback):
    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done.release()  # of the step before, once the Trainer has done all that belongs to it
        self.go.acquire()


class _Rows(torch.utils.data.IterableDataset):
    def __init__(self, variant: Llava) -> None:
        self.variant = variant

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield llava_inputs(self.variant.batch, self.variant.config)


def llava_inputs(batch: Batch, config: LlavaConfig) -> dict[str, Tensor]:
    """Token ids, mask and labels with the picture's places before the text, and the pictures."""
    places = (len(batch.input_ids), config.image_seq_length)
    joined = {}
    for name, value in ("input_ids", config.image_token_id), ("attention_mask", 1), ("labels", IGNORE_INDEX):
        text = getattr(batch, name)
        joined[name] = torch.cat([text.new_full(places, value), text], dim=1)
    return joined | {"pixel_values": batch.pixel_values}


def build_llava(language: PreTrainedModel, tower: PreTrainedModel, config: DehvfConfig) -> nn.Module:
    """LLaVA over these modules: a new projector beside LoRA of the same targets and rank."""
    # Copies: a configuration takes the choice of attention away from those put into it.
    vision_config, text_config = copy.deepcopy((config.vision_config, config.text_config))
    llava_config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=PICTURE_PLACE,
        image_seq_length=config.patches_per_side**2,
    )
    with init_empty_weights(include_buffers=False):
        model = LlavaForConditionalGeneration(llava_config)
    model.lm_head, inner = language.lm_head, model.model
    inner.language_model, inner.vision_tower = language.model, tower
    inner.multi_modal_projector = LlavaMultiModalProjector(llava_config).to(language.device, language.dtype)
    lora = LoraConfig(
        r=LORA["rank"],
        lora_alpha=LORA["alpha"],
        lora_dropout=LORA["dropout"],
        target_modules=LORA["targets"],
        modules_to_save=["multi_modal_projector"],
    )
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


class Published(Variant):
    """MemVP's or ADEM-VL's code out of its checkout, in one process on the CPU in fp32."""

    def __init__(self, shape: Shape, package: str, checkout: Path) -> None:
        self.batch, self.package = shape.batch, package
        self.model = build_published(shape, package, checkout)
        self.model.load_state_dict(llama_tensors(shape.language), strict=False, assign=True)
        text = shape.language.config
        self.model.freqs_cis = sys.modules[f"{package}.model"].precompute_freqs_cis(
            text.hidden_size // text.num_attention_heads, 1024, text.rope_parameters["rope_theta"]
        )
        for name, parameter in list(self.model.named_parameters()):
            if parameter.is_meta:
                owner, _, attribute = name.rpartition(".")
                new = nn.Parameter(_start_value(name, parameter), requires_grad=parameter.requires_grad)
                setattr(self.model.get_submodule(owner), attribute, new)
        self.model.train()

    def loss(self, pictures: int = 1) -> Tensor:  # noqa: D102
        batch, shown = self.batch, [pictures] * len(self.batch.input_ids)
        # Padded, as their loaders do: without it ADEM-VL's prefix would push the last tokens out.
        ids, labels = pad(batch.input_ids, (0, 8)), pad(batch.labels.clamp(min=0), (0, 8))
        given: dict[str, Any] = {"prefix_img": torch.tensor(IMAGE_PREFIX)}
        given |= {"prefix_nonimg": torch.tensor(IMAGE_PREFIX), "images": batch.pixel_values}
        if self.package == "memvp":
            given |= {"img_indicators": shown}
        else:
            given |= {"indicators": shown, "example_mask": pad(batch.attention_mask.float(), (0, 8))}
        with _on_the_cpu():
            return self.model(ids, labels, **given)

    def generate(self, new_tokens: int) -> object:  # noqa: D102
        tokenizer = types.SimpleNamespace(eos_id=-1, decode=list)
        tokenizer.encode = lambda text, bos, eos: [1, *IMAGE_PREFIX] if text == "Image: " else list(text)
        for layer in self.model.layers:
            attention = layer.attention
            cache = torch.zeros(1, 512, attention.n_local_heads, attention.head_dim)
            attention.cache_k, attention.cache_v = cache, cache.clone()
        prompt = self.batch.input_ids[0, :PROMPT_TOKENS].tolist()
        with _on_the_cpu():
            return self.model.generate([prompt], self.batch.pixel_values[:1], [1], new_tokens, tokenizer)


def build_published(shape: Shape, package: str, checkout: Path) -> nn.Module:
    """Their ``create_model``, weights on the meta device; ``clip.load`` gives a CLIP of the tower's shape."""
    config, text, vision = shape.config, shape.config.text_config, shape.config.vision_config
    width = vision.hidden_size
    # What an earlier build of these or of the other checkout imported.
    for name in [name for name in sys.modules if name.partition(".")[0] in ("clip", package)]:
        del sys.modules[name]
    sys.modules["clip"] = clip = types.ModuleType("clip")
    clip.__path__ = [str(checkout / "clip")]
    sys.path.insert(0, str(checkout))
    with patch("torch.cuda.amp.autocast", nullcontext):
        build = importlib.import_module(f"{package}.build")
        tower = importlib.import_module("clip.model").CLIP
    model, adapter = (sys.modules[f"{package}.{name}"] for name in ("model", "adapter"))
    # They skip the last one, a small part of a whole tower.
    blocks = vision.num_hidden_layers + shape.is_part
    sizes = (config.image_size, blocks, width, config.patch_size)
    clip.load = lambda *_, **__: (tower(width, *sizes, 1, 1, 64, 1, 1), None)
    # Both write the width of CLIP-L as a number.
    own, projector = adapter.Adapter, model.Projector
    adapters = lambda size, hidden_dim, **more: own(width if hidden_dim else size, hidden_dim, **more)  # noqa: E731
    params = {
        "dim": text.hidden_size,
        "n_layers": text.num_hidden_layers,
        "n_heads": text.num_attention_heads,
        "norm_eps": text.rms_norm_eps,
        "multiple_of": text.intermediate_size,
    }
    checkpoint = ({}, types.SimpleNamespace(n_words=text.vocab_size), params)
    # As their scripts for ScienceQA have them.
    args = {
        "adapter_dim": 12,
        "hidden_proj": 128,
        "max_seq_len": 512,
        "emb": 400 if text.hidden_size == 5120 else 320,
    }
    args |= {
        "adapter_scale": 0.1,
        "alpha": 0.1,
        "beta": 0.01,
        "drop_ratio": 0.1,
        "down_sample_num": [256, 64],
    }
    args |= {"gradient_checkpointing": False, "cpu_load": True, "is_train": True, "no_cls": False}
    args |= dict.fromkeys(("llama_model_path", "llm_model", "clip", "clip_root"), "")
    with ExitStack() as stack:
        for change in (
            patch.object(build, "_load_and_redistribute_checkpoint", lambda *_: checkpoint),
            patch.object(adapter, "Adapter", adapters),
            patch.object(model, "Projector", lambda _, *more: projector(width, *more)),
            patch("torch.set_default_tensor_type"),
            patch("builtins.print"),
            init_empty_weights(include_buffers=False),
        ):
            stack.enter_context(change)
        return build.create_model(argparse.Namespace(**args))


def llama_tensors(language: PreTrainedModel) -> dict[str, Tensor]:
    """A Llama's weights as Meta's code names and lays them out; heads that share keys get copies of them."""
    config, found = language.config, {}
    groups = config.num_attention_heads // config.num_key_value_heads

    def repeated(weight: Tensor) -> Tensor:
        heads = weight.unflatten(0, (config.num_key_value_heads, -1))
        return weight if groups == 1 else heads.repeat_interleave(groups, dim=0).flatten(0, 1)

    def interleaved(weight: Tensor) -> Tensor:
        halves = weight.unflatten(0, (config.num_attention_heads, 2, -1))
        return halves.transpose(1, 2).flatten(0, 2)

    for number, layer in enumerate(language.model.layers):
        attention, ffn = layer.self_attn, layer.mlp
        found |= {
            f"layers.{number}.{name}.weight": weight
            for name, weight in {
                "attention.wq": interleaved(attention.q_proj.weight),
                "attention.wk": interleaved(repeated(attention.k_proj.weight)),
                "attention.wv": repeated(attention.v_proj.weight),
                "attention.wo": attention.o_proj.weight,
                "feed_forward.w1": ffn.gate_proj.weight,
                "feed_forward.w2": ffn.down_proj.weight,
                "feed_forward.w3": ffn.up_proj.weight,
                "attention_norm": layer.input_layernorm.weight,
                "ffn_norm": layer.post_attention_layernorm.weight,
            }.items()
        }
    found["tok_embeddings.weight"] = language.model.embed_tokens.weight
    found |= {"norm.weight": language.model.norm.weight, "output.weight": language.lm_head.weight}
    return {name: tensor.detach() for name, tensor in found.items()}


def _start_value(name: str, parameter: nn.Parameter) -> Tensor:
    """Zero where their code starts at zero, one in norms, random elsewhere."""
    if name.endswith(("bias", "adapter_emb2", "adapter_mlp.fc2.weight")):
        return torch.zeros(parameter.shape)
    return torch.randn(parameter.shape) * 0.02 if parameter.ndim >= 2 else torch.ones(parameter.shape)


@contextmanager
def _on_the_cpu() -> Iterator[None]:
    """Their code asks for a GPU and fp16 by name."""
    with (
        patch.object(Tensor, "half", Tensor.float),
        patch.object(Tensor, "cuda", lambda tensor: tensor),
        patch.object(nn.Module, "cuda", lambda module: module),
    ):
        yield
