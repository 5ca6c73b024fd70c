"""--eval-every: samples are measured while training."""
import argparse
import contextlib
import functools
import json
import re
import sys
import types

import numpy as np
import pytest
import torch

import bench
import cd
import common
import judge
from test_scripts import STOP_AT_3, assert_same, records
from util import assert_mistake, last, run_script

NET = "--net glyphs base=32 mult=1 blocks=1 image_size=8 --precision fp32 --device cpu "
STEPS = "--batch-size 8 --micro-batch 4 --log-every 1 --sample-every 0 --lr 0.002 "
DATA = "--dataset data.npz --no-flip --total-steps 6 "
LIVE = "--eval-every 3 "
RUNS = {
    "cd": DATA + "--teacher-steps 4",
    "ct": DATA + "--class-cond",
    "ctm": DATA + "--teacher none --max-steps 1 --N 3",
    "guided_distill": "--dataset data.npz --no-flip --teacher ideal --stage1-steps 2 --start-N 4 "
                      "--end-N 1 --round-steps 2 --last-steps 2",
}
QUICK = """
judge = common.import_beside("judge", "")
monkeypatch.setattr(judge, "LIVE_TRAINING", dict(steps=4, batch=16))
monkeypatch.setattr(common, "LIVE_SAMPLES", 20)
"""
SAMPLES = 20
HERE = types.SimpleNamespace(rank=0, world=1, main=True, device=torch.device("cpu"),
                             dtype=torch.float32)


def pixels(n=152):
    """Images (n,8,8,3) uint8 and labels of three classes, half of them the first."""
    y = np.array([0, 1, 0, 2])[np.arange(n) % 4]
    x = np.random.default_rng(0).integers(0, 60, (n, 8, 8, 3)) + 90 * y[:, None, None, None]
    return x.clip(0, 255).astype(np.uint8), y


@pytest.fixture
def folder(tmp_path):
    np.savez(tmp_path / "data.npz", *pixels())
    return tmp_path


def run(script, flags, folder, prelude=QUICK, **more):
    return run_script(*(NET + STEPS + flags).split(), script=f"{script}.py", cwd=folder,
                      prelude=prelude, **dict(code=0) | more)


def measured(folder):
    """What the log says of samples, by step; no other line does."""
    lines = {}
    for record in records(folder):
        if "loss" in record:
            assert not record.keys() & {"distance", "read"}
        else:
            assert record["step"] not in lines
            lines[record.pop("step")] = record
    return lines


def moments(classifier, x):
    """Mean and covariance of the features of images (n,H,W,C) uint8, by numpy."""
    x = torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        features = classifier.features(x).double().numpy()
    return features.mean(0), np.cov(features.T)


def frechet(a, b):
    """With the eigenvalues of the product of the covariances, which are those of its root squared.
    Of few samples most are 0."""
    (m, S), (n, T) = a, b
    values = np.linalg.eigvals(S @ T).real.clip(0)
    return ((m - n) ** 2).sum() + np.trace(S) + np.trace(T) - 2 * np.sqrt(values).sum()


def load_classifier(path):
    state = torch.load(path, weights_only=True)
    classifier = judge.Classifier(3).eval()
    classifier.load_state_dict(state["classifier"])
    return classifier


def draw(checkpoint, y):
    """What one step draws from the noise of SeededNoise, image by image."""
    net = common.make_net(checkpoint["model_args"])
    net.load_state_dict(checkpoint["ema"])
    images = []
    for i in range(SAMPLES):
        noise = common.SeededNoise(torch.tensor([i]), checkpoint["args"]["seed"])
        label = torch.tensor([y[i]]) if net.classes else None
        x = cd.sample(net.eval(), [common.T_MAX], label, noise, (1, 3, 8, 8))
        images.append(common.to_uint8(x).numpy())
    return np.concatenate(images)


# ---- the numbers

def test_the_log_holds_what_the_samples_measure(folder):
    """Distance and share anew from the checkpoint and the data: by the teacher's judge, to the five
    sixths of the images that it was trained on, with labels as often as in the data."""
    done = run("cd", RUNS["cd"] + " --eval-every 6 --seed 2", folder)
    lines = measured(folder / "out/cd")
    assert [*lines] == [6] and [*measured(folder / "out/cd/teacher")] == [4]
    classifier = load_classifier(folder / "out/cd/teacher/judge.pt")
    assert not (folder / "out/cd/judge.pt").exists()
    x, labels = pixels()
    known = np.arange(len(x)) % 6 != 5
    y = np.array([0] * 10 + [1] * 5 + [2] * 5)
    images = draw(last(folder / "out/cd"), y)
    wanted = frechet(moments(classifier, images), moments(classifier, x[known]))
    assert lines[6]["distance"] == pytest.approx(wanted, rel=1e-4)

    def share(x, y):
        with torch.no_grad():
            found = classifier(torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1).argmax(1)
        return (found.numpy() == y).mean()
    assert lines[6]["read"] == pytest.approx(share(images, y))
    floor = frechet(moments(classifier, x[~known][np.arange(SAMPLES) * 25 // 20]),
                    moments(classifier, x[known]))
    told = re.findall(r"--eval-every measures with .*", done.stdout)
    assert told[0].startswith(f"--eval-every measures with a classifier, which reads "
                              f"{share(x[~known], labels[~known]):.1%} of 25 images unknown to it; "
                              f"the distance of 20 real ones is {floor:.3g}; made in ")
    assert told[1:] == ["--eval-every measures with out/cd/teacher/judge.pt"]
    shown = f"dist={lines[6]['distance']:.3g}, read={lines[6]['read']:.3g}"
    assert shown in done.stderr.splitlines()[-1]


def test_the_distance_of_two_gaussians():
    """(m1 - m2)^2 + (s1 - s2)^2 in each direction; no labels, no share."""
    class Channels(torch.nn.Module):
        def features(self, x):
            return x.mean((2, 3))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator).double()
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # exactly N(0, 1)
    images = (127.5 + 20 * x)[:, None, None].expand(-1, 2, 2, -1)
    mu = torch.tensor([0.1, 0.0, -0.2], dtype=torch.float64)
    live = judge.LiveJudge(Channels(), mu, 0.25 * torch.eye(3).double(), torch.device("cpu"))
    found = live.measure(images.round().numpy().astype(np.uint8), None)
    assert found == dict(distance=pytest.approx(0.05 + 3 * (20 / 127.5 - 0.5) ** 2, abs=0.005))


class Lines:
    """A log that keeps what it is given; its judge knows the images' labels by their brightness."""
    def __init__(self, labels):
        self.labels, self.judge, self.written, self.confirmed = labels, self, [], False
        self.write, self.pause = self.written.append, contextlib.nullcontext

    def measure(self, images, y):
        assert images.shape == (500, 8, 8, 3) and (images == y.numpy()[:, None, None, None]).all()
        return dict(distance=float(len(y.unique())), read=y.eq(0).double().mean().item())

    def show(self, values):
        self.shown = values

    def confirm(self):
        self.confirmed = True


@pytest.mark.parametrize("labels, distance, read", [
    ([0, 1, 0, 0] * 30, 2.0, 0.75), ([*range(200)] * 3, 200.0, 0.006), ([0, 7], 2.0, 0.5)])
def test_labels_are_drawn_as_often_as_the_data_have_them(labels, distance, read):
    log, args = Lines(np.array(labels)), argparse.Namespace(seed=0, micro_batch=64)
    common.measure_samples(args, HERE, 7, log, lambda y, noise, shape: (
        y / 127.5 - 1)[:, None, None, None].expand(shape), 1, (3, 8, 8))
    assert log.written == [dict(step=7, distance=distance, read=read)]
    assert log.shown == dict(dist=f"{distance:.3g}", read=f"{read:.3g}") and not log.confirmed


@pytest.mark.parametrize("saved", [False, True])
def test_a_run_that_ends_while_it_draws(saved):
    """What it has saved stays, unless that draws what is not finite."""
    def draw(y, noise, shape):
        if saved:
            raise KeyboardInterrupt
        return torch.full(shape, torch.nan)
    log, args = Lines(np.zeros(9, np.int64)), argparse.Namespace(seed=0, micro_batch=64)
    with pytest.raises(KeyboardInterrupt if saved else common.NotFinite):
        common.measure_samples(args, HERE, 7, log, draw, 0, (3, 8, 8))
    assert log.confirmed is saved and not log.written


@pytest.mark.parametrize("script", RUNS)
def test_a_run_is_the_same_with_and_without(folder, script):
    """Bit for bit; what is measured and when: of rounds each one's last step too."""
    run(script, RUNS[script] + " --out-dir with " + LIVE, folder)
    run(script, RUNS[script] + " --out-dir without", folder)
    assert_same(last(folder / "with"), last(folder / "without"))
    assert not (folder / "without" / "judge.pt").exists() and not measured(folder / "without")
    steps = [2, 3, 4, 6] if script == "guided_distill" else [3, 6]
    lines = measured(folder / "with")
    assert [*lines] == steps
    assert all(line["distance"] > 0 and 0 <= line["read"] <= 1 for line in lines.values())
    assert len({line["distance"] for line in lines.values()}) == len(steps)


def test_a_resumed_run_measures_with_the_same_judge(folder):
    """Its lines are those of a whole run; what a killed one wrote beyond its save is dropped."""
    flags = RUNS["ct"] + " --out-dir "
    run("ct", flags + "whole " + LIVE, folder)
    run("ct", flags + "run " + LIVE, folder, QUICK + STOP_AT_3, code=143)
    before = (folder / "run" / "judge.pt").read_bytes()
    common.append_record(folder / "run" / "log.jsonl", dict(step=4, distance=1.0))
    done = run("ct", flags + "run " + LIVE, folder,
               QUICK + "monkeypatch.setattr(judge, 'train_classifier', None)")
    assert "--eval-every measures with run/judge.pt" in done.stdout
    assert measured(folder / "run") == measured(folder / "whole")
    assert (folder / "run" / "judge.pt").read_bytes() == before


def test_it_may_begin_later_and_end(folder):
    """On resume; a run that is done needs no judge."""
    flags = DATA + "--stage teacher --N 2 --no-class-cond --out-dir run --total-steps "
    run("cd", flags + "2", folder)
    run("cd", flags + "2 " + LIVE, folder)
    assert not (folder / "run" / "judge.pt").exists()
    run("cd", flags + "4 " + LIVE, folder)
    lines = measured(folder / "run")
    assert [*lines] == [3, 4] and not any("read" in line for line in lines.values())  # no classes
    run("cd", flags + "6", folder)
    assert [*measured(folder / "run")] == [3, 4]


def test_a_judge_of_other_data_is_not_used(folder):
    """It is left by a run that was stopped before its first save; --overwrite deletes one."""
    flags = RUNS["ct"] + " --out-dir run " + LIVE
    run("ct", flags, folder)
    first = (folder / "run" / "judge.pt").read_bytes()
    for name in ("last.pt", "ema.pt"):
        (folder / "run" / name).unlink()
    x, y = pixels(120)
    np.savez(folder / "other.npz", x, y)
    other = flags.replace("data.npz", "other.npz")
    assert "measures with a classifier" in run("ct", other, folder).stdout
    second = (folder / "run" / "judge.pt").read_bytes()
    assert second != first
    run("ct", other.replace(LIVE, "--overwrite"), folder)
    assert not (folder / "run" / "judge.pt").exists()


@pytest.mark.parametrize("script", ["ct", "cd"])
def test_two_ranks_measure_as_one(folder, script):
    run(script, RUNS[script] + " --out-dir one " + LIVE, folder)
    done = run(script, RUNS[script] + " --out-dir two " + LIVE, folder, ranks=2)
    one, two = measured(folder / "one"), measured(folder / "two")
    assert one.keys() == two.keys() == {3, 6}
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-2)
    assert done.stdout.count("measures with a classifier") == 1


def test_mnist_is_judged_as_in_the_benchmark(tmp_path, monkeypatch):
    """By its own network, from digits turned and shifted; judge.pt makes the same one again."""
    turned, said = [], []
    monkeypatch.setattr(judge, "moved", lambda x: turned.append(len(x)) or x)
    monkeypatch.setattr(judge, "LIVE_TRAINING", dict(steps=3, batch=5))
    x, y = pixels(60)
    data = common.ArrayImages([x], y, 8, "digits")
    run = types.SimpleNamespace(device=torch.device("cpu"), data=data.summary())
    args = argparse.Namespace(dataset="mnist", out_dir=str(tmp_path))
    first, second = (judge.live_judge(args, run, data, said.append) for _ in range(2))
    assert isinstance(second.net, judge.DigitClassifier) and turned == [5, 5, 5]
    assert "of 10 images unknown" in said[0]
    assert said[1].endswith(f" measures with {tmp_path}/judge.pt")
    labels = torch.from_numpy(y)
    assert first.measure(x, labels) == second.measure(x, labels)


# ---- data without labels

def test_inception_measures_what_has_no_labels(folder):
    """Here in its place: the mean of each channel."""
    np.savez(folder / "data.npz", pixels()[0])
    fake = """
evaluate = common.import_beside("evaluate", "")
class Channels:
    widths, sha = (3, 2), "abc"
    def __init__(self, path, device):
        assert (path, str(device)) == ("weights.pth", "cpu")
    def __call__(self, images):
        assert str(images.dtype) == "torch.uint8"
        means = images.float().mean((2, 3))
        return common.torch.cat([means, means[:, :2] + 1000], 1)
monkeypatch.setattr(evaluate, "Inception", Channels)
"""
    flags = DATA + "--no-class-cond --out-dir run --inception weights.pth " + LIVE
    done = run("ct", flags, folder, QUICK + fake)
    assert "--eval-every measures with Inception; the distance of 20 real ones is" in done.stdout
    x = pixels()[0]
    def channels(x):
        means = x.astype(np.float64).mean((1, 2))
        return means.mean(0), np.cov(means.T)
    images = draw(last(folder / "run"), None)
    wanted = frechet(channels(images), channels(x[np.arange(152) % 6 != 5]))
    assert measured(folder / "run")[6] == dict(distance=pytest.approx(wanted, rel=1e-4))


def test_a_judge_of_other_weights_is_not_used(tmp_path, monkeypatch):
    class Channels:
        widths = 3, 0

        def __init__(self, path, device):
            self.sha = path

        def __call__(self, images):
            return images.float().mean((2, 3))
    monkeypatch.setattr(judge.evaluate, "Inception", Channels)
    data, said = common.ArrayImages([pixels(60)[0]], None, 8, "images"), []
    run = types.SimpleNamespace(device=torch.device("cpu"), data=data.summary())
    for path in ("a", "b", "b"):
        args = argparse.Namespace(dataset="images", out_dir=str(tmp_path), inception=path)
        judge.live_judge(args, run, data, said.append)
    assert ["measures with Inception" in line for line in said] == [True, True, False]


# ---- refused

NO_WEIGHTS = QUICK + "\nimport os\nos.environ['TORCH_HOME'] = 'nowhere'\n"


@pytest.mark.parametrize("script, flags, message", [
    ("cd", RUNS["cd"], "--eval-every needs labels, which images.npz has none of, or Inception"),
    ("ctm", DATA + "--teacher-steps 4", "--eval-every needs labels"),
    ("ct", DATA, "--eval-every needs labels"),
    ("ct", DATA.replace("data.npz", "few.npz"), "--eval-every: few.npz has 11 images, too few"),
    ("guided_distill", RUNS["guided_distill"] + " --w-max 0 --teacher ideal --sampler encoder",
     "--sampler encoder goes with --w-max 0, --sample-every 0 and --eval-every 0"),
    ("guided_distill", "--teacher diffusers:latent --dataset data.npz",
     "--eval-every does not apply with --teacher diffusers:PATH"),
])
def test_what_cannot_be_measured_is_refused(folder, script, flags, message):
    """Before anything is trained, or left behind."""
    x, y = pixels(11)
    np.savez(folder / "few.npz", x, y)
    np.savez(folder / "images.npz", pixels()[0])
    if "needs labels" in message:
        flags = flags.replace("data.npz", "images.npz")
    net = "" if "diffusers" in flags else NET
    assert_mistake((net + STEPS + flags + " --eval-every 3").split(), message, f"{script}.py",
                   folder, NO_WEIGHTS)


def test_inception_without_measuring_is_refused(folder):
    assert_mistake((NET + STEPS + DATA + "--inception x.pth").split(),
                   "--inception does not apply", "ct.py", folder)


# ---- the clock

def test_measuring_does_not_count_as_training(tmp_path, monkeypatch):
    """Two steps of 8 images, a second each; between them 100 seconds of measuring."""
    now = [0.0]
    monkeypatch.setattr(common, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    args = argparse.Namespace(out_dir=str(tmp_path), total_steps=2, batch_size=8, micro_batch=8,
                              log_every=2, lr=0.1)
    log = common.start_run(args, HERE, torch.nn.Linear(2, 2), 0, 0)
    now[0] = 1.0
    log.step(1, True, False, loss=1.0)
    with log.pause():
        now[0] = 101.0
    now[0] = 102.0
    log.step(2, True, True, loss=1.0)
    log.close()
    line, = (json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines())
    assert line["images_per_s"] == 8.0


# ---- bench.py track and curve

def a_run(folder, lines, **settings):
    """A run's folder, with the log that these lines make."""
    folder.mkdir()
    for line in lines:
        common.append_record(folder / "log.jsonl", line)
    torch.save(dict(args=settings), folder / "ema.pt")


def test_track_is_a_table(tmp_path):
    """Means of the last five lines; the last distance, with its step if that is another; of rounds
    their ends, with what belongs to them."""
    lines = [dict(step=step, loss=float(step), grad_norm=None if step == 6 else 2.0 * step)
             for step in range(2, 41, 2)]
    lines += [dict(step=4, distance=9.0, read=0.5), dict(step=18, distance=7.5)]
    a_run(tmp_path / "a", lines, total_steps=40)
    a_run(tmp_path / "half", [line for line in lines if line["step"] <= 20], total_steps=40)
    rounds = dict(sampler="D", w_max=1.0, stage1_steps=3, start_N=4, end_N=1, round_steps=2,
                  last_steps=2)
    lines = [dict(step=3, distance=3.0), dict(step=7, distance=1.0)]
    lines += [dict(step=step, loss=step / 2) for step in range(1, 8)]
    a_run(tmp_path / "rounds", lines, **rounds)
    done = run_script("track", "a", "half", "rounds", script="tests/bench.py", cwd=tmp_path, code=0)
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines()[2:-2]]
    first = [["10%", "4", "3", "6", "9", "0.5"],
             ["25%", "10", "6", "12", "9 (step 4)", "0.5 (step 4)"],
             ["50%", "20", "16", "32", "7.5 (step 18)", "0.5 (step 4)"]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        *(["a", *row] for row in first),
        ["a", "100%", "40", "36", "72", "7.5 (step 18)", "0.5 (step 4)"],
        *(["half", *row] for row in first),
        ["rounds", "stage 1", "3", "1", "", "3", ""],
        ["rounds", "N = 2", "5", "2.25", "", "", ""],
        ["rounds", "N = 1", "7", "3.25", "", "1", ""]]
    done = run_script("track", "none", script="tests/bench.py", cwd=tmp_path, code=2)
    assert "none holds no run" in done.stderr


class Figure:
    """In the place of matplotlib's: notes what is plotted."""
    plots = []

    def __init__(self, size, layout):
        pass

    def subplots(self, rows, columns):
        def plot(place, x, y, style, *, color, label, **more):
            self.plots.append((place, color, label, list(x), list(y)))
        return [types.SimpleNamespace(
            plot=functools.partial(plot, place), set=lambda **_: None, grid=lambda **_: None,
            legend=lambda **_: None) for place in range(columns)]

    def savefig(self, file, format, dpi):
        file.write(b"drawn")


def test_a_curve_of_each_run(tmp_path, monkeypatch, capsys):
    """Loss, a mean over a fiftieth of the lines to either side, and distance; a colour a run."""
    lines = [dict(step=step, loss=None if step == 5 else float(step % 3)) for step in range(1, 102)]
    a_run(tmp_path / "a", [*lines, dict(step=50, distance=2.0)])
    a_run(tmp_path / "b", lines[:3])
    fake = types.ModuleType("matplotlib")
    fake.figure = types.SimpleNamespace(Figure=Figure)
    monkeypatch.setitem(sys.modules, "matplotlib", fake)
    monkeypatch.chdir(tmp_path)
    bench.curve(argparse.Namespace(dirs=["a", "b"], save="x.png"))
    (*first, steps, values), second, third = Figure.plots
    assert first == [0, "C0", "a"] and steps == [*range(1, 5), *range(6, 102)]
    assert values[0] == pytest.approx((1 + 2 + 0) / 3)
    assert values[3] == pytest.approx((2 + 0 + 1 + 0 + 1) / 5)  # steps 2, 3, 4, 6, 7
    assert second == (0, "C1", "b", [1, 2, 3], [1.0, 2.0, 0.0])
    assert third == (1, "C0", "a", [50], [2.0])
    assert "note: the log of b holds no distance" in capsys.readouterr().out
    assert (tmp_path / "x.png").read_bytes() == b"drawn"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(common.UserError, match="curve draws with matplotlib"):
        bench.curve(argparse.Namespace(dirs=["a"], save="x.png"))
