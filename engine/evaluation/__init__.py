"""How good an encoder is: sequence tasks, word tasks, and the analyses of the paper.

* ``variants.py``: the states of a model that the paper compares; ``echo.py``, ``auto_encoder.py``: its baselines.
* Sequences: ``sts.py``, ``mteb_encoder.py`` (with ``mteb_run.py``, ``local_tasks.py`` and ``mteb_table.py``),
  ``pooling_table.py``.
* Words: ``word_data.py``, ``chunks.py``, ``word_features.py``, ``word_probe.py``, ``word_tasks.py``.
* Analyses: ``future_tokens.py``, ``similarity.py``, ``curves.py``.
* ``paper.py``: the paper's figures. ``study.py``: all of it on one run, with ``parts.py``, ``trends.py`` and
  ``study_report.py``.
"""

from bivec.engine.evaluation.sts import STSResult, evaluate_sts, sts_spearman

__all__ = ["STSResult", "evaluate_sts", "sts_spearman"]
