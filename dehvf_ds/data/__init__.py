"""From shards to batches: index, order, decoding, transforms, prompts, collation."""
