"""How an export is loaded, as its card shows it."""

from __future__ import annotations

from collections.abc import Sequence

_ASK = """picture = Image.open("picture.jpg")
inputs = processor(images=picture, text={prompt!r})
ids = model.generate(**inputs)
print(processor.batch_decode(ids, skip_special_tokens=True)[0])"""

_MODEL = """{first}from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("DIRECTORY", dtype="auto"{trust})
processor = AutoProcessor.from_pretrained("DIRECTORY"{trust})
{ask}"""

_PIPELINE = """from transformers import pipeline

run = pipeline("image-text-to-text", model="DIRECTORY", trust_remote_code=True)
print(run(images="picture.jpg", text={prompt!r}, return_full_text=False))"""

_ADAPTER = """from dehvf_ds.model.weights import find_trained

trained = find_trained("DIRECTORY", language_model={bases[0]!r}, vision_tower={bases[1]!r})
model = trained.load("bf16")  # refuses other base models than those that it was trained on"""

_LORA = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({bases[0]!r})
model = PeftModel.from_pretrained(base, "DIRECTORY", subfolder="lora")"""


def loading(form: str, prompt: str | None, bases: Sequence[str]) -> str:
    """The section of a card on loading.

    Args:
        form: ``merged``, ``unfolded`` or ``adapter``.
        prompt: what the model is best asked; None where each question is another.
        bases: names of the language model and the vision tower.
    """
    if form == "adapter":
        return "\n\n".join(
            [
                "With the package dehvf_ds, onto the same base models in any dtype or sharding:",
                _code(_ADAPTER.format(bases=bases)),
                "The FFN adapters alone, without what sees, by PEFT:",
                _code(_LORA.format(bases=bases)),
                f"From the shell: `python dehvf_ds/generate.py --model DIRECTORY --language_model {bases[0]} "
                f"--vision_tower {bases[1]} --image picture.jpg`.",
            ]
        )
    asked = "Your question" if prompt is None else prompt
    needs = "torch, transformers, pillow" + (", peft" if form == "unfolded" else "")
    ask = _ASK.format(prompt=asked)
    return "\n\n".join(
        [
            "With the package dehvf_ds:",
            _code(_MODEL.format(first="import dehvf_ds  # registers the model\n", trust="", ask=ask)),
            f"From the directory alone ({needs}), by the code in it; read it before you trust it:",
            _code(_MODEL.format(first="", trust=", trust_remote_code=True", ask=ask)),
            "As a pipeline, with pictures and texts or with chat messages:",
            _code(_PIPELINE.format(prompt=asked)),
        ]
    )


def _code(text: str) -> str:
    return f"```python\n{text}\n```"
