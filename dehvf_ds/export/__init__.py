"""What ``tools/merge_adapters.py`` writes: tensors in shards, the directory, its card; their proof."""
