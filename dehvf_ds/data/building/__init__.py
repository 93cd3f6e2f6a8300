"""Shard directories made, taken over and checked; used by ``tools/build_shards.py`` alone."""
