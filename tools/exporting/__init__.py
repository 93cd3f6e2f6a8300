"""What ``merge_adapters.py`` writes: a model's tensors in shards, its directory, its card; their proof."""
