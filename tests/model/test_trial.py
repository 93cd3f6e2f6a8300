"""One function from hidden states to logits, whatever a decoder does between its layers and its logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import LORA, vision_config
from transformers import AutoConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dehvf_ds.batch import IGNORE_INDEX
from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration, ModelError
from dehvf_ds.model.trial import scaled_down, try_backbones

# Constants as they are published for these decoders, or farther from 1.
DECODERS = {
    "llama": {},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "cohere": {"logit_scale": 0.0625},
    "gemma2": {"final_logit_softcapping": 30.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "nanochat": {"final_logit_softcapping": 15.0},
    "hyperclovax": {"logits_scaling": 0.1},
    "minicpm3": {"scale_emb": 12, "dim_model_base": 8},
    "phi": {},  # its head has a bias
    "gpt_neox": {},
    "qwen3": {},
}
# Their FFNs have no map of the adapters' name.
PLAIN = ("phi", "gpt_neox", "nanochat", "mixtral", "qwen2_moe")


def config_of(kind: str, fusion: str = "ffn", lora=LORA, **settings) -> DehvfConfig:
    text = AutoConfig.for_model(kind, vocab_size=64, **(DECODERS.get(kind, {}) | settings))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, 1)
    return DehvfConfig(
        text_config=scaled_down(text, num_layers=2),
        vision_config=vision_config(),
        fusion=fusion,
        rank=8,
        router_dim=4,
        lora=None if kind in PLAIN and lora is LORA else lora,
    )


def build(kind: str, fusion: str = "ffn", **settings) -> DehvfForConditionalGeneration:
    """A model that has left its start, with logits as large as trained ones are."""
    torch.manual_seed(0)
    model = DehvfForConditionalGeneration(config_of(kind, fusion, **settings)).eval()
    for parameter in model.trainable_parameters().values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for parameter in model.get_output_embeddings().parameters():
        parameter.data *= 40
    return model


FUSIONS = [(kind, "ffn") for kind in DECODERS]
FUSIONS += [(kind, fusion) for kind in ("llama", "granite", "gemma2") for fusion in ("prefix", "none")]


@pytest.mark.parametrize(("kind", "fusion"), FUSIONS)
def test_the_loss_is_of_the_logits_that_generation_takes(kind: str, fusion: str, inputs) -> None:
    model = build(kind, fusion)
    labels = inputs.pop("labels")
    output = model(**inputs, labels=labels)
    logits = model(**inputs).logits[:, -labels.shape[1] :]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-5, atol=1e-4)
    assert output.num_supervised == (labels[:, 1:] != IGNORE_INDEX).sum()
    torch.testing.assert_close(output.loss, expected / output.num_supervised, rtol=1e-5, atol=1e-4)
    # What the next token is drawn by, too.
    settings = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    generated = model.generate(inputs["input_ids"][:1], inputs["pixel_values"][:1], **settings)
    torch.testing.assert_close(generated.logits[0], logits[:1, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [*DECODERS, "mixtral", "qwen2_moe", "mistral"])
def test_such_decoders_pass_the_trial(kind: str) -> None:
    config = config_of(kind)
    # As checkpoints of today say; the branch is tried in fp32.
    config.text_config.dtype = torch.bfloat16
    before = torch.get_rng_state()
    try_backbones(config)
    assert torch.equal(torch.get_rng_state(), before), "the trial draws from the run's random numbers"


def test_a_hybrid_is_tried_with_a_layer_of_each_kind() -> None:
    text = AutoConfig.for_model("qwen3_5_text", vocab_size=64, num_hidden_layers=8, pad_token_id=None)
    assert len(set(scaled_down(text, num_layers=2).layer_types)) == 2
    try_backbones(
        DehvfConfig(text_config=text, vision_config=vision_config(), rank=8, router_dim=4, lora=LORA)
    )


def test_experts_take_no_adapters_and_that_is_said() -> None:
    with pytest.raises(ModelError, match=r"mixtures of experts.*set model\.lora\.rank 0"):
        try_backbones(config_of("mixtral", lora=LORA | {"targets": ["gate_proj"]}))


REAL = LlamaForCausalLM.forward


def scaled_ids(self, input_ids=None, inputs_embeds=None, **kwargs):
    """Of ids it makes larger embeddings."""
    if inputs_embeds is None:
        inputs_embeds = self.get_input_embeddings()(input_ids) * 3
    return REAL(self, inputs_embeds=inputs_embeds, **kwargs)


def scaled_logits(self, **kwargs):
    """Of the chosen rows alone it makes logits a thousandth larger."""
    output = REAL(self, **kwargs)
    if output.logits.shape[0] == 1 and kwargs.get("inputs_embeds") is not None:
        output.logits = output.logits * 1.001
    return output


def of_other_states(self, **kwargs):
    """Takes its logits of the embeddings."""
    output = REAL(self, **kwargs)
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    output.logits = self.lm_head(self.get_input_embeddings()(ids) if embeds is None else embeds)
    return output


def without_its_decoder(self, **kwargs):
    """Goes round the hooks of its decoder."""
    given = {name: kwargs.get(name) for name in ("input_ids", "inputs_embeds")}
    output = REAL(self, **kwargs)
    output.logits = self.lm_head(self.model.forward(**given).last_hidden_state)
    return output


def layer_without_ffn_module(self, hidden_states, *_, **__):
    ffn = getattr(self.mlp, "ffn", self.mlp)
    return hidden_states + ffn(self.post_attention_layernorm(hidden_states))


@pytest.mark.parametrize(
    ("owner", "forward", "message"),
    [
        (LlamaForCausalLM, scaled_ids, "computes other logits from embeddings than from ids"),
        (LlamaForCausalLM, scaled_logits, r"differ by 1\.0e-03 of the largest"),
        (LlamaForCausalLM, of_other_states, "something other than the hidden states of its layers"),
        (LlamaForCausalLM, without_its_decoder, "something other than the hidden states of its layers"),
        (LlamaDecoderLayer, layer_without_ffn_module, r"no gradient reaches .*scale_in"),
    ],
)
def test_a_decoder_that_differs_is_refused(monkeypatch, owner, forward, message) -> None:
    monkeypatch.setattr(owner, "forward", forward)
    with pytest.raises(ModelError, match=message):
        try_backbones(config_of("llama"))
