"""DEHVF: parameter-efficient vision-language fine-tuning on DeepSpeed.

Importing it registers the model with transformers' Auto classes.
"""

import warnings

__version__ = "0.2.0"

try:
    from dehvf_ds import model as model
except ModuleNotFoundError as error:  # the doctor starts without torch and transformers, and names them
    if error.name is None or error.name.partition(".")[0] == "dehvf_ds":
        raise
except (ImportError, OSError) as error:  # one of them is broken
    warnings.warn(f"the DEHVF model is not registered with transformers: {error}", stacklevel=2)
