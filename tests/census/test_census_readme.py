"""The room's README: its commands run, and its keys are those of the JSON."""

import json
import re
import shlex
import shutil

import pytest
from merge_models import write_child
from paths import GOLDEN, TESTS

from pyengine.cli import main
from pyengine.text.gguf_vocabulary import export_tokenizer

README = (TESTS.parent / "pyengine" / "census" / "README.md").read_text()
MODEL = GOLDEN / "pattern31.gguf"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:census. .* tokens are:pyengine.errors.PyengineWarning")
def test_its_commands_and_keys(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(MODEL, "father.gguf")
    export_tokenizer(MODEL, write_child(tmp_path / "mother.gguf", 1))  # a directory works in its place
    for name in ("prose.txt", "code.txt", "probes.txt"):
        (tmp_path / name).write_text("In the beginning\nGod created\n")
    (block,) = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    commands = [shlex.split(line.split(" > ")[0], comments=True)[1:] for line in block.splitlines()]
    assert [command[0] for command in commands] == ["census"] * 4 + ["probe"]
    for command in commands:
        capsys.readouterr()
        assert main(command) == 0, command
    capsys.readouterr()
    assert main([*commands[2], "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    keys = {
        *said["layers"][0],
        *said["layers"][0]["experts"][0],
        *said["comparison"][0],
        "comparison",
        "other",
    }
    assert main([*commands[4], "--json"]) == 0
    probed = json.loads(capsys.readouterr().out)
    keys |= {*probed["layers"][0], "core", "modules", "probes"}
    unsaid = {key for key in keys if f"`{key}`" not in README}
    assert unsaid == {"layer", "expert", "experts", "dead_in_both", "dead_in_first", "dead_in_second"}
