"""Operands on several devices are refused by name, before any backend sees them."""

import pytest
import torch

from bivec import kernels
from bivec.kernels.tuning import table_architecture

ROWS = torch.ones(4, 8)
BOUNDS, IDS = torch.tensor([0, 4], dtype=torch.int32), torch.arange(4)
HEADS, TABLE = torch.ones(4, 2, 8), torch.ones(16, 4)

CALLS = {
    "flash_attention": (kernels.flash_attention, [HEADS, HEADS, HEADS, BOUNDS], {"max_seqlen": 4}),
    "linear_cross_entropy": (kernels.linear_cross_entropy, [ROWS, ROWS, IDS], {}),
    "info_nce": (kernels.info_nce, [ROWS, ROWS, IDS], {}),
    "segment_pool": (kernels.segment_pool, [ROWS, BOUNDS], {}),
    "rms_norm": (kernels.rms_norm, [ROWS, ROWS[0]], {"eps": 1e-5}),
    "apply_rotary": (kernels.apply_rotary, [HEADS, HEADS, TABLE, TABLE, IDS], {}),
    "swiglu": (kernels.swiglu, [ROWS, ROWS], {}),
    "geglu": (kernels.geglu, [ROWS, ROWS], {}),
}


@pytest.mark.parametrize(
    ("op", "place"), [(op, place) for op, (_, operands, _) in CALLS.items() for place in range(1, len(operands))]
)
def test_another_device_is_named(op, place):
    call, operands, options = CALLS[op]
    call(*operands, **options, backend="torch")
    elsewhere = [x.to("meta") if at == place else x for at, x in enumerate(operands)]
    with pytest.raises(ValueError, match=rf"^{op}: \w+ is on meta, \w+ on cpu; move"):
        call(*elsewhere, **options, backend="torch")


def test_a_gpu_that_is_too_old_is_named():
    with pytest.raises(RuntimeError, match=r"sm_75: the Triton kernels need compute capability 8\.0"):
        table_architecture("sm_75")
