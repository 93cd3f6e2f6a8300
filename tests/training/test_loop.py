from __future__ import annotations

import pytest
import torch
from torch import nn

from dehvf_ds.training.loop import TrainingError, _require_gradients
from dehvf_ds.training.optim import GradientWatch


def test_a_trainable_that_no_loss_reaches_is_an_error_that_names_it() -> None:
    used, lost = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    watch = GradientWatch({"fuser.w_key": used, "reader.w_out": lost})
    used.sum().backward()
    with pytest.raises(TrainingError, match=r"no gradient reached 1 trainable .* reader\.w_out"):
        _require_gradients(watch)
