"""How good an encoder is: sequence tasks, word tasks, and the analyses of the paper.

* ``sts.py``: sentence pairs. ``variants.py``: the states of a model that the paper compares.
"""

from bivec.engine.evaluation.sts import STSResult, evaluate_sts, sts_spearman

__all__ = ["STSResult", "evaluate_sts", "sts_spearman"]
