"""Matrix products in float8, by torchao (https://github.com/pytorch/ao, torchao.float8): weights, optimizer and what
is saved stay as they are; the inputs of a product are rounded to float8 with a scale for each row.
"""

from __future__ import annotations

import torch
from torch import nn

from calumma.platform.specification import SpecificationError

_CAPABILITY = (8, 9)  # of the first GPUs that multiply float8: Ada and Hopper
_MULTIPLE = 16  # of both sides of a weight, as the kernels ask for


def check_device() -> None:
    """Whether this machine's GPU multiplies float8. Raises SpecificationError."""
    if not torch.cuda.is_available():
        raise SpecificationError("float8: there is no GPU here; it takes one with float8 products, an H100 or newer")
    if torch.cuda.get_device_capability() < _CAPABILITY:
        raise SpecificationError(
            f"float8: {torch.cuda.get_device_name()} does not multiply float8; it takes an H100 or newer"
        )


def convert(model: nn.Module, emulate: bool = False) -> list[str]:
    """Let the blocks' linear layers multiply in float8, in place; names of those that do. The output projection stays
    as it is: its losses would feel the rounding first. `emulate`: the same rounding on any device, slowly. Raises
    SpecificationError."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        from torchao.float8.float8_linear import Float8Linear
    except ImportError as error:
        raise SpecificationError(
            f"float8: torchao is not installed on the workers ({error}); pip install torchao"
        ) from error
    if not emulate:
        check_device()
    config = Float8LinearConfig.from_recipe_name("rowwise") if not emulate else Float8LinearConfig(emulate=True)
    convert_to_float8_training(model, module_filter_fn=_is_converted, config=config)
    return [name for name, module in model.named_modules() if isinstance(module, Float8Linear)]


def _is_converted(module: nn.Module, name: str) -> bool:
    if type(module) is not nn.Linear or not name.startswith("blocks."):
        return False
    return module.in_features % _MULTIPLE == 0 and module.out_features % _MULTIPLE == 0
