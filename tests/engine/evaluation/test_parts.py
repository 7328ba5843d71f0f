"""Parts of an evaluation: done once, done again for other settings, never half written."""

import json

import pytest

from bivec.engine.errors import RunError
from bivec.engine.evaluation.parts import fingerprint, run_part


class Work:
    def __init__(self, result):
        self.result, self.calls = result, 0

    def __call__(self):
        self.calls += 1
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def test_a_part_is_done_once(tmp_path):
    work = Work({"scores": [1.5, 2.0], "names": ("a", "b")})
    first = run_part(tmp_path / "out", "sts", {"model": "x", "sizes": (1, 2)}, work)
    again = run_part(tmp_path / "out", "sts", {"model": "x", "sizes": (1, 2)}, work)
    assert work.calls == 1 and (first.reused, again.reused) == (False, True)
    assert first.data == again.data == {"scores": [1.5, 2.0], "names": ["a", "b"]}  # the same types both times
    assert again.seconds == first.seconds
    other = run_part(tmp_path / "out", "sts", {"model": "y", "sizes": (1, 2)}, work)
    assert work.calls == 2 and not other.reused
    run_part(tmp_path / "out", "words", {"model": "y", "sizes": (1, 2)}, work)
    assert work.calls == 3 and sorted(file.name for file in (tmp_path / "out").iterdir()) == ["sts.json", "words.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": {}}', '{"settings": {}, "data": 1}', "\x00"])
def test_a_damaged_file_is_made_again(tmp_path, text):
    (tmp_path / "sts.json").write_text(text)
    assert run_part(tmp_path, "sts", {}, Work(3)).data == 3
    assert json.loads((tmp_path / "sts.json").read_text())["data"] == 3


@pytest.mark.parametrize("result", [float("nan"), {"x": {1, 2}}])
def test_no_json(tmp_path, result):
    with pytest.raises(RunError, match="part sts: its result is no JSON"):
        run_part(tmp_path, "sts", {}, Work(result))
    assert not list(tmp_path.iterdir())


def test_a_part_that_fails_leaves_what_was_there(tmp_path):
    run_part(tmp_path, "sts", {"a": 1}, Work(3))
    with pytest.raises(KeyboardInterrupt):
        run_part(tmp_path, "sts", {"a": 2}, Work(KeyboardInterrupt()))
    assert run_part(tmp_path, "sts", {"a": 1}, Work(4)).data == 3


def test_fingerprint_of_a_run(tmp_path):
    run = tmp_path / "run"
    (run / "mntp").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"recipe": {"seed": 1}, "machine": "x"}))
    (run / "mntp" / "adapter_model.safetensors").write_bytes(b"abc")
    before = fingerprint(run)
    assert before == fingerprint(run) and list(before) == ["recipe", "mntp/adapter_model.safetensors"]
    (run / "run.json").write_text(json.dumps({"machine": "y", "recipe": {"seed": 1}}))
    assert fingerprint(run) == before  # where it ran is no matter
    (run / "mntp" / "adapter_model.safetensors").write_bytes(b"abd")
    assert fingerprint(run) != before
    (run / "mntp" / "adapter_model.safetensors").write_bytes(b"abc")
    (run / "run.json").write_text(json.dumps({"recipe": {"seed": 2}}))
    assert fingerprint(run) != before


def test_fingerprint_of_weights(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(3 << 20))
    before = fingerprint(file)
    assert before == fingerprint(tmp_path)
    file.write_bytes(b"x" + bytes((3 << 20) - 1))
    assert fingerprint(file) != before
