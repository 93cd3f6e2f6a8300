"""Writes a trained model as a Hugging Face directory, tensor by tensor, so that any size needs little memory.

The decoder's weights are read from its own files, and the FFN adapters added in fp32. Only what is small, the
visual branch and the tower, is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from dehvf_ds import __version__
from dehvf_ds.config import UserError
from dehvf_ds.data.collate import build_image_transform, load_tokenizer
from dehvf_ds.data.prompts import CAPTION_PROMPT, PLAIN_CHAT_TEMPLATE
from dehvf_ds.evaluation.decode import MAX_NEW_TOKENS, end_ids
from dehvf_ds.model import DehvfForConditionalGeneration, DehvfProcessor, ModelError
from dehvf_ds.model.adapter import EXPORT_FILE, LORA_FILE, TrainedModel, decoder_name, load_adapter, peft_name
from dehvf_ds.model.backbones import load_backbone, names_in_files, settle_head
from dehvf_ds.model.ffn import decoder_layers, folded_weight
from dehvf_ds.model.fingerprint import StoredFile, bare_name, stored_tensors
from dehvf_ds.model.processing import bos_ids

_DTYPE_NAMES = {dtype: name for name, dtype in str_to_torch_dtype.items()}

# Clients send messages as texts or as lists of text and image parts; decoders' templates expect texts.
_MESSAGES_AS_TEXT = (
    "{%- set texts = namespace(of=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message.content is string -%}{%- set text = message.content -%}"
    "{%- else -%}{%- set text = message.content | selectattr('type', 'equalto', 'text')"
    " | map(attribute='text') | join(' ') -%}{%- endif -%}"
    "{%- set texts.of = texts.of + [{'role': message.role, 'content': text}] -%}"
    "{%- endfor -%}"
    "{%- set messages = texts.of -%}"
)
_PROMPT_ALONE = "{{ (messages | map(attribute='content') | join('\n')).rstrip() }}"


class TensorSpec(NamedTuple):
    """One tensor of the export: ``like`` it on the meta device, ``read`` when it is about to be written."""

    name: str
    like: Tensor
    read: Callable[[], Tensor]


class DecoderFiles:
    """The frozen decoder's own files, one open at a time."""

    def __init__(self, source: str, decoder: PreTrainedModel) -> None:
        self.source = source
        self._tensors = stored_tensors(source)
        self._aliases = names_in_files(decoder, self._tensors)
        self._open: StoredFile | None = None
        sizes: Counter[torch.dtype] = Counter()
        for stored in self._tensors.values():
            sizes[stored.dtype] += stored.num_elements
        self.dtype = sizes.most_common(1)[0][0]
        """of most values"""

    def find(self, names: Sequence[str], shape: torch.Size) -> str:
        """A tensor's name in the files; it has several ``names`` in the decoder if it is tied."""
        options = ({name} & self._tensors.keys() or self._aliases.get(bare_name(name)) for name in names)
        found = next(filter(None, options), set())
        stored = self._tensors[min(found)] if len(found) == 1 else None
        if stored is None or stored.shape != shape or stored.is_quantised:
            raise ModelError(f"{self.source}: no unquantised {names[0]} of shape {list(shape)} in the files")
        return min(found)

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        path = self._tensors[name].path
        if self._open is None or self._open.path != path:
            self._open = StoredFile(path)
        return self._open.read(name)


class MergedModel:
    """A trained model in the form of the export; its decoder's weights are still on the disk.

    Branch and tower of ``model`` are loaded; the decoder is on the meta device, unless it is a mixture of
    experts. With ``fold`` the FFN adapters are added to the weights; without it what was trained stays in
    fp32. ``dtype`` is by default that of the decoder's files.
    """

    def __init__(self, trained: TrainedModel, *, dtype: torch.dtype | None, fold: bool) -> None:
        if trained.language_model is None or trained.vision_tower is None:
            raise ModelError(f"{trained.path} is merged already")
        config = copy.deepcopy(trained.config)
        settle_head(config, trained.language_model)
        with torch.device("meta"):
            decoder = AutoModelForCausalLM.from_config(config.text_config)
        self.files = DecoderFiles(trained.language_model, decoder)
        self.dtype, self.fold = dtype or self.files.dtype, fold
        tower = None
        if config.fusion != "none":
            tower = load_backbone(trained.vision_tower, config.vision_config, self.dtype, vision=True)
        if any(hasattr(layer.mlp, "experts") for layer in decoder_layers(decoder)):
            # transformers stacks the weights that the files hold for each expert.
            decoder = load_backbone(trained.language_model, config.text_config, self.dtype, vision=False)
        self.model = DehvfForConditionalGeneration(config, decoder, tower)
        load_adapter(self.model, trained.path)
        self._lora = {} if config.lora is None else load_file(trained.path / LORA_FILE)
        self._scaling = 0.0 if config.lora is None else config.lora["alpha"] / config.lora["rank"]
        if fold:
            config.lora = None
            for parameter in self.model.trainable_parameters().values():
                parameter.data = parameter.data.to(self.dtype)
        for part in (config, config.text_config, config.vision_config):
            part.dtype = self.dtype

    def decoder_tensors(self) -> list[TensorSpec]:
        """The decoder's tensors with adapters added or beside them, in the model's order; tied ones once."""
        tied: dict[Tensor, list[str]] = {}
        state = self.model.language_model.state_dict(prefix="language_model.", keep_vars=True)
        for name, tensor in state.items():
            if tensor.is_meta:
                tied.setdefault(tensor, []).append(name)
        specs, unused = [], {name.rpartition(".lora_")[0] for name in self._lora}
        for tensor, (name, *others) in tied.items():
            if ".lora_" in name:
                if not self.fold:
                    lora = self._lora[peft_name(name)]
                    specs.append(TensorSpec(name, lora.to("meta"), lora.detach))
                continue
            own = decoder_name(name)
            stored_name = self.files.find([own, *map(decoder_name, others)], tensor.shape)
            shown = name.replace(".base_layer.", ".") if self.fold else name
            read = partial(self._decoder_weight, own, stored_name)
            specs.append(TensorSpec(shown, tensor.detach().to(self.dtype), read))
            unused.discard(_adapter_of(own))
        if unused:
            raise ModelError(f"the adapter {min(unused)} belongs to no weight of {self.files.source}")
        return specs

    def _decoder_weight(self, own_name: str, stored_name: str) -> Tensor:
        weight = self.files.read(stored_name)
        lora_a, lora_b = (self._lora.get(f"{_adapter_of(own_name)}.lora_{side}.weight") for side in "AB")
        if self.fold and lora_a is not None and lora_b is not None and own_name.endswith(".weight"):
            weight = folded_weight(weight, lora_a, lora_b, self._scaling)
        return weight.to(self.dtype)


def write_shards(directory: Path, tensors: Sequence[TensorSpec], max_shard_size: str) -> dict[str, Any]:
    """Writes safetensors files in ``save_pretrained``'s layout, one tensor in memory at a time.

    Returns each file's ``bytes`` and ``sha256``.
    """
    plan = split_torch_state_dict_into_shards(
        {spec.name: spec.like for spec in tensors},
        filename_pattern=SAFE_WEIGHTS_NAME.replace(".", "{suffix}."),
        max_shard_size=max_shard_size,
    )
    by_name = {spec.name: spec for spec in tensors}
    written = {
        file: _write_shard(directory / file, [by_name[name] for name in names])
        for file, names in plan.filename_to_tensors.items()
    }
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return written


def _write_shard(path: Path, tensors: Sequence[TensorSpec]) -> dict[str, Any]:
    """One safetensors file: the header's length, the header in JSON, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, like, _ in tensors:
        start, end = end, end + like.nbytes
        dtype = _DTYPE_NAMES[like.dtype]
        header[name] = {"dtype": dtype, "shape": list(like.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in itertools.chain((len(text).to_bytes(8, "little"), text), map(_checked_bytes, tensors)):
            file.write(data)
            digest.update(data)
    return {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}


def _checked_bytes(spec: TensorSpec) -> Any:
    tensor = spec.read()
    if tensor.numel() == 0 or (tensor.shape, tensor.dtype) != (spec.like.shape, spec.like.dtype):
        raise ModelError(f"{spec.name}: empty, or of another shape or dtype than its header says")
    # The sum is rarely infinite unless a value is: one pass, without a mask as large as the tensor.
    if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
        why = "; fp16 ends at 65504: pass --dtype bf16" if tensor.dtype == torch.float16 else ""
        raise ModelError(f"{spec.name}: holds values that are not finite{why}")
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def write_model(directory: Path, trained: TrainedModel, merged: MergedModel, max_shard_size: str) -> None:
    """Writes weights, code, configurations, processor and tokenizer into an empty directory.

    ``config.json``, without which nothing loads it, is written near the end.
    """
    tokenizer = load_tokenizer(trained.tokenizer_source)
    transform = build_image_transform(trained.processor_source, trained.config.image_size)
    model: Any = merged.model
    tensors = merged.decoder_tensors()
    branch_and_tower = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    # Branch and tower are written twice.
    needed = sum(spec.like.nbytes for spec in tensors) + 2 * sum(t.nbytes for t in branch_and_tower.values())
    if needed > (free := shutil.disk_usage(directory).free):
        raise UserError(f"--output needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")

    model.generation_config = _generation_config(trained, tokenizer)
    # transformers names the tower's tensors as hubs do, and writes configurations and code.
    model.save_pretrained(directory, state_dict=branch_and_tower, max_shard_size="1TB")
    config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    (directory / CONFIG_NAME).unlink()
    # transformers takes the dtype of the decoder, which is not loaded.
    config["dtype"] = str(merged.dtype).removeprefix("torch.")
    with _saved_tensors(directory) as rest:
        files = write_shards(directory, [*tensors, *rest], max_shard_size)

    template = chat_template(tokenizer, trained.task)
    tokenizer.chat_template = None  # both would be written to one file
    processor = DehvfProcessor(
        transform.processor, tokenizer, chat_template=template, written_prompts=trained.task == "chat"
    )
    processor.save_pretrained(directory)
    check_processor(processor, directory, trained.config.prompt)
    (directory / CONFIG_NAME).write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    adapters = "folded" if merged.fold else "apart"
    record = {
        "format": 1,
        "dehvf_ds": __version__,
        "adapters": adapters,
        "task": trained.task,
        "files": files,
    }
    (directory / EXPORT_FILE).write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")


@contextlib.contextmanager
def _saved_tensors(directory: Path) -> Iterator[list[TensorSpec]]:
    """The tensors that ``save_pretrained`` wrote; removes their file afterwards."""
    path = directory / SAFE_WEIGHTS_NAME
    if not path.exists():
        yield []
        return
    path = path.rename(directory / ".small.safetensors")
    file = StoredFile(path)
    yield [
        TensorSpec(
            name, torch.empty(stored.shape, dtype=stored.dtype, device="meta"), partial(file.read, name)
        )
        for name, stored in file.tensors.items()
    ]
    path.unlink()


def check_processor(processor: DehvfProcessor, directory: Path, prompt: str | None) -> None:
    """Refuses a processor that makes other ids or pixels once it is saved and loaded again."""
    loaded = DehvfProcessor.from_pretrained(directory)
    eos = processor.tokenizer.eos_token
    for text in (prompt or CAPTION_PROMPT, "", "What is it?\n", f"Options: (A) a (B) b {eos} Response:", eos):
        ids, found = (each(text=text)["input_ids"].tolist() for each in (processor, loaded))
        if ids != found:
            raise UserError(
                f"not exported: the tokenizer, saved and loaded again, makes other ids of {text!r}: "
                f"{found[0][:8]}, not {ids[0][:8]}"
            )
    for size in ((40, 30), (30, 400)):
        picture = Image.radial_gradient("L").resize(size).convert("RGBA")
        pixels, found = (each(images=picture)["pixel_values"] for each in (processor, loaded))
        if not torch.equal(pixels, found):
            raise UserError("not exported: the image processor, saved and loaded again, makes other pixels")


def _generation_config(trained: TrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Greedy, as in evaluation; ends at the tokenizer's end of text and at the decoder's own ends."""
    own = None
    with contextlib.suppress(OSError):
        own = GenerationConfig.from_pretrained(trained.tokenizer_source)
    ends = end_ids(tokenizer, own)
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS[trained.task or "caption"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
    )


def chat_template(tokenizer: PreTrainedTokenizerBase, task: str | None) -> str:
    """The Jinja template that writes conversations as in training, with the begin-of-text token.

    Only task ``chat`` knows the form of conversations; for the others the messages' texts are the prompt.
    """
    bos = "{{ bos_token }}" if bos_ids(tokenizer) else ""
    if task != "chat":
        return _MESSAGES_AS_TEXT + bos + _PROMPT_ALONE
    own: Any = tokenizer.get_chat_template() if tokenizer.chat_template else None
    return _MESSAGES_AS_TEXT + (own or bos + PLAIN_CHAT_TEMPLATE)


def _adapter_of(own_name: str) -> str:
    return peft_name(f"language_model.{own_name.rpartition('.')[0]}")
