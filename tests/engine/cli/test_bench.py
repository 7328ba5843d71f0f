"""bivec bench: the list, a script with its own arguments, and what it says without a clone."""

import json
from pathlib import Path

import pytest

from bivec.engine.cli import bench

SCRIPTS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Benchmarks of our own: a script, one that pytest runs, and a part of the script."""
    (tmp_path / "fast.py").write_text(
        '"""How fast is it? Very.\n\nMore.\n"""\n\nimport json\nimport sys\n\nimport part\n\n'
        'if __name__ == "__main__":\n    print(json.dumps([part.NAME, *sys.argv[1:]]))\n'
        "    sys.exit(len(sys.argv) - 1)\n"
    )
    (tmp_path / "part.py").write_text('"""A part."""\n\nNAME = "part"\n')
    (tmp_path / "tested.py").write_text(
        '"""What does pytest say?\n\n    pytest benchmarks/tested.py\n"""\n\n\ndef test_it(request):\n'
        '    assert request.config.getoption("-k") == "it"\n'
    )
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    return tmp_path


def test_the_list(bivec, bivec_json, folder):
    assert bivec("bench")[0] == "fast    How fast is it? Very.\ntested  What does pytest say?\n"
    assert bivec_json("bench") == [
        {"name": "fast", "question": "How fast is it? Very.", "path": str(folder / "fast.py"), "runner": "python"},
        {"name": "tested", "question": "What does pytest say?", "path": str(folder / "tested.py"), "runner": "pytest"},
    ]


def test_the_clones_benchmarks_are_all_there(bivec_json):
    found = {one["name"]: one for one in bivec_json("bench")}
    scripts = {file.stem for file in SCRIPTS.glob("*.py") if "\ndef main(" in file.read_text(encoding="utf-8")}
    assert found.keys() == scripts | {"ops"} and found["ops"]["runner"] == "pytest"
    assert all(one["question"].endswith((".", "?")) for one in found.values())


def test_a_script_gets_what_stands_behind_its_name(capfd, folder):
    from bivec.engine.cli import main

    assert main(["bench", "fast"]) == 0
    assert json.loads(capfd.readouterr().out) == ["part"]
    assert main(["bench", "fast", "--json", "-h"]) == 2  # its own exit code
    assert json.loads(capfd.readouterr().out) == ["part", "--json", "-h"]
    assert main(["bench", "tested", "-k", "it", "--import-mode=importlib", "-q"]) == 0
    assert "1 passed" in capfd.readouterr().out


def test_a_real_one_explains_itself(capfd):
    from bivec.engine.cli import main

    assert main(["bench", "roofline", "--help"]) == 0
    assert "usage: roofline.py" in capfd.readouterr().out


def test_what_is_not_there(bivec, folder, monkeypatch):
    assert "there is no benchmark 'slow', only fast, tested" in bivec("bench", "slow", code=2)[1]
    monkeypatch.setattr(bench.sys, "executable", str(folder / "bin" / "python"))
    assert 'with pytest, which is not installed: pip install "bivec[test]"' in bivec("bench", "tested", code=1)[1]
    monkeypatch.setattr(bench, "FOLDER", folder / "absent")
    for words in ((), ("fast",), ("--json",)):
        printed, said = bivec("bench", *words, code=1)
        assert printed == "" and "come with a clone of the repository, not with an installed package" in said
