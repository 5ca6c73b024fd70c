"""The benchmark measures, searches, trains in order and reports as it says. No test of quality."""
import functools
import itertools
import json
import math
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import bench
import judge
import numpy as np
import pytest
import scoreboard
import torch
from PIL import Image
from util import ROOT, VECTORS, close, fill, gaussian_denoiser, gaussian_flow, run_script

import common
import guided_distill

NET = ["--net", "glyphs", "base=32", "mult=1,1", "blocks=1"]
MODULES = {f"{module.__name__}.py": module
           for module in (bench.cd, bench.ct, bench.ctm, guided_distill)}
TRAININGS = scoreboard.METHODS | scoreboard.ABLATIONS


def arguments(*words):
    return bench.make_parser().parse_args(["quality", *map(str, words)])


def settings_of(name, args, teacher="t.pt"):
    """The flags of a training of the scoreboard, and the settings that they make."""
    method = TRAININGS[name]
    words = scoreboard.command(method, args, teacher, "folder", args.seed)[2:]
    module = MODULES[method.script]
    flags = vars(module.make_parser().parse_args(words))
    return flags, scoreboard.merged(module, flags)


# ---- measuring

class Reader(torch.nn.Module):
    """Reads the brightness of an image as 0 to 8, a 9 as 8."""
    features = staticmethod(lambda x: x.flatten(1))

    def forward(self, x):
        return -(x.mean((1, 2, 3))[:, None] * 20 - torch.arange(9)).abs()


def test_score_draws_each_image_once():
    """Frechet distance of a set and itself moved by c: |c|^2. 260 images: two batches, seeded and
    labelled as if they were one."""
    y = torch.arange(260) % 10
    noise = common.SeededNoise(torch.arange(260), 3)(torch.zeros(260, 3, 2, 2))
    labels, noises = [], []

    def images(y, noise):
        return (noise / 100 + y[:, None, None, None] / 20).clamp(-1, 1)

    def draw(y, noise, shape):
        labels.append(y)
        noises.append(noise(torch.zeros(shape)))
        return images(y, noises[-1])
    net = types.SimpleNamespace(image_size=2, classes=10)
    real = images(y, noise) + 0.5
    found = judge.score(judge.Judge(Reader(), real, real[:8] + 0.01, ""), net, draw, 260, 3)
    assert [len(part) for part in labels] == [250, 10] and torch.equal(torch.cat(labels), y)
    assert torch.equal(torch.cat(noises), noise)
    assert found.read == pytest.approx(0.9)
    assert found.distance == pytest.approx(12 * 0.25, abs=1e-4)
    assert found.rate > 0


def test_augmented_images_are_shifted_and_mirrored():
    """Each is its image, or the mirrored one, a few pixels aside: its middle is a piece of it."""
    torch.manual_seed(0)
    x = torch.rand(40, 3, 12, 12)
    moved, seen = judge.augmented(x, 2), set()
    for image, before in zip(moved, x, strict=True):
        ways = set()
        for mirrored in (False, True):
            source = before.flip(2) if mirrored else before
            padded = torch.nn.functional.pad(source, (2, 2, 2, 2), mode="reflect")
            ways |= {(mirrored, down, right) for down in range(5) for right in range(5)
                     if torch.equal(image, padded[:, down:down + 12, right:right + 12])}
        assert len(ways) == 1
        seen |= ways
    assert len(seen) > 20 and {mirrored for mirrored, _, _ in seen} == {False, True}


# ---- time points

@pytest.mark.parametrize("case", VECTORS["ternary_search"])
def test_ternary_search_vectors(case):
    best, _, low, high = (int(word) if word.isdigit() else word for word in case.split("_")[2:])
    seen, wanted = [], VECTORS["ternary_search"][case]
    result = bench.ternary_search(lambda i: seen.append(i) or (i - best) ** 2, low, high)
    assert result == wanted["result"] and seen == wanted["unique_evaluations_in_order"]


def test_ternary_search_finds_every_minimum():
    """The ends, too, and in ranges too narrow to be split: openai's search returns a neighbour
    there, or fails."""
    for low in (0, 7):
        for width in (0, 1, 2, 3, 4, 5, 12, 39):
            for best in range(low, low + width + 1):
                assert bench.ternary_search(lambda i: abs(i - best), low, low + width) == best


def test_ternary_search_of_random_valleys():
    rng = np.random.default_rng(0)
    for _ in range(300):
        width = int(rng.integers(0, 300))
        best = int(rng.integers(0, width + 1))
        left = rng.exponential(size=best).cumsum()[::-1]
        values = [*left, -1.0, *rng.exponential(size=width - best).cumsum()]
        seen = []
        assert bench.ternary_search(lambda i: seen.append(i) or values[i], 0, width) == best
        assert len(seen) == len(set(seen)) <= 2 * math.log(max(width, 1), 1.5) + 3


def test_search_is_greedy_from_the_largest_level_down():
    """The m-th level is best at goals[m], whatever the others are."""
    goals, seen = [80.0, 9.0, 1.0, 0.05], []
    grid = common.karras_times(40).flip(0)

    def score(sigmas):
        seen.append(sigmas)
        return abs(math.log(sigmas[-1] / goals[len(sigmas) - 1]))
    levels = bench.search_times(score, 4, 40)
    close(levels, [grid[(grid / goal).log().abs().argmin()] for goal in goals])
    assert levels[0] == 80 and all(isinstance(t, float) for t in levels)
    for *before, level in seen:
        assert before == levels[:len(before)]
        assert common.T_MIN <= level <= before[-1] * (1 + 1e-6)
    lengths = [len(sigmas) for sigmas in seen]
    assert lengths == sorted(lengths)
    assert bench.search_times(score, 1, 40) == [80]
    close(bench.search_times(lambda sigmas: sigmas[-1], 2, 40), [80, common.T_MIN])


def test_published_time_points_are_found_where_the_score_is_best():
    for row in VECTORS["time_points"]:
        if 0 < row["index"] < row["steps"] - 1:
            grid = common.karras_times(row["steps"]).flip(0).tolist()
            levels = bench.search_times(
                lambda sigmas: abs(grid.index(sigmas[1]) - row["index"]), 2, row["steps"])
            close(levels, [80, row["sigma"]], 2e-6)


# ---- what is trained

@pytest.mark.parametrize("K", [10, 24, 778, 2000])
def test_rounds_take_the_budget(K):
    for name in ("pd", "guided-d", "guided-s"):
        flags, _ = settings_of(name, arguments("--total-steps", K))
        settings = guided_distill.recipe(flags) | flags
        rounds = guided_distill.plan(settings)
        assert settings["total_steps"] == K and min(steps for _, steps in rounds) >= 1
        assert {1, 2, 4} <= {N for N, _ in rounds} and rounds[0][0] == {"pd": 8}.get(name, 0)


@pytest.mark.parametrize("name", TRAININGS)
def test_every_command_is_one(name):
    """Its script takes the flags; and of a path it has the settings that it has for glyphs, data
    and net apart."""
    settings = []
    budget = "--jobs 1 --seed 7 --total-steps 30 --teacher-steps 40 --ablation-steps 20".split()
    for more in ([], ["--dataset", "images.zip"]):
        flags, applied = settings_of(name, arguments(*budget, *more))
        assert flags.keys() <= applied.keys()
        settings.append({key: value for key, value in applied.items() if key not in
                         ("dataset", "flip", "net", "start_N", "sigmas", "micro_batch")})
    steps = 20 if name in scoreboard.ABLATIONS else 40 if name == "teacher" else 30
    wanted = dict(total_steps=steps, batch_size=32, seed=7, out_dir="folder")
    assert settings[0] == settings[1] and wanted.items() <= settings[0].items()
    assert settings[0].get("teacher") in ("t.pt", "none", None)


@pytest.fixture
def recipes(monkeypatch):
    """Recipes of mnist with noise levels such as nothing else has."""
    own = dict(sigmas=[80.0, 2.5])
    for recipes in (bench.cd.STUDENTS, bench.ct.DATASETS):
        before = recipes["glyphs"] | common.DATASETS["mnist"]
        monkeypatch.setitem(recipes, "mnist", before | own)
    monkeypatch.setitem(bench.ct.RECIPES, "mnist", bench.ct.RECIPES["glyphs"])
    monkeypatch.setitem(bench.cd.SCM_STUDENTS, "mnist", dict(sigmas=[80.0, 0.7, 0.1]))


@pytest.mark.parametrize("name", TRAININGS)
def test_mnist_has_recipes_of_its_own(name):
    """Its commands say no more than those of glyphs, the data apart."""
    more = ["--dataset", "mnist", "--data-dir", "/data/train.npz"]
    words = {}
    for dataset, flags in (("glyphs", []), ("mnist", more)):
        args = arguments("--jobs", 2, *flags)
        words[dataset] = scoreboard.command(TRAININGS[name], args, "t.pt", "folder", 3)
    place = words["glyphs"].index("--seed")
    before, after = words["glyphs"][:place], words["glyphs"][place:]
    assert words["mnist"] == [*before, *more, "--workers", "0", *after]
    assert after[:2] == ["--seed", "3"]


def test_two_steps_are_from_the_noise_levels_of_the_recipe(recipes):
    args = arguments("--dataset", "mnist", "--jobs", 1)
    for name, drawn in (("cd", "80, 2.5"), ("ect", "80, 2.5"), ("scd", "80, 0.7")):
        words = scoreboard.command(TRAININGS[name], args, "t.pt", "folder", 1)
        ways = scoreboard.ways_of(TRAININGS[name], words)
        assert [way.calls for way in ways] == [1, 2, 4] and ways[1].drawn == f"from {drawn}"
    ways = scoreboard.ways_of(TRAININGS["ctm"], ["python", "ctm.py"])
    assert ways is scoreboard.METHODS["ctm"].ways
    words = scoreboard.command(TRAININGS["cd"], arguments("--jobs", 1), "t.pt", "folder", 1)
    assert scoreboard.ways_of(TRAININGS["cd"], words)[1].drawn == "from 80, 1.6"


@pytest.mark.parametrize("name", ["ct", "ict", "sct-scratch", "ect"])
def test_four_steps_from_scratch_are_from_levels_that_were_learned(name):
    args = arguments("--dataset", "mnist", "--jobs", 1)
    words = scoreboard.command(TRAININGS[name], args, "t.pt", "folder", 1)
    _, _, four = scoreboard.ways_of(TRAININGS[name], words)
    # of 11 levels in its recipe; of 21 in CT's, which hold the five; the others know all
    further = "24.4, 2.52, 0.318" if name == "ict" else "17.5, 2.52, 0.17"
    assert four.drawn == f"from 80, {further}"


def test_a_further_teacher_is_measured_in_a_few_ways():
    teacher = scoreboard.METHODS["teacher"]
    again = scoreboard.ways_of(teacher, [], again=True)
    assert [(way.calls, way.w) for way in again] == [(35, 0), (4, 0), (2, 0), (1, 0)]
    assert scoreboard.ways_of(teacher, []) is scoreboard.TEACHER


@pytest.mark.parametrize("dataset", common.DIGITS)
def test_what_is_compared_differs_in_one_setting(dataset):
    args = arguments("--dataset", dataset, "--jobs", 1)
    for name, other, wanted in (
            ("cd-l1", "cd-heun-18", "dist"), ("cd-l2", "cd-heun-18", "dist"),
            ("cd-free", "cd-heun-18", "parametrisation"), ("cd-heun-9", "cd-heun-18", "N"),
            ("cd-heun-9", "cd-euler-9", "solver"), ("ct-free", "ct-adaptive", "parametrisation")):
        (_, one), (_, two) = (settings_of(training, args) for training in (name, other))
        assert [key for key in one | two if one.get(key) != two.get(key)] == [wanted]


def test_measurements_of_other_images_are_others():
    """Though the files have the same name."""
    found = {scoreboard.measures(arguments("--dataset", path)) for path in ("a/x.npz", "b/x.npz")}
    args = arguments("--dataset", "mnist", "--data-dir", "a/x.npz")
    assert len(found) == 2 and scoreboard.measures(args) in found


def test_fixed_N_and_mu():
    """N levels all along, and the mu that the adaptive schedule has where it has N levels:
    exp(2 ln 0.9 / N), within a part in 10,000."""
    for N in (10, 40, 150):
        _, settings = settings_of(f"ct-fixed-{N}", arguments(), "")
        s0, s1, schedule = settings["s0"], settings["s1"], settings["schedule"]
        for k in (0, 500, 999):
            assert bench.ct.num_points(k, 1000, s0, s1, schedule) == N
        mu = bench.ct.target_decay(N, s0, settings["mu0"])
        assert mu == pytest.approx(0.9 ** (2 / N), rel=1e-4)


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
ON = types.SimpleNamespace(number=0)  # nothing has asked to stop


def stub_runs(folder, **whats):
    (folder / "stub.py").write_text(STUB)
    start = [sys.executable, str(folder / "stub.py")]
    folders = {name: folder / name for name in whats}
    commands = {name: [*start, str(folders[name]), *what.split()] for name, what in whats.items()}
    return commands, folders


def order(folder):
    """[name, began, ended, step] of each run of a stub, as they ended."""
    return [json.loads(line) for line in (folder / "order.txt").read_text().splitlines()]


def test_trainings_in_order(tmp_path, capsys, monkeypatch):
    """The teacher first, students after it, the longest first, two at once; what fails is told and
    the rest goes on."""
    commands, folders = stub_runs(
        tmp_path, teacher="40", short="5 --teacher", long="5 --teacher", bad="fail",
        scratch="9 --teacher none", other="5")
    begun, start = [], subprocess.Popen

    def noted(words, **more):
        begun.append(Path(words[2]).name)
        return start(words, **more)
    monkeypatch.setattr(subprocess, "Popen", noted)
    costs = dict(teacher=1, short=1, long=5, bad=2, scratch=3, other=2.5)
    scoreboard.train(costs, commands, folders, 2, ON)
    ran = {name: (began, ended) for name, began, ended, _ in order(tmp_path)}
    assert ran.keys() == {"teacher", "short", "long", "scratch", "other"}
    assert begun[:2] == ["teacher", "scratch"] and ran["scratch"][0] < ran["teacher"][1]
    assert ran["teacher"][1] < min(ran["long"][0], ran["short"][0])
    assert begun.index("other") < begun.index("bad") and begun.index("long") < begun.index("short")
    for began, _ in ran.values():
        assert sum(a <= began < b for a, b in ran.values()) <= 2
    records = {name: scoreboard.read_record(folders[name]) for name in folders}
    assert {name for name in records if records[name]["done"]} == ran.keys()
    assert all(record["seconds"] > 0 for record in records.values())
    assert records["bad"]["error"] == "stub.py: error: no luck"
    assert "bad: FAILED: stub.py: error: no luck" in capsys.readouterr().out


def test_each_seed_has_its_own_teacher(tmp_path):
    """Seed 1 is trained first; of seed 9 only what needs its own teacher, which fails, is not."""
    (tmp_path / "seed9").mkdir()
    names = "teacher", "cd", "seed9/teacher", "seed9/cd", "seed9/ct", "seed10/teacher", "seed10/cd"
    whats = dict.fromkeys(names, "3 --teacher") | {
        "teacher": "20", "seed9/teacher": "fail", "seed9/ct": "3", "seed10/teacher": "3"}
    commands, folders = stub_runs(tmp_path, **whats)
    scoreboard.train(dict.fromkeys(whats, 1), commands, folders, 1, ON)
    ended = [Path(name).name for name, *_ in order(tmp_path)]
    records = {name: scoreboard.read_record(folders[name]) for name in folders}
    assert ended == ["teacher", "cd"]
    assert [name for name, *_ in order(tmp_path / "seed9")] == ["ct"]
    assert [name for name, *_ in order(tmp_path / "seed10")] == ["teacher", "cd"]
    assert records["seed9/cd"]["error"] == "its teacher was not trained"
    last = {place: order(tmp_path / place)[-1][2] for place in ("", "seed9")}
    assert last[""] < order(tmp_path / "seed9")[0][1]
    assert last["seed9"] < order(tmp_path / "seed10")[0][1]
    assert records["cd"]["date"] == time.strftime("%Y-%m-%d")


def test_commit(tmp_path, monkeypatch):
    """Of a repository with a change that is not committed; of none."""
    monkeypatch.setattr(scoreboard, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert scoreboard.commit() == ""
    (tmp_path / "a").touch()
    me = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init"], ["add", "a"], [*me, "commit", "-m", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
    clean = scoreboard.commit()
    assert len(clean) >= 7 and int(clean, 16)
    (tmp_path / "a").write_text("changed")
    assert scoreboard.commit() == f"{clean}-dirty"


def test_students_of_no_teacher(tmp_path):
    commands, folders = stub_runs(tmp_path, teacher="fail", student="5 --teacher")
    scoreboard.train(dict(teacher=1, student=1), commands, folders, 2, ON)
    record = scoreboard.read_record(folders["student"])
    assert record["error"] == "its teacher was not trained"
    assert not (tmp_path / "order.txt").exists()


def test_a_stopped_training_goes_on(tmp_path):
    """Told to stop, it saves, is neither done nor failed, and what waits is not begun; the next
    call ends it, and adds up its time."""
    commands, folders = stub_runs(tmp_path, first="40", slow="40", second="5")
    stop, costs = types.SimpleNamespace(number=0), dict(first=3, slow=2, second=1)

    def signal():
        while not all((folders[name] / "begun").exists() for name in ("first", "slow")):
            time.sleep(0.05)
        time.sleep(0.2)
        stop.number = 15
    threading.Thread(target=signal).start()
    scoreboard.train(costs, commands, folders, 2, stop)
    record = scoreboard.read_record(folders["first"])
    step = int((folders["first"] / "last.pt").read_text())
    assert 0 < step < 40 and not record["done"] and record["error"] is None
    assert not folders["second"].exists()
    scoreboard.train(costs, commands, folders, 2, ON)
    ended = [(name, step) for name, _, _, step in order(tmp_path)]
    assert ended[0] == ("first", step)
    assert set(ended[2:]) == {("first", 40), ("slow", 40), ("second", 5)}
    after = scoreboard.read_record(folders["first"])
    assert after["done"] and after["seconds"] > record["seconds"] > 0


# ---- what it says

def row(calls, distance, w=0.0, drawn="", share=0.9):
    return scoreboard.Row(calls, drawn, w, 100, share, distance, 0.8, 0.7, 0.2, 0.03, 50.0)


def test_mean_and_range_of_seeds():
    rows = [row(1, 0.5, share=0.958), row(1, 0.47, share=0.969), row(1, 0.58, share=0.962)]
    assert scoreboard.cell("distance", rows) == "0.52 (0.47 to 0.58)"
    assert scoreboard.cell("read", rows) == "96.3 (95.8 to 96.9)%"
    assert scoreboard.cell("read", rows[:1]) == "95.8%" and scoreboard.cell("rate", rows) == "50"
    nothing = [row(1, math.nan), row(1, math.nan)]
    assert scoreboard.cell("distance", nothing) == "–"
    mean = scoreboard.mean_of(rows)
    assert mean[:4] == rows[0][:4] and mean.distance == pytest.approx(1.55 / 3)
    assert mean.copied == pytest.approx(0.03)


def test_table_of_several_seeds():
    """Minutes are means over the seeds that were trained; what failed is told beside the rest."""
    done = dict(done=True, seconds=120.0)
    failed = dict(done=False, seconds=600.0, error="no | luck")
    rows = {"teacher": [(row(35, 1.0), row(35, 3.0))], "cd": [(row(1, 4.0),)], "ct": []}
    records = {"teacher": [done, done | dict(seconds=240.0)], "cd": [done, failed],
               "ct": [dict(done=False, seconds=0.0)]}
    yardstick = [row(0, 0.1), row(0, math.nan)]
    heads, _, *lines = scoreboard.table(rows, yardstick, records)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in [heads, *lines]]
    assert {len(line) for line in cells} == {13} and len(cells) == 7
    assert cells[1][:6] == ["*training images*", "–", "–", "–", "90.0%", "0.10"]
    assert cells[2][5] == "–" and cells[2][8] == "0.200"
    assert cells[3][5] == "2.00 (1.00 to 3.00)" and cells[3][11:] == ["3.0", "100"]
    assert cells[4][:2] == ["CD", "failed: no / luck"]
    assert cells[5][5] == "4.00" and cells[5][11] == "2.0 + 3.0"
    assert cells[6][:2] == ["CT", "failed: not trained"]


def test_memorised():
    rows = {"cd": [row(1, 1.0), row(2, 1.0)._replace(nearest=0.1, copied=0.02)],
            "ct": [row(4, 1.0)._replace(nearest=0.3, copied=0.4)]}
    [line] = scoreboard.memorised(rows, row(0, 0.0)._replace(nearest=0.15))
    assert "CD, NFE 2, , w = 0: 0.100, where held-out images have 0.150." in line
    assert "CT, NFE 4, , w = 0: 40.0%" in line
    assert scoreboard.memorised(rows, row(0, 0.0)._replace(nearest=math.nan)) == []


def verdicts(lines):
    return [line.split("**")[1] if "**" in line else "" for line in lines]


def test_expectations():
    rows = {
        "cd": [row(1, 1.0), row(2, 0.5), row(4, 0.6)],
        "ct": [row(1, 3.0), row(2, 2.0), row(4, 0.5)],
        "ict": [row(1, 4.0), row(2, 3.0)],
        "ctm": [row(1, 1.0, 0.0, "one jump"), row(2, 0.7, 0.0, "gamma 0.3"),
                row(2, 0.9, 0.0, "gamma 0"), row(4, 0.85, 0.0, "gamma 0.3"),
                row(4, 0.8, 0.0, "gamma 0"), row(2, 1.5, 0.0, "gamma 1"),
                row(4, 0.75, 0.0, "gamma 1"), row(35, 0.6, 0.0, "18 Heun steps on g")],
        "ctm-global": [row(1, 1.1, 0.0, "one jump"), row(2, 0.8, 0.0, "gamma 0")],
        "ctm-no-dsm": [row(4, 0.9, 0.0, "gamma 0"), row(35, 9.0, 0.0, "18 Heun steps on g")],
        "sct-scratch": [row(1, 0.1)],
        "teacher": [row(35, 9.0, 0.0, "ancestral", 0.1), row(35, 1.0, 0.0, "18 Heun steps"),
                    row(70, 4.0, 1.0, "18 Heun steps")],
        "guided-d": [row(4, 9.0, 0.0, "stage 1, DDIM"), row(4, 1.05, 0.0, "DDIM", 0.89),
                     row(4, 4.5, 1.0, "DDIM", 0.85)],
    }
    rows["teacher"] += [row(5, 6.0, 0.0, "Euler (DDIM)"), row(5, 5.0, 0.0, "DPM-Solver++(2M)"),
                        row(5, 7.0, 0.0, "DEIS, third order"), row(10, 3.0, 0.0, "Euler (DDIM)"),
                        row(9, 0.4, 0.0, "5 Heun steps"), row(9, 0.7, 0.0, "DPM-Solver-2"),
                        row(4, 0.1, 0.0, "DDIM"), row(10, 0.1, 1.0, "DPM-Solver-2")]
    lines = scoreboard.expectations(rows)
    assert verdicts(lines) == ["holds in part", "holds in part", "holds", "does not hold", "",
                               "holds in part", "holds in part", "", "holds", "holds in part",
                               "holds in part", "holds in part"]
    assert ("(NFE 5, DPM-Solver++(2M) 5.000 < 6.000; NFE 5, DEIS, third order 7.000 ≥ 6.000; "
            "NFE 10, DPM-Solver-2 0.700 < 3.000)") in lines[10]
    assert ("(CD, NFE 1, beside DPM-Solver++(2M), 5 1.000 < 5.000; CD, NFE 2, beside DPM-Solver++"
            "(2M), 5 0.500 < 5.000; CD, NFE 1, beside 5 Heun steps, 10 1.000 ≥ 0.400; CD, NFE 2, "
            "beside 5 Heun steps, 10 0.500 ≥ 0.400)") in lines[11]
    assert lines[4].endswith(": *not measured*.")
    assert "NFE 1 1.000 < 3.000" in lines[0] and "NFE 4 0.600 ≥ 0.500" in lines[0]
    assert "CTM 1.500 ≥ 1.000" in lines[1]
    assert "CTM, two 0.900 < 1.000; CTM, four 0.800 < 0.900" in lines[2]
    assert ("D, w = 0, short by 0.010 < 0.020; D, w = 1, short by 0.050 ≥ 0.020" in lines[5]
            and "S" not in lines[5].split("(")[1])
    assert "(NFE 1 1.000 < 1.100; NFE 2 0.900 ≥ 0.800)" in lines[6]
    assert "(NFE 4 0.800 < 0.900; Heun on g 0.600 < 9.000)" in lines[8]
    assert "(CTM beside gamma 0.3 0.800 < 0.850; CTM beside gamma 1 0.800 ≥ 0.750)" in lines[9]


def test_ways_of_ctm_take_the_calls_they_say(tmp_path):
    """And those with other noise are others."""
    model_args = common.net_settings(NET[1:]) | dict(classes=10, dropout=0.0, cond=True)
    state = fill(common.UNet(**model_args)).state_dict()
    torch.save(dict(script="ctm", args={}, model_args=model_args, ema=state), tmp_path / "last.pt")
    run = types.SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, main=False,
                                checkpointing=False)
    ways = scoreboard.METHODS["ctm-no-dsm"].ways
    assert ways == scoreboard.METHODS["ctm"].ways
    drawn = []
    for way in ways:
        net, draw = way.open(tmp_path / "last.pt", run)
        calls = []
        net.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        noise = common.SeededNoise(torch.arange(2), 0)
        drawn.append(draw(torch.tensor([3, 4]), noise, (2, 3, 16, 16)))
        assert len(calls) == way.calls
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_curves_of_a_teacher():
    """Heun's, and the best of the fast solvers, whichever that is at so many calls."""
    rows = [row(35, 1.0, 0.0, "18 Heun steps"), row(9, 2.0, 0.0, "5 Heun steps"),
            row(10, 3.0, 0.0, "DPM-Solver++(2M)", 0.7), row(10, 4.0, 0.0, "Euler (DDIM)", 0.8),
            row(5, 8.0, 0.0, "DPM-Solver-2", 0.5), row(10, 0.1, 1.0, "DEIS, third order"),
            row(4, 9.0, 0.0, "DDIM", 0.4), row(35, 1.5, 0.0, "ancestral")]
    curves = scoreboard.curves_of(rows, "distance", min)
    assert {kind: list(curve.items()) for kind, curve in curves.items()} == {
        "": [(4, 9.0)], "Heun": [(9, 2.0), (35, 1.0)], "ancestral": [(35, 1.5)],
        "best of the fast solvers": [(5, 8.0), (10, 3.0)]}
    shares = scoreboard.curves_of(rows, "read", max)
    assert shares["best of the fast solvers"] == {5: 0.5, 10: 0.8}


def test_solvers_of_a_teacher(monkeypatch):
    """Each asks the network as often as it says, and draws its own samples."""
    asked, samples = [], []

    def D(x, t, y):
        asked.append(t[0].item())
        return x * 0.25 / (common.bcast(t, x) ** 2 + 0.25)

    monkeypatch.setattr(common, "load_network", lambda *_: (torch.nn.Linear(1, 1), None))
    monkeypatch.setattr(common, "place", lambda net, run: net)
    monkeypatch.setattr(common, "net_denoiser", lambda net: D)
    ways = [way for way in scoreboard.TEACHER if way.drawn != "DDIM"]
    for way in ways:
        asked.clear()
        noise = common.SeededNoise(torch.arange(2), 0)
        samples.append(way.open("x.pt", None)[1](None, noise, (2, 3, 4, 4)))
        assert len(asked) == way.calls and asked[0] > 79 and asked[-1] < 0.003
    unguided = [x for x, way in zip(samples, ways) if way.w == 0]
    assert min((a - b).abs().max() for a, b in itertools.combinations(unguided, 2)) > 1e-3
    assert [(way.calls, way.drawn) for way in ways if "Heun" in way.drawn] == [
        (35, "18 Heun steps"), (70, "18 Heun steps"), (11, "6 Heun steps"), (9, "5 Heun steps"),
        (5, "3 Heun steps")]
    assert sorted(way.calls for way in ways if "Heun" not in way.drawn) == sorted(
        3 * [5, 8, 10, 12] + [5, 9, 11] + [10, 35])


def test_conclusions():
    lines = scoreboard.conclusions({
        "cd-l1": {5: 9.0, 10: 3.0}, "cd-heun-18": {10: 1.0}, "cd-heun-9": {10: 2.0},
        "cd-heun-72": {10: 0.9}, "cd-euler-18": {10: 1.5}, "ct-adaptive": {5: 9.0, 10: 2.0},
        "ct-fixed-10": {3: 9.5, 5: 7.0, 10: 6.0}, "ct-fixed-150": {5: 8.0, 10: 7.0},
        "cd-free": {5: 30.0, 10: 1.25}})
    assert verdicts(lines) == ["", "holds", "holds in part", "holds", "does not hold", "holds",
                               "holds"]
    assert lines[6].endswith("(CD 1.000 < 1.250). CD with Eq. 4: 30.000 after 5 steps, 1.250 after "
                             "10.")
    assert "l1: 3.000. Huber: 1.000." in lines[0]
    assert "7.000 < 8.000" in lines[3] and "7.000 ≥ 6.000" in lines[4]


# ---- all of it, tiny

def test_scoreboard(tmp_path, monkeypatch, capsys):
    """A table with a row for each way to draw and a line for what failed; the same again trains
    and measures nothing."""
    load_glyphs = judge.load_glyphs
    monkeypatch.setattr(judge.train_classifier, "__defaults__", (20, 64))
    monkeypatch.setattr(judge, "load_glyphs",
                        lambda n, seed, size: load_glyphs(n // 100, seed, size))
    monkeypatch.setattr(common, "StopSignal", lambda: ON)
    args = ["--total-steps", 10, "--ablation-steps", 5, "--n", 20, *NET, "--only", "ct", "ict",
            "ct-fixed-10", "--work", tmp_path / "work", "--results", tmp_path / "results"]
    work = tmp_path / "work" / "glyphs"
    (work / "ict").mkdir(parents=True)
    (work / "ict" / "last.pt").write_text("no checkpoint")

    def call():
        with pytest.raises(SystemExit) as end:
            bench.quality(arguments(*args))
        return end.value.code, (tmp_path / "results" / "quality_glyphs.md").read_text()
    code, text = call()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in text.splitlines() if line.startswith("| ")]
    assert code == 1 and len(rows) == 7 and {len(cells) for cells in rows} == {13}
    assert [cells[0] for cells in rows[1:3]] == ["*training images*", "*held-out images*"]
    assert [cells[:2] for cells in rows[3:6]] == [["CT", "1"], ["CT", "2"], ["CT", "4"]]
    assert all(cells[-1] == "10" for cells in rows[3:6])
    assert rows[6][0] == "iCT" and rows[6][1].startswith("failed: ct.py: error: ")
    assert "last.pt is no checkpoint" in rows[6][1]
    assert "Two steps are better than one" in text and "Figure 3" in text
    curve = json.loads((work / "ct-fixed-10" / "result.json").read_text())["rows"]
    steps = [values[3] for values in curve.values()]  # it looks for a checkpoint every 0.1 s
    assert steps == sorted(set(steps)) and len(steps) > 1 and steps[-1] == 5
    kept = {path: path.stat().st_mtime_ns
            for name in ("ct", "ct-fixed-10") for path in (work / name).rglob("*")}
    capsys.readouterr()

    monkeypatch.setattr(judge, "make_judge", None)  # nothing is left to measure
    assert call() == (code, text)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    said = capsys.readouterr().out
    assert "ict: FAILED" in said and "ct: trained" not in said


@pytest.fixture
def quick_judge(monkeypatch):
    monkeypatch.setattr(judge.train_classifier, "__defaults__", (20, 64))
    monkeypatch.setattr(judge, "train_classifier", functools.partial(judge.train_classifier))
    make = judge.make_judge
    monkeypatch.setattr(judge, "make_judge",
                        lambda *words, **more: make(*words, **more, steps=20))


def labelled_images(path, n=60, classes=3):
    """Each class is one brightness. Others for another n."""
    rng = np.random.default_rng(n)
    y = np.arange(n) % classes
    images = rng.integers(0, 60, (n, 16, 16, 3)) + 190 * y[:, None, None, None] // classes
    np.savez(path, arr_0=images.astype(np.uint8), arr_1=y)
    return images


def test_scoreboard_of_two_seeds(tmp_path, monkeypatch, capsys, quick_judge):
    """Of a path: the judge's real images were learned, so that nearest and copied mean nothing."""
    monkeypatch.setattr(common, "StopSignal", lambda: ON)
    images = labelled_images(tmp_path / "a.npz")
    work = tmp_path / "work" / "a"
    args = ["--dataset", tmp_path / "a.npz", "--total-steps", 10, "--n", 30, *NET, "--seeds", 2,
            "--only", "sct-scratch", "ct", "--seed", 4, "--work", tmp_path / "work", "--results",
            tmp_path / "results", "--batch-size", 4, "--ablation-steps", 0]

    def call():
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            bench.quality(arguments(*args))
        assert end.value.code == 0
        return capsys.readouterr().out, (tmp_path / "results" / "quality_a.md").read_text()
    said, text = call()
    assert "ct: trained" in said and "seed5/sct-scratch: trained" in said
    assert {path.parent.relative_to(work) for path in work.rglob("last.pt")} == {
        Path("ct"), Path("sct-scratch"), Path("seed5/sct-scratch")}
    seeds = [common.load_checkpoint(work / name / "last.pt")["args"]["seed"]
             for name in ("sct-scratch", "seed5/sct-scratch")]
    assert seeds == [4, 5]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in text.splitlines() if line.startswith("| ")]
    assert len(cells) == 9 and all(line[8:10] == ["–", "–"] for line in cells[1:])
    for line in cells[3:]:
        assert (" to " in line[5]) == (line[0] == "sCT from scratch")
    assert "2 runs, seeds 4 to 5, of sCT from scratch" in text and "steps of 4 images" in text
    assert "--seeds 2" in text and "--dataset a.npz" in text and str(tmp_path) not in text
    shown = np.asarray(Image.open(tmp_path / "results" / "samples_a.png"))
    assert shown.shape == (3 * 48 + 24, 3 * (3 * 48 + 12), 3)
    learned = shown[22:22 + 144, :144][::3, ::3].reshape(3, 16, 3, 16, 3).swapaxes(1, 2)
    assert (learned.reshape(9, 16, 16, 3) == images[:9]).all()
    way = scoreboard.CONSISTENCY[0]
    run = common.setup(types.SimpleNamespace(device="cpu", precision="auto", compile=False))
    sample = scoreboard.samples_of(way, work / "ct", run, 4)
    drawn = shown[22:22 + 144, 156:156 + 144][::3, ::3].reshape(3, 16, 3, 16, 3).swapaxes(1, 2)
    assert (drawn.reshape(9, 16, 16, 3) == sample).all() and sample.std() > 0

    said, again = call()
    assert again == text and "calls, w" not in said
    monkeypatch.setattr(judge, "MEASURES", judge.MEASURES + 1)
    said, again = call()
    assert said.count("calls, w") == 9 and ": trained" not in said


def test_samples_of_a_method():
    """Of a teacher its best way, of others that of fewest calls, without guidance."""
    shown = {name: scoreboard.to_be_shown(method.ways)
             for name, method in scoreboard.METHODS.items()}
    assert shown.pop("teacher").calls == 35
    assert {(way.calls, way.w) for way in shown.values()} == {(1, 0)}


@pytest.mark.parametrize("words, message", [
    ("--ckpt a.pt --jobs 2", "--jobs does not apply with --ckpt"),
    ("--mid 2", "--mid goes with --ckpt"),
    ("--dataset cifar10", "--dataset cifar10 does not exist"),
    ("--data-dir a.npz", "--data-dir goes with --dataset mnist"),
    ("--only cdd", "--only cdd: there is no such training; there are teacher, pd, ")])
def test_mistakes(words, message):
    with pytest.raises(common.UserError, match=message):
        bench.quality(arguments(*words.split()))


def test_a_mistake_ends_in_one_line():
    done = run_script("quality", "--ckpt", "a.pt", "--jobs", "2", script="tests/bench.py", cwd=ROOT,
                      code=2)
    assert done.stderr == "bench.py: error: --jobs does not apply with --ckpt\n"


def test_checkpoints_are_measured_on_what_they_were_trained_on(tmp_path, capsys, quick_judge):
    """In two steps from the noise levels of their recipe, unless --mid says another."""
    labelled_images(tmp_path / "train.npz", 100, 10)
    labelled_images(tmp_path / "held_out.npz", 50, 10)
    path = tmp_path / "last.pt"
    small_net(path, stage="distill", dataset="mnist", data_dir="gone", sigmas=[80.0, 2.5])
    more = "--ckpt", path, "--data-dir", tmp_path / "train.npz", "--n", 20
    bench.quality(arguments(*more))
    said = capsys.readouterr().out.splitlines()
    assert "of 50 held-out digits" in said[0] and len(said) == 3
    assert "last.pt, 1 call(s), [80.0]: " in said[1] and "[80.0, 2.5]: " in said[2]
    for line in said[1:]:
        assert "of 20 read as the label asked for, Frechet distance " in line
        assert ", precision 0." in line and "(of held-out images 0." in line and "copied" in line
    bench.quality(arguments(*more, "--mid", 3))
    assert "2 call(s), [80.0, 3.0]: " in capsys.readouterr().out


def test_table_of_a_guided_student_of_mnist(tmp_path, capsys, quick_judge, monkeypatch):
    labelled_images(tmp_path / "train.npz", 100, 10)
    labelled_images(tmp_path / "held_out.npz", 50, 10)
    net = small_net(tmp_path / "N0001.pt", "guided_distill", dataset="mnist", teacher="t.pt")
    student = types.SimpleNamespace(net=net, N=1, sampler="D", v=None, angle=None)
    monkeypatch.setattr(guided_distill, "open_student", lambda *_: student)
    monkeypatch.setattr(guided_distill, "draw", lambda *words: words[-2](torch.zeros(words[-1])))
    words = ["guided", "--dir", str(tmp_path), "--data-dir", str(tmp_path / "train.npz"), "--n",
             "20", "--w", "0", "--N", "1", "--stage1-N"]
    args = bench.make_parser().parse_args(words)
    args.run(args)
    said = capsys.readouterr().out.splitlines()
    assert "of 50 held-out digits" in said[0] and said[-1].startswith("| student | 1 D | ")
    share, *numbers = said[-1].split("|")[3].split(", ")
    assert share.endswith("%") and len([float(number) for number in numbers]) == 4
    args.dir = str(tmp_path / "none")
    with pytest.raises(common.UserError, match="none holds no students of guided_distill.py"):
        args.run(args)


# ---- pictures

def small_net(path, script="cd", offset=0.0, **args):
    """A checkpoint of ten classes and 16 pixels, never trained."""
    model_args = common.net_settings(NET[1:]) | dict(classes=10, dropout=0.0)
    net = fill(common.UNet(**model_args), offset)
    torch.save(dict(script=script, args=args, model_args=model_args, ema=net.state_dict()), path)
    return net.eval()


def picture(path, rows, columns, blocks=1):
    """Its tiles, blocks of (rows,columns,16,16,3), from a PNG enlarged threefold."""
    pixels = np.asarray(Image.open(path))[::3, ::3].astype(int)
    assert pixels.shape == (16 * rows, blocks * 16 * columns + 4 * (blocks - 1), 3)
    tiles = []
    for block in range(blocks):
        left = block * (16 * columns + 4)
        part = pixels[:, left:left + 16 * columns]
        tiles.append(part.reshape(rows, 16, columns, 16, 3).swapaxes(1, 2))
    return np.stack(tiles)


def pictured(x):
    """(n,3,16,16) -> (n,16,16,3), bytes."""
    return ((x.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def test_figure5(tmp_path):
    """Rows: the teacher, one step, two; each column from one initial noise, for one label."""
    teacher = small_net(tmp_path / "teacher.pt", stage="teacher")
    student = small_net(tmp_path / "student.pt", offset=0.3, stage="distill")
    run_script(*"figure5 --teacher teacher.pt --ckpt student.pt --n 12 --N 3 --mid 0.9 --seed 5 "
               "--save out.png".split(), script="tests/bench.py", cwd=tmp_path, code=0)
    y, shape = torch.arange(12) % 10, (12, 3, 16, 16)
    noise = common.SeededNoise(torch.arange(12), 5)
    z, more = noise(torch.zeros(shape)), noise(torch.zeros(shape))
    D = lambda x, t: common.denoise(teacher, x, t, y)
    f = lambda x, t: common.consistency(student, x, torch.full((12,), t), y).clamp(-1, 1)
    one = f(80 * z, 80.0)
    two = f(one + (0.9**2 - 0.002**2) ** 0.5 * more, 0.9)
    wanted = [common.heun_sample(D, 80 * z, 3), one, two]
    found = picture(tmp_path / "out.png", 3, 12)[0]
    for row, x in zip(found, wanted):
        assert np.abs(row - pictured(x)).max() <= 1 and row.std() > 5


@torch.no_grad()
def test_posterior_means_and_ends_of_their_ode(tmp_path):
    """Of nine images in three classes: the softmax of squared distances, written out; at a low
    level the image itself. The ODE ends at an image of the class, and the student is f."""
    rng = np.random.default_rng(0)
    images = np.kron(rng.integers(0, 256, (9, 4, 4, 3)), np.ones((1, 4, 4, 1))).astype(np.uint8)
    labels = np.arange(9) % 3
    np.savez(tmp_path / "nine.npz", arr_0=images, arr_1=labels)
    torch.manual_seed(0)
    model_args = common.net_settings(NET[1:]) | dict(classes=3, dropout=0.0)
    net = fill(common.UNet(**model_args)).eval()
    state = dict(script="ct", args={}, model_args=model_args, ema=net.state_dict())
    torch.save(state, tmp_path / "student.pt")
    run_script(*"posterior --dataset nine.npz --ckpt student.pt --index 4 8 --sigmas 80 9 0.05 "
               "--save out.png --seed 2".split(), script="tests/bench.py", cwd=tmp_path, code=0)
    tiles = picture(tmp_path / "out.png", 4, 3, blocks=2)
    data = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 127.5 - 1
    for index, block in zip((4, 8), tiles):
        z = common.SeededNoise(torch.tensor([index]), 2)(torch.zeros(1, 3, 16, 16))[0].double()
        x_t = torch.stack([data[index] + t * z for t in (80, 9, 0.05)])
        levels, y = torch.tensor([80, 9, 0.05]), torch.full((3,), index % 3)
        own = data[labels == index % 3]
        means = []
        for x, t in zip(x_t, levels.double()):
            squares = (x - own).square().sum((1, 2, 3))
            p = (-squares / (2 * t**2)).softmax(0)
            means.append((p.view(3, 1, 1, 1) * own).sum(0))
        f = common.consistency(net, x_t.float(), levels, y)
        shown = x_t / (1 + levels.double().view(3, 1, 1, 1))
        for row, x in ((block[0], shown), (block[1], torch.stack(means)), (block[3], f)):
            assert np.abs(row - pictured(x)).max() <= 1
        distances = np.abs(block[2][:, None] - images[labels == index % 3]).max((2, 3, 4))
        assert (distances.min(1) <= 2).all()
        for same in (block[1][2], block[2][2]):
            assert np.abs(same - images[index]).max() <= 2
        assert np.abs(block[1][0] - images[index]).mean() > 20  # at 80 it is the mean of three


def test_the_ode_of_gaussian_data_ends_where_it_should():
    """Each image from its own level: x scales with the deviation."""
    x, t = torch.randn(3, 3, 2, 2), torch.tensor([80.0, 3.0, 0.1])
    end = bench.ode_end(gaussian_denoiser(0.5), x, t, 60)
    close(end, gaussian_flow(x, t.view(3, 1, 1, 1), 0.002, 0.5), 5e-3, 1e-5)


@pytest.mark.parametrize("words, message", [
    ("figure5 --teacher student.pt --ckpt student.pt", "--teacher student.pt holds a student"),
    ("figure5 --teacher teacher.pt --ckpt teacher.pt", "--ckpt teacher.pt holds a teacher"),
    ("figure5 --teacher teacher.pt --ckpt other.pt",
     "--teacher teacher.pt has classes 10, --ckpt other.pt 3"),
    ("posterior --ckpt teacher.pt", "--ckpt teacher.pt holds a teacher"),
    ("posterior --ckpt student.pt --size 16", "--size does not apply with --ckpt"),
    ("posterior --ckpt other.pt", "--ckpt other.pt knows 3 classes, and glyphs has 10"),
    ("posterior --index 20000", "--index 20000: glyphs has 20000 images")])
def test_mistakes_of_pictures(tmp_path, words, message, monkeypatch):
    small_net(tmp_path / "teacher.pt", stage="teacher")
    small_net(tmp_path / "student.pt", stage="distill")
    model_args = common.net_settings(NET[1:]) | dict(classes=3, dropout=0.0)
    state = common.UNet(**model_args).state_dict()
    torch.save(dict(script="ct", args={}, model_args=model_args, ema=state), tmp_path / "other.pt")
    monkeypatch.chdir(tmp_path)
    args = bench.make_parser().parse_args(words.split())
    with pytest.raises(common.UserError, match=message):
        args.run(args)
