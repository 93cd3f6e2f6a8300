"""What ``merge_adapters.py`` writes: a model as others load it, its shards, its card, and the proof of both."""
