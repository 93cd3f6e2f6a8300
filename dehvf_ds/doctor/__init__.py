"""Is this machine ready for a run? ``python -m dehvf_ds.doctor`` prints what it finds."""
