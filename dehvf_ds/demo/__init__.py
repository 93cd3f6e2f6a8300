"""The demo: a drawn world of scenes, two real backbones from PyPI packages, and what was learnt of them."""
