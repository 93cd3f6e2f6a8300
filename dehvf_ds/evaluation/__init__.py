"""From shards to scores: what is asked, how it is scored, alone or in the middle of a run."""
