"""A trained run as a Hugging Face model: ``tools/merge_adapters.py`` or ``python -m dehvf_ds.export``."""
