"""What pyproject.toml cannot say: the DeepSpeed JSONs lie beside the package and are installed inside it."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dehvf_ds", "dehvf_ds.*"]), "dehvf_ds.ds_configs"],
    package_dir={"dehvf_ds.ds_configs": "ds_configs"},
)
