"""Shard directories made, taken over and checked; ``python -m dehvf_ds.data.building``."""
