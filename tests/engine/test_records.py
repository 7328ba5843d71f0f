"""Dataclasses from files: every field of its type."""

from dataclasses import replace

import pytest

from bivec.engine.encoder_config import EncoderConfig
from bivec.engine.errors import ConfigError
from bivec.engine.records import check_types
from bivec.engine.report import StageResult
from bivec.engine.trainer import StepMetrics


def test_what_we_write_is_right():
    """A whole number where a float is expected, None where that may be, and the same with one field of another type."""
    for right, wrong in (
        (StageResult("uni", "mean", 47, None), {"pooling": 5}),
        (StepMetrics("mntp", 1, 2.5, 1e-3, 1, 10, 5.0, 9), {"stage": None}),
    ):
        check_types(right)
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} is "):
            check_types(replace(right, **wrong))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (StageResult("uni", "mean", "47"), "sts_dev_spearman is '47', expected float"),
        (StageResult("uni", "mean", 47.0, "x"), "sts_test_spearman is 'x', expected float or None"),
        (StageResult(None, "mean", 47.0), "stage is None, expected str"),
        (StageResult("uni", "mean", True), "sts_dev_spearman is True, expected float"),
        (StepMetrics("mntp", 1.5, 2.5, 1e-3, 1.0, 10, 5.0, 9), "step is 1.5, expected int"),
        (StepMetrics("mntp", True, 2.5, 1e-3, 1.0, 10, 5.0, 9), "step is True, expected int"),
    ],
)
def test_another_type_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        check_types(record)


@pytest.mark.parametrize("field", [{"pool_bos": "false"}, {"causal": 1}, {"template": 5}, {"max_length": "512"}])
def test_encoder_settings_are_typed(field):
    """A truth value as a string would have been taken for true."""
    with pytest.raises(ConfigError, match=f"{next(iter(field))} is "):
        EncoderConfig(**field)
