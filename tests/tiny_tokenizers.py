"""Tokenizers of the kinds that decoders come with, made in a moment."""

from __future__ import annotations

import json
from pathlib import Path

from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = [
    "Caption of the picture: The dog runs. A child in a pink dress.",
    "Response: The answer is A. The answer is B. a b Question: Context: N/A Options: (A) (B) What is it?",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}

TOKENIZERS = (
    "byte_bpe",
    "byte_bpe_bos",
    "byte_bpe_appends_eos",
    "byte_bpe_bos_and_eos",
    "byte_bpe_prefix_space",
    "byte_bpe_without_bos",
    "wordpiece_cls_sep",
    "wordpiece_plain",
    "unigram_dummy_prefix",
    "unigram_no_prefix",
    "unigram_appends_eos",
    "llama",
    "llama_legacy",
    "llama_adds_eos",
)


def build_tokenizer(kind: str, directory: Path) -> PreTrainedTokenizerBase:
    """Builds one of ``TOKENIZERS``, saves it in a directory, and loads it from there."""
    directory.mkdir(parents=True, exist_ok=True)
    if kind.startswith("llama"):
        return _llama(directory, legacy=kind == "llama_legacy", add_eos=kind == "llama_adds_eos")
    family = {"byte": _byte_bpe, "wordpiece": _wordpiece, "unigram": _unigram}[kind.partition("_")[0]]
    tokenizer = family(kind)
    tokenizer.save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def _around(core: Tokenizer, template: str) -> None:
    ids = [(name, core.token_to_id(name)) for name in ("<s>", "</s>") if name in template]
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)


def _byte_bpe(kind: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind.endswith("prefix_space"))
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    templates = {"bos": "<s> $A", "appends_eos": "$A </s>", "bos_and_eos": "<s> $A </s>"}
    if template := templates.get(kind.removeprefix("byte_bpe_")):
        _around(core, template)
    names = NAMES if kind != "byte_bpe_without_bos" else {"eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def _wordpiece(kind: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    )
    if kind == "wordpiece_cls_sep":
        _around(core, "<s> $A </s>")
        return PreTrainedTokenizerFast(
            tokenizer_object=core, unk_token="<unk>", cls_token="<s>", sep_token="</s>", eos_token="</s>"
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, **NAMES, pad_token="<unk>")


def _unigram(kind: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.Unigram())
    scheme = "never" if kind == "unigram_no_prefix" else "always"
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    core.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
    )
    if kind == "unigram_appends_eos":
        _around(core, "$A </s>")
    return PreTrainedTokenizerFast(tokenizer_object=core, **NAMES)


def _llama(directory: Path, *, legacy: bool, add_eos: bool) -> PreTrainedTokenizerBase:
    """LLaMA's kind: a sentencepiece BPE with byte fallback, read from ``tokenizer.model`` as a 7B's is."""
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
        normalization_rule_name="identity",
    )
    config = NAMES | {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    config |= {"add_bos_token": True, "add_eos_token": add_eos}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(directory)
