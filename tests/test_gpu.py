"""gpu.py: all of it on the CPU, by its smallest sizes; what is done stays, what fails is told."""
import os
import re
import shlex
import sys
import types

import bench
import gpu
import numpy as np
import pytest
import torch
from PIL import Image
from util import ROOT, glyphs, start_script

import common

MODULES = {f"{module.__name__}.py": module
           for module in (bench.cd, bench.ct, bench.ctm, bench.guided_distill)}
MODULES["tests/bench.py"] = bench


class Forked:
    """What gpu.py needs of subprocess.Popen, of a process that is forked: seconds sooner there."""
    def __init__(self, words, output, env):
        path = f"/proc/self/fd/{output.fileno()}"
        command = [str(ROOT / words[0]), *words[1:]]
        self.process = start_script(command, str(ROOT), [os.readlink(path)] * 2, env)
        self.terminate, self.kill = self.process.terminate, self.process.kill
        self.wait = self.process.join

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Calls gpu.py; returns its exit code, and its report."""
    start = gpu.start
    monkeypatch.setattr(gpu, "start", lambda words, *more: (
        start if words[0] == "-m" else Forked)(words, *more))
    monkeypatch.setattr(gpu, "GPU", False)
    monkeypatch.setattr(common, "StopSignal", lambda: types.SimpleNamespace(number=0))

    def called(*flags):
        words = ["--quick", "--work", tmp_path / "work", "--results", tmp_path / "results", *flags]
        code = gpu.main(gpu.make_parser().parse_args(map(str, words)))
        return code, (tmp_path / "results" / "gpu.md").read_text()
    return called


def tables(text):
    """Of each part of a report, the rows of its tables: lists of cells."""
    parts = re.split(r"^## .*", text, flags=re.M)
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()
             if re.match(r"\| (?!-)", line)] for part in parts]


def records(folder):
    paths = sorted(folder.glob("*/record.json"))
    return {path.parent.name: (path.stat().st_mtime_ns, path.read_text()) for path in paths}


def write_images(path, *more):
    images, labels = glyphs(300, 5)
    np.savez(path, images, *([labels] if more else []))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_all_of_it(tmp_path, call):
    """Every piece passes and has a row, the report its numbers and pictures; the same command again
    does nothing."""
    write_images(tmp_path / "digits.npz", "labels")
    flags = "--minutes", 0.05, "--data", tmp_path / "digits.npz"
    code, text = call(*flags)
    assert code == 0, text
    _, right, fast, images, _ = tables(text)
    outcomes = {cells[0]: cells[1] for cells in (*right, *fast, *images) if len(cells) == 4}
    done = records(tmp_path / "work")
    headings = outcomes.pop("piece"), outcomes.pop("share")
    assert headings == ("outcome", "ms") and set(outcomes.values()) >= {"passed"}
    passed = [name for name in outcomes if outcomes[name] == "passed"]
    assert len(passed) == len(done) == 34
    for name in ("ct eager, resumed", "cd continuous, full gradient", "ctm critic", "ct torchrun",
                 "guided_distill img2img", "ctm glyphs, largest batch", "cd samples"):
        assert name in passed
    assert "No GPU here" in text and "Failed: nothing" in text and "yet: nothing" in text

    measured = [cells for cells in fast if len(cells) == 11]
    assert [cells[:3] for cells in measured[1:]] == [
        [step, "glyphs", batch] for batch in "48" for step in ("ct", "ctm")]
    assert all(float(cells[6]) > 0 for cells in measured[1:])
    profile = [cells for cells in fast if cells[0].endswith("%")]
    assert len(profile) == 25 and any("convolution" in cells[3] for cells in profile)

    drawn = [cells for cells in images if len(cells) == 6]
    ways = dict(teacher="35", ect="12", cd="12", ctm="12")
    assert [cells[0] + cells[1] for cells in drawn[1:]] == [
        name + calls for name in ways for calls in re.findall("35|.", ways[name])]
    assert all(float(cells[4]) > 0 for cells in drawn[1:])
    for name, blocks in dict(teacher=1, ect=2, cd=2, ctm=2).items():
        with Image.open(tmp_path / "results" / f"gpu_{name}.png") as picture:
            side = 3 * 16  # enlarged
            assert picture.size == (blocks * 10 * side + (blocks - 1) * 12, 8 * side)
        assert f"gpu_{name}.png" in text

    assert call(*flags)[0] == 0 and records(tmp_path / "work") == done
    with pytest.raises(common.UserError, match="other settings"):
        call("--minutes", 7)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_fails(tmp_path, call):
    """Data that cannot be trained on: a row says why, what needs it says so, exit code 1."""
    write_images(tmp_path / "digits.npz")
    flags = "--minutes", 0.05, "--data", tmp_path / "digits.npz", "--only", "images"
    code, text = call(*flags)
    outcome = {cells[0]: cells[1] for cells in tables(text)[3]}
    assert code == 1
    assert outcome["data"] == f"**failed**: --data {tmp_path}/digits.npz has no labels"
    assert outcome["cd"] == "**failed**: needs what did not pass: data"
    assert "ct eager, stopped" in re.search("Not done.*", text)[0]


def new_session(folder, *flags):
    words = ["--work", str(folder), "--results", str(folder), "--minutes", "25", *flags]
    return gpu.Session(gpu.make_parser().parse_args(words))


def test_a_command_that_fails(tmp_path, call):
    """It ends with the script's own error; another exit code than the one expected is one, too."""
    commands = gpu.Commands(new_session(tmp_path), tmp_path)
    with pytest.raises(gpu.Failed, match="exit code 2: ct.py: error: --lr does not apply"):
        commands.run("ct.py --ckpt x.pt --lr 1")
    with pytest.raises(gpu.Failed, match="exit code 0: "):
        commands.run("ct.py --help", code=143)
    with pytest.raises(gpu.Failed, match="not ended within 0 minutes"):
        commands.run("ct.py --help", minutes=0)
    assert commands.said[0] == "python ct.py --ckpt x.pt --lr 1"


def test_what_is_done_again(tmp_path, call, monkeypatch):
    """What failed, in an empty folder; what was interrupted, in its own; not what passed. Nothing
    is begun after the deadline, or once the session is to stop."""
    session, seen = new_session(tmp_path), []
    endings = dict(good=[None], bad=[ValueError("no\nluck"), None], cut=[gpu.Stopped(), None])

    def piece(commands):
        name = commands.folder.name
        seen.append((name, len(list(commands.folder.iterdir()))))
        (commands.folder / "left").touch()
        ending = endings[name].pop(0)
        if ending:
            raise ending
        return dict(note="well")
    for _ in range(3):
        for name in endings:
            session.do(name, piece)
            if name == "bad" and seen[-1] == ("bad", 0) and endings["bad"]:
                assert session.record("bad")["error"] == "ValueError: no"
    assert seen == [("good", 0), ("bad", 0), ("cut", 0), ("bad", 0), ("cut", 1)]
    assert all(session.record(name)["note"] == "well" for name in endings)
    session.deadline = 0
    session.do("late", piece)
    session.deadline, session.stop.number = float("inf"), 15
    session.do("stopped", piece)
    assert session.record("late") is session.record("stopped") is None and len(seen) == 5


@pytest.mark.parametrize("flags", [(), ("--quick",)])
def test_commands_of_a_gpu(tmp_path, call, monkeypatch, flags):
    """All that is run where there is a GPU: the scripts take these flags, and they fit together."""
    monkeypatch.setattr(gpu, "GPU", True)
    card = types.SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(gpu, "last_of_log", lambda folder: dict(images_per_s=5120.0, loss=1.0,
                                                                peak_gb=1.0))
    monkeypatch.setattr(gpu.Session, "need", lambda session, *names: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    session, taken = new_session(tmp_path, *flags), []

    def run(commands, *parts, **more):
        words = shlex.split(" ".join(parts))
        if words[0] != "-m":
            monkeypatch.setattr(sys, "argv", words)
            module = MODULES[words[0]]
            args = (module.make_parser().parse_args(words[1:]) if module is bench else
                    common.parse_flags(module.make_parser(), module.recipe, module.check))
            taken.append((words[0], args))
        return "30.59M parameters; resumed at step 5\n| a row |\nprofile | 1 |\n"
    monkeypatch.setattr(gpu.Commands, "run", run)
    not_run = "data", "classifier", *(f"{name} samples" for name in gpu.TRAININGS)
    chains = [chain for part in session.chains.values() for chain in part]
    for name, piece in (item for chain in chains for item in chain.items()):
        if name not in not_run:
            session.do(name, piece)
            assert session.record(name)["error"] is None, session.record(name)
    long = {script: args for script, args in taken if getattr(args, "batch_size", 0) == 512}
    seconds = 60 * 25 * 0.09
    assert long["ct.py"].total_steps == seconds * 10 and long["ctm.py"].micro_batch == 256
    assert long["cd.py"].compile is not bool(flags)
    measured = [args for _, args in taken if hasattr(args, "repeat")]
    assert {args.layout for args in measured} == {"channels_last"}
    assert [args.mode for args in measured if args.profile] == ["compiled"]
    batches = [args.batch for args in measured if (args.step, args.net) == ("ct", "cifar10")]
    doubled = [256, 256] if flags else [256, 512, 1024, 2048, 2048]
    assert batches == [128, 128, *doubled]
