"""The demo: drawn scenes, two real backbones from PyPI packages, and a check of what was learnt."""
