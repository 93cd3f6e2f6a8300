"""One function from hidden states to logits, whatever a decoder does between its layers and its logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import LORA, vision_config
from transformers import AutoConfig, LlamaForCausalLM

from dehvf_ds.model import DehvfConfig, DehvfForConditionalGeneration, ModelError
from dehvf_ds.model.trial import scaled_down, try_backbones

# Constants as they are published for these decoders, or farther from 1.
DECODERS = {
    "llama": {},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.25},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 30.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "nanochat": {"final_logit_softcapping": 15.0},
    "hyperclovax": {"logits_scaling": 0.1},
    "minicpm3": {"scale_emb": 12, "dim_model_base": 8},
    "phi": {},  # its head has a bias
    "gpt_neox": {},
    "stablelm": {},
    "qwen3": {},
}


def config_of(kind: str, fusion: str = "ffn", **settings) -> DehvfConfig:
    text = AutoConfig.for_model(kind, vocab_size=64, **(DECODERS.get(kind, {}) | settings))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, 1)
    return DehvfConfig(
        text_config=scaled_down(text, num_layers=2),
        vision_config=vision_config(),
        fusion=fusion,
        rank=8,
        router_dim=4,
        lora=None if kind in ("phi", "gpt_neox", "nanochat") else LORA,
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


@pytest.mark.parametrize("kind", DECODERS)
def test_the_loss_is_of_the_logits_that_generation_takes(kind: str, inputs) -> None:
    model = build(kind)
    labels = inputs.pop("labels")
    loss_sum = model(**inputs, labels=labels).loss_sum
    logits = model(**inputs).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss_sum, expected, rtol=1e-5, atol=1e-4)
    # What the next token is drawn by, too.
    generated = model.generate(
        inputs["input_ids"][:1],
        inputs["pixel_values"][:1],
        max_new_tokens=1,
        output_logits=True,
        return_dict_in_generate=True,
        do_sample=False,
    )
    torch.testing.assert_close(generated.logits[0], logits[:1, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("field", ["logits_scaling"])
def test_the_loss_feels_a_scale_of_a_thousandth(field: str, inputs) -> None:
    one, other = build("granite", logits_scaling=1.0), build("granite", logits_scaling=1.001)
    losses = [model(**inputs).loss.item() for model in (one, other)]
    assert abs(losses[0] - losses[1]) > 1e-4 * losses[0]


@pytest.mark.parametrize("kind", ["granite", "gemma2", "cohere"])
@pytest.mark.parametrize("fusion", ["prefix", "none"])
def test_other_fusions_too(kind: str, fusion: str, inputs) -> None:
    model = build(kind, fusion)
    labels = inputs.pop("labels")
    loss_sum = model(**inputs, labels=labels).loss_sum
    logits = model(**inputs).logits[:, -labels.shape[1] :]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss_sum, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [*DECODERS, "mixtral", "qwen2_moe", "mistral"])
def test_such_decoders_pass_the_trial(kind: str) -> None:
    config = config_of(kind) if kind not in ("mixtral", "qwen2_moe") else config_of_experts(kind)
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


def config_of_experts(kind: str, lora=None) -> DehvfConfig:
    text = AutoConfig.for_model(kind, vocab_size=64, pad_token_id=None)
    return DehvfConfig(text_config=text, vision_config=vision_config(), rank=8, router_dim=4, lora=lora)


def test_experts_take_no_adapters_and_that_is_said() -> None:
    with pytest.raises(ModelError, match=r"mixtures of experts.*set model\.lora\.rank 0"):
        try_backbones(config_of_experts("mixtral", LORA | {"targets": ["gate_proj"]}))


def scaled_ids(self, input_ids=None, inputs_embeds=None, **kwargs):
    """Of ids it makes embeddings a thousandth larger."""
    if inputs_embeds is None:
        inputs_embeds = self.get_input_embeddings()(input_ids) * SCALE
    return REAL(self, inputs_embeds=inputs_embeds, **kwargs)


REAL, SCALE = LlamaForCausalLM.forward, 1.0


def scaled_logits(self, **kwargs):
    """Looks at something else than what its layers return, by a thousandth."""
    output = REAL(self, **kwargs)
    if output.logits.shape[0] == 1 and kwargs.get("inputs_embeds") is not None:
        output.logits = output.logits * 1.001
    return output


def of_other_states(self, **kwargs):
    """Takes its logits of the embeddings."""
    output = REAL(self, **kwargs)
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = self.get_input_embeddings()(kwargs["input_ids"])
    output.logits = self.lm_head(embeds)
    return output


def without_its_decoder(self, **kwargs):
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = self.get_input_embeddings()(kwargs["input_ids"])
    output = REAL(self, **kwargs)
    output.logits = self.lm_head(self.model.forward(inputs_embeds=embeds).last_hidden_state)
    return output


@pytest.mark.parametrize(
    ("forward", "scale", "message"),
    [
        (scaled_ids, 3.0, "computes other logits from embeddings than from ids"),
        (scaled_logits, 1.0, r"differ by 1\.0e-03 of the largest"),
        (of_other_states, 1.0, "something else than the hidden states of its layers"),
        (without_its_decoder, 1.0, "something else than the hidden states of its layers"),
    ],
)
def test_a_decoder_that_differs_is_refused(monkeypatch, forward, scale, message) -> None:
    monkeypatch.setitem(globals(), "SCALE", scale)
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(ModelError, match=message):
        try_backbones(config_of("llama"))


def test_a_decoder_that_goes_round_its_ffns_is_refused(monkeypatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    def forward(self, hidden_states, *_, **__):
        ffn = getattr(self.mlp, "ffn", self.mlp)
        return hidden_states + ffn(self.post_attention_layernorm(hidden_states))

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    with pytest.raises(ModelError, match=r"no gradient reaches .*gain_in"):
        try_backbones(config_of("llama"))
