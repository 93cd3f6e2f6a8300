"""Moved; this name goes with its last import."""

from .adapter import (  # noqa: F401
    CONFIG_FILE,
    LORA_FILE,
    MANIFEST_FILE,
    decoder_name,
    load_adapter,
    peft_name,
    read_manifest,
    replace_artifact,
    save_adapter,
)
