"""The two backbones of the demo, read from PyPI packages by ``prepare_backbones.py``."""
