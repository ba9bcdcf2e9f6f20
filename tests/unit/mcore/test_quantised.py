"""What is kept of an FP8 parameter's full numbers; a plain parameter with its methods stands for one."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

from megatron_rl.mcore.quantised import store


def test_the_numbers_that_a_layer_was_made_with_go_when_those_of_the_model_come() -> None:
    parameter: Any = torch.nn.Parameter(torch.zeros(3))
    # as Transformer Engine attaches them
    parameter._high_precision_init_val = torch.zeros(3)

    def clear(self: Any) -> None:
        del self._high_precision_init_val

    parameter.get_high_precision_init_val = MethodType(lambda self: self._high_precision_init_val, parameter)
    parameter.clear_high_precision_init_val = MethodType(clear, parameter)
    for values in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])):
        store(parameter, values)
        assert not hasattr(parameter, "_high_precision_init_val")
        assert torch.equal(parameter.get_high_precision_init_val(), values)
        assert torch.equal(parameter.detach(), values)
    parameter.clear_high_precision_init_val()
    assert parameter.get_high_precision_init_val() is None
