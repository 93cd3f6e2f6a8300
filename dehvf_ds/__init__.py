"""DEHVF: parameter-efficient vision-language fine-tuning on DeepSpeed.

Importing it registers the model with transformers' Auto classes.
"""

import warnings

__version__ = "0.1.0"

try:
    from dehvf_ds import model as model
except (ImportError, OSError) as error:  # so that the doctor can still say what is missing
    warnings.warn(f"the DEHVF model is not registered with transformers: {error}", stacklevel=2)
