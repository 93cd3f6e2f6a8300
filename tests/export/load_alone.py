"""Loads an export with transformers alone, as on a machine without the trainer; prints what it says as JSON.

python load_alone.py DIRECTORY PICTURE
"""

from __future__ import annotations

import json
import sys

HIDDEN = {"peft", "jaxtyping", "deepspeed", "webdataset", "dehvf_ds"}


class Hide:
    """A finder that does not find some packages."""

    def __init__(self, inner):
        self._inner = inner

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self._inner.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._inner, name)


if __name__ == "__main__":
    sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

    directory, picture = sys.argv[1:]
    model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    prompt = model.config.prompt
    ids = model.generate(**processor(images=Image.open(picture), text=prompt), max_new_tokens=8)
    run = pipeline("image-text-to-text", model=directory, trust_remote_code=True)
    (said,) = run(images=picture, text=prompt, max_new_tokens=8, return_full_text=False)
    assert type(model).__module__.startswith("transformers_modules.")
    assert not HIDDEN & {name.partition(".")[0] for name in sys.modules}
    print(json.dumps([processor.batch_decode(ids, skip_special_tokens=True)[0], said["generated_text"]]))
