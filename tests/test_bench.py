"""The scoreboard: that it trains, measures, resumes and reports as it says. No test of quality."""
import json
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import bench
import pytest
import scoreboard
import torch
from util import ROOT, run_script

import common
import guided_distill

NET = ["--net", "glyphs", "base=32", "mult=1,1", "blocks=1"]
MODULES = {f"{module.__name__}.py": module for module in (bench.cd, bench.ct, bench.ctm, guided_distill)}


def arguments(*words):
    return bench.flags().parse_args(["quality", *map(str, words)])


# ---- measuring

def test_score_draws_each_image_once():
    """Frechet distance of a set and itself moved by c: |c|^2. 260 images: two batches, seeded and labelled as if they were one."""
    asked = []

    def draw(y, noise, shape):
        asked.append((y, noise(torch.zeros(shape))))
        return (asked[-1][1] / 100 + y[:, None, None, None] / 20).clamp(-1, 1)

    net = types.SimpleNamespace(image_size=2, classes=10)
    y, whole = torch.arange(260) % 10, common.seeded_noise(range(260), 3)(torch.zeros(260, 3, 2, 2))
    images = (whole / 100 + y[:, None, None, None] / 20).clamp(-1, 1)

    class Reader(torch.nn.Module):
        features = staticmethod(lambda x: x.flatten(1))

        def forward(self, x):
            return -(x.mean((1, 2, 3))[:, None] * 20 - torch.arange(9)).abs()  # reads 0 to 8, a 9 as 8

    share, distance, rate = bench.score((Reader(), images + 0.5, ""), net, draw, 260, 3)
    assert [len(part) for part, _ in asked] == [250, 10] and torch.equal(torch.cat([part for part, _ in asked]), y)
    assert torch.equal(torch.cat([noise for _, noise in asked]), whole)
    assert share == pytest.approx(0.9) and distance == pytest.approx(12 * 0.25, abs=1e-4) and rate > 0


# ---- what is trained

@pytest.mark.parametrize("K", [10, 24, 778, 2000])
def test_rounds_take_the_budget(K):
    for name in ("pd", "guided-d", "guided-s"):
        words = scoreboard.command(scoreboard.METHODS[name], arguments("--total-steps", K), "t.pt", "folder")[2:]
        settings = guided_distill.recipe(given := vars(guided_distill.flags().parse_args(words))) | given
        rounds = guided_distill.plan(settings)
        assert settings["total_steps"] == K and min(steps for _, steps in rounds) >= 1
        assert {1, 2, 4} <= {N for N, _ in rounds} and rounds[0][0] == {"pd": 8}.get(name, 0)


@pytest.mark.parametrize("name", scoreboard.METHODS | scoreboard.ABLATIONS)
def test_every_command_is_one(name):
    """Its script takes the flags; and of a path it has the settings that it has for glyphs, data and net apart."""
    method, settings = (scoreboard.METHODS | scoreboard.ABLATIONS)[name], []
    module = MODULES[method.script]
    for more in ([], ["--dataset", "images.zip"]):
        args = arguments("--jobs", 1, "--seed", 7, "--total-steps", 30, "--teacher-steps", 40, "--ablation-steps", 20, *more)
        given = vars(module.flags().parse_args(scoreboard.command(method, args, "t.pt", "folder")[2:]))
        settings.append(module.recipe(given) | given)
    steps = 20 if name in scoreboard.ABLATIONS else 40 if name == "teacher" else 30
    ignored = {"dataset", "flip", "net", "start_N", "sigmas"} | (set() if "critic" in name else {"disc_start"})
    mine, theirs = ({key: value for key, value in some.items() if key not in ignored} for some in settings)
    assert mine == theirs and mine["total_steps"] == steps and (mine["batch_size"], mine["seed"]) == (32, 7)
    assert mine.get("teacher") in ("t.pt", "none", None) and mine["out_dir"] == "folder"


def test_fixed_N_and_mu():
    """N levels all along, and the mu that the adaptive schedule has where it has N levels: exp(2 ln 0.9 / N), within a part in 10,000."""
    for N in (10, 40, 150):
        words = scoreboard.command(scoreboard.ABLATIONS[f"ct-fixed-{N}"], arguments(), "", "folder")[2:]
        settings = bench.ct.recipe(given := vars(bench.ct.flags().parse_args(words))) | given
        for k in (0, 500, 999):
            assert bench.ct.num_points(k, 1000, settings["s0"], settings["s1"], settings["schedule"]) == N
        assert bench.ct.target_decay(N, settings["s0"], settings["mu0"]) == pytest.approx(0.9 ** (2 / N), rel=1e-4)


# ---- trainings, of a stub: so many steps of 0.05 s, saved when it is told to stop; or a failure

STUB = """
import json, signal, sys, time
from pathlib import Path
folder, what = Path(sys.argv[1]), sys.argv[2]
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
if what == "fail":
    sys.exit("stub.py: error: no luck")
last, began = folder / "last.pt", time.time()
step = int(last.read_text()) if last.exists() else 0
(folder / "begun").touch()
while step < int(what) and not stop:
    time.sleep(0.05)
    step += 1
time.sleep(0.5 * (folder.name == "slow"))
last.write_text(str(step))
with open(folder.parent / "order.txt", "a") as file:
    file.write(json.dumps([folder.name, began, time.time(), step]) + "\\n")
sys.exit(143 if stop else 0)
"""


def stub_runs(folder, **whats):
    (folder / "stub.py").write_text(STUB)
    folders = {name: folder / name for name in whats}
    commands = {name: [sys.executable, str(folder / "stub.py"), str(folders[name]), *what.split()] for name, what in whats.items()}
    return commands, folders


def test_trainings_in_order(tmp_path, capsys, monkeypatch):
    """The teacher first, students after it, the longest first, two at once; what fails is told and the rest goes on."""
    commands, folders = stub_runs(tmp_path, teacher="40", short="5 --teacher", long="5 --teacher", bad="fail",
                                  scratch="9 --teacher none", other="5")
    begun, start = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda words, **more: (begun.append(Path(words[2]).name), start(words, **more))[1])
    scoreboard.train(dict(teacher=1, short=1, long=5, bad=2, scratch=3, other=2.5), commands, folders, 2, types.SimpleNamespace(number=0))
    ran = {name: (began, ended) for name, began, ended, _ in map(json.loads, (tmp_path / "order.txt").read_text().splitlines())}
    assert ran.keys() == {"teacher", "short", "long", "scratch", "other"} and ran["scratch"][0] < ran["teacher"][1]
    assert begun[:2] == ["teacher", "scratch"] and ran["teacher"][1] < min(ran["long"][0], ran["short"][0])
    assert begun.index("other") < begun.index("bad") and begun.index("long") < begun.index("short")
    assert all(sum(a <= began < b for a, b in ran.values()) <= 2 for began, _ in ran.values())
    records = {name: scoreboard.read_record(folders[name]) for name in folders}
    assert {name for name in records if records[name]["done"]} == ran.keys() and all(records[name]["seconds"] > 0 for name in records)
    assert records["bad"]["error"] == "stub.py: error: no luck"
    assert "bad: FAILED: stub.py: error: no luck" in capsys.readouterr().out


def test_students_of_no_teacher(tmp_path):
    commands, folders = stub_runs(tmp_path, teacher="fail", student="5 --teacher")
    scoreboard.train(dict(teacher=1, student=1), commands, folders, 2, types.SimpleNamespace(number=0))
    assert scoreboard.read_record(folders["student"])["error"] == "its teacher was not trained" and not (tmp_path / "order.txt").exists()


def test_a_stopped_training_goes_on(tmp_path):
    """Told to stop, it saves, is neither done nor failed, and what waits is not begun; the next call ends it, and adds up its time."""
    commands, folders = stub_runs(tmp_path, first="40", slow="40", second="5")
    stop = types.SimpleNamespace(number=0)

    def signal():
        while not all((folders[name] / "begun").exists() for name in ("first", "slow")):
            time.sleep(0.05)
        time.sleep(0.2)
        stop.number = 15

    threading.Thread(target=signal).start()
    scoreboard.train(dict(first=3, slow=2, second=1), commands, folders, 2, stop)
    record, step = scoreboard.read_record(folders["first"]), int((folders["first"] / "last.pt").read_text())
    assert 0 < step < 40 and not record["done"] and record["error"] is None and not folders["second"].exists()
    scoreboard.train(dict(first=3, slow=2, second=1), commands, folders, 2, types.SimpleNamespace(number=0))
    ended = [(name, step) for name, _, _, step in map(json.loads, (tmp_path / "order.txt").read_text().splitlines())]
    assert ended[0] == ("first", step) and {("first", 40), ("slow", 40), ("second", 5)} == set(ended[2:])
    after = scoreboard.read_record(folders["first"])
    assert after["done"] and after["seconds"] > record["seconds"] > 0


# ---- what it says

def row(calls, distance, w=0.0, how="", share=0.9):
    return [calls, how, w, 100, share, distance, 50.0]


def test_expectations():
    rows = {"cd": [row(1, 1.0), row(2, 0.5), row(4, 0.6)], "ct": [row(1, 3.0), row(2, 2.0), row(4, 0.5)], "ict": [row(1, 4.0), row(2, 3.0)],
            "ctm": [row(1, 1.0, how="one jump"), row(2, 0.9, how="gamma 0"), row(4, 0.8, how="gamma 0"), row(2, 1.5, how="gamma 1")],
            "teacher": [row(35, 1.0), row(70, 4.0, 1.0)],
            "guided-d": [row(4, 9.0, how="stage 1, DDIM"), row(4, 1.05, how="DDIM", share=0.89), row(4, 4.5, 1.0, "DDIM", 0.85)]}
    lines = scoreboard.expectations(rows)
    found = [line.split("**")[1] if "**" in line else line.split(": ")[-1] for line in lines]
    assert found == ["holds in part", "holds in part", "holds", "does not hold", "*not measured*.", "holds in part"]
    assert "NFE 1 1.000 < 3.000" in lines[0] and "NFE 4 0.600 ≥ 0.500" in lines[0]
    assert "CTM 1.500 ≥ 1.000" in lines[1] and "CTM, two 0.900 < 1.000; CTM, four 0.800 < 0.900" in lines[2]
    assert "D, w = 0, short by 0.010 < 0.020; D, w = 1, short by 0.050 ≥ 0.020" in lines[5] and "S" not in lines[5].split("(")[1]


def test_conclusions():
    curves = {"cd-l1": {5: 9.0, 10: 3.0}, "cd-heun-18": {10: 1.0}, "cd-heun-9": {10: 2.0}, "cd-heun-72": {10: 0.9}, "cd-euler-18": {10: 1.5},
              "ct-adaptive": {5: 9.0, 10: 2.0}, "ct-fixed-10": {3: 9.5, 5: 7.0, 10: 6.0}, "ct-fixed-150": {5: 8.0, 10: 7.0}}
    lines = scoreboard.conclusions(curves)
    found = [line.split("**")[1] if "**" in line else "" for line in lines]
    assert found == ["", "holds", "holds in part", "holds", "does not hold", "holds"]
    assert "l1: 3.000. Huber: 1.000." in lines[0] and "7.000 < 8.000" in lines[3] and "7.000 ≥ 6.000" in lines[4]


# ---- all of it, tiny

def test_scoreboard(tmp_path, monkeypatch, capsys):
    """A table with a row for each way to draw and a line for what failed; the same again trains and measures nothing."""
    monkeypatch.setattr(bench.train_classifier, "__defaults__", (20, 64))
    monkeypatch.setattr(bench, "load_glyphs", lambda n, seed, size, real=bench.load_glyphs: real(n // 100, seed, size))
    monkeypatch.setattr(common, "StopSignal", lambda: types.SimpleNamespace(number=0))
    args = ["--total-steps", 10, "--ablation-steps", 5, "--n", 20, *NET, "--only", "ct", "ict", "ct-fixed-10", "--work", tmp_path / "work",
            "--results", tmp_path / "results"]
    work = tmp_path / "work" / "glyphs"
    (work / "ict").mkdir(parents=True)
    (work / "ict" / "last.pt").write_text("no checkpoint")

    def call():
        with pytest.raises(SystemExit) as end:
            bench.quality(arguments(*args))
        return end.value.code, (tmp_path / "results" / "quality_glyphs.md").read_text()

    code, text = call()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert code == 1 and [line[:2] for line in lines[1:4]] == [["CT", "1"], ["CT", "2"], ["CT", "4"]] and len(lines) == 5
    assert lines[4][0] == "iCT" and lines[4][1].startswith("failed: ct.py: error: ") and "last.pt is no checkpoint" in lines[4][1]
    assert {len(line) for line in lines} == {9} and all(line[-1] == "10" for line in lines[1:4])
    assert "Two steps are better than one" in text and "Figure 3" in text
    rows = json.loads((work / "ct-fixed-10" / "result.json").read_text())["rows"]
    steps = [values[3] for values in rows.values()]  # the curve, of checkpoints that it looks for ten times a second
    assert steps == sorted(set(steps)) and len(steps) > 1 and steps[-1] == 5
    kept = {path: path.stat().st_mtime_ns for name in ("ct", "ct-fixed-10") for path in (work / name).rglob("*")}
    capsys.readouterr()

    monkeypatch.setattr(bench, "make_judge", None)  # nothing is left to measure
    assert call() == (code, text)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    said = capsys.readouterr().out
    assert "ict: FAILED" in said and "ct: trained" not in said


def test_mistakes(tmp_path):
    for words, message in ((["--ckpt", "a.pt", "--jobs", "2"], "--jobs does not apply with --ckpt"), (["--mid", "2"], "--mid goes with --ckpt"),
                           (["--dataset", "cifar10"], "--dataset cifar10 does not exist"),
                           (["--only", "cdd"], "--only cdd: there is no such training; there are teacher, pd, ")):
        with pytest.raises(common.UserError, match=message):
            bench.quality(arguments(*words))
    done = run_script("quality", "--ckpt", "a.pt", "--jobs", "2", script="tests/bench.py", cwd=ROOT, code=2)
    assert done.stderr == "bench.py: error: --jobs does not apply with --ckpt\n"
