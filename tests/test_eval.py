"""FID, IS, precision, recall: against independent computations; `--eval` and tests/evaluate.py."""
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import runpy
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import common
import evaluate
from common import UserError
from util import ROOT, TINY, glyphs, run_script

CPU = types.SimpleNamespace(rank=0, world=1, main=True, device=torch.device("cpu"),
                            dtype=torch.float32, checkpointing=False)
rng = np.random.default_rng(0)


class Fake:
    """Stands in for Inception: 6 features, nonlinear in the colours of 4x4 patches, 5 logits."""
    widths = 6, 5

    def __init__(self, path=None, device=None):
        self.path, self.published, self.sha = path, path is None, "fa4e"
        self.weights = [torch.from_numpy(np.random.default_rng(1).normal(size=shape)).float()
                        for shape in ((48, 6), (6, 5))]

    def __call__(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        patches = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4)
        x = torch.tanh(patches.flatten(1) @ self.weights[0])
        return torch.cat([x, 4 * x @ self.weights[1]], 1)


def planes(images):
    """(n,H,W,C) -> (n,C,H,W) uint8 tensor."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def digest(images):
    """The digest of a data set, by its definition."""
    single = (hashlib.sha256(image.numpy().tobytes()).digest()[:8] for image in planes(images))
    return hashlib.sha256(b"".join(single)).hexdigest()[:12]


def normal(n, D, seed=0):
    """(n,D) float64, correlated, not centred."""
    r = np.random.default_rng(seed)
    return torch.from_numpy(r.normal(size=(n, D)) @ r.normal(size=(D, D)) + r.normal(size=D))


def moments(x):
    return x.mean(0), x.T.cov()


# ---- the measures alone

def test_frechet_distance_of_independent_coordinates():
    """Of N(m, diag s^2): the sum of (m1 - m2)^2 + (s1 - s2)^2, in whatever coordinates."""
    m1, m2, s1, s2 = torch.from_numpy(rng.uniform(0.1, 2, (4, 5)))
    S1, S2 = s1.square().diag(), s2.square().diag()
    Q, _ = torch.linalg.qr(torch.from_numpy(rng.normal(size=(5, 5))))
    wanted = pytest.approx(((m1 - m2) ** 2 + (s1 - s2) ** 2).sum().item(), rel=1e-12)
    assert evaluate.frechet_distance(m1, S1, m2, S2) == wanted
    assert evaluate.frechet_distance(Q @ m1, Q @ S1 @ Q.T, Q @ m2, Q @ S2 @ Q.T) == wanted


def test_frechet_distance_by_torch_fidelity():
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    first, second = moments(normal(50, 7, 1)), moments(normal(60, 7, 2))
    theirs = [dict(mu=mu.numpy(), sigma=sigma.numpy()) for mu, sigma in (first, second)]
    wanted = fid.fid_statistics_to_metric(*theirs, verbose=False)[fid.KEY_METRIC_FID]
    assert evaluate.frechet_distance(*first, *second) == pytest.approx(wanted, rel=1e-8)


def test_frechet_distance_to_itself_is_zero_even_if_singular():
    for x in (normal(500, 20, 3), normal(12, 200, 4)):
        assert evaluate.frechet_distance(*moments(x), *moments(x)) < 1e-9 * x.T.cov().trace()


def test_inception_score_known_values():
    """All sure of the same: 1. Sure, and all K classes alike in each split: K. Undecided: 1."""
    K, sure = 7, 100.0
    assert evaluate.inception_score(sure * torch.eye(K)[[3] * 100]) == pytest.approx(1)
    assert evaluate.inception_score(sure * torch.eye(K).repeat(10, 1)) == pytest.approx(K)
    assert evaluate.inception_score(torch.zeros(50, K)) == pytest.approx(1)


def test_inception_score_by_its_definition():
    logits = torch.from_numpy(rng.normal(size=(60, 9)) * 2)
    scores = []
    for p in logits.softmax(1).split(6):  # consecutive tenths
        kl = [sum(a * math.log(a / b) for a, b in zip(row, p.mean(0))) for row in p]
        scores.append(math.exp(np.mean(kl)))
    assert evaluate.inception_score(logits) == pytest.approx(np.mean(scores), rel=1e-10)


def brute_force(samples, reference, k=3):
    samples, reference = samples.double().tolist(), reference.double().tolist()

    def covered(points, centres):
        reach = [sorted(math.dist(a, b) for b in centres)[k] for a in centres]
        return np.mean([any(math.dist(p, c) <= r for c, r in zip(centres, reach)) for p in points])
    return covered(samples, reference), covered(reference, samples)


def test_precision_and_recall_by_hand():
    """On a line: the references 0 1 2 3 reach 3 2 2 3, so -3 to 6; the samples 1 6 9 10 20 reach
    9 5 8 9 14, so -8 to 34 is covered."""
    samples = torch.tensor([1.0, 6, 9, 10, 20], dtype=torch.float64)[:, None]
    reference = torch.tensor([0.0, 1, 2, 3], dtype=torch.float64)[:, None]
    assert evaluate.precision_recall(samples, reference) == (2 / 5, 1)
    assert evaluate.precision_recall(reference, samples) == (1, 2 / 5)
    assert evaluate.precision_recall(samples + 100, reference) == (0, 0)


def test_precision_and_recall_by_brute_force_and_by_torch_fidelity():
    samples, reference = normal(60, 3, 5), 1.5 * normal(45, 3, 6)
    wanted = brute_force(samples, reference)
    assert 0.1 < wanted[0] < 0.9 and 0.1 < wanted[1] < 0.9 and wanted[0] != wanted[1]
    close = pytest.approx(wanted, abs=1e-12)
    assert evaluate.precision_recall(samples, reference) == close
    assert evaluate.precision_recall(samples, reference, chunk=7) == close
    nearest = pytest.approx(brute_force(samples, reference, 1), abs=1e-12)
    assert evaluate.precision_recall(samples, reference, k=1) == nearest
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    theirs = prc.prc_features_to_metric(samples, reference, verbose=False)
    assert wanted == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_distances_do_not_drown_in_large_features():
    """In float32 |a|^2 + |b|^2 - 2ab of features near 1000 would lose all that sets these apart."""
    samples = (normal(30, 4, 7) + 1000).float()
    reference = (1.3 * normal(30, 4, 8) + 1000).float()
    wanted = brute_force(samples, reference)
    assert evaluate.precision_recall(samples, reference) == pytest.approx(wanted)


def test_copies_whose_features_differ_by_rounding():
    """Of 20 different images 5 copies each: the first is among the samples, the others are not."""
    whole = normal(20, 64, 9).repeat(5, 1)
    noise = 1 + 1e-7 * torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    samples, reference = (whole[:1] * noise[:100]).float(), (whole * noise[100:]).float()
    assert evaluate.precision_recall(samples, reference) == (1, 1 / 20)


@pytest.mark.parametrize("keep", [65, 20])
def test_features_of_a_data_set(keep):
    """In another order, the last batch of one image."""
    images = rng.integers(0, 256, (65, 16, 16, 3), dtype=np.uint8)
    dataset, order = common.ArrayImages([images], None, 16, "65"), rng.permutation(65)
    outcome = evaluate.data_features(CPU, Fake(), dataset, order, keep, "")
    wanted = Fake()(planes(images)).double()
    kept = torch.cat([outcome.features, outcome.logits], 1).double()
    torch.testing.assert_close(outcome.mu, wanted[:, :6].mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(outcome.sigma, wanted[:, :6].T.cov(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(kept, wanted[order[:keep]], rtol=1e-5, atol=1e-6)
    assert outcome.sha == digest(images)


# ---- the scripts' --eval

@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a random checkpoint of each script, and 40 digits, which they are said to be
    trained on."""
    folder = tmp_path_factory.mktemp("eval")
    images, labels = glyphs(40, seed=1, size=16)
    np.savez(folder / "data.npz", arr_0=images, arr_1=labels)
    for script in ("ct", "cd", "ctm", "guided_distill"):
        cond = dict(cond=True) if script in ("ctm", "guided_distill") else {}
        model_args = TINY | dict(classes=10, dropout=0.0) | cond
        torch.manual_seed(0)
        net = common.UNet(**model_args)
        for p in net.parameters():  # what is zero at first, not to see noise alone
            if not p.any():
                torch.nn.init.normal_(p, std=0.05)
        args = dict(dataset="data.npz", data_dir=None, stage="distill", w_min=0.0, w_max=0.0,
                    sampler="D", teacher="x")
        if script == "guided_distill":
            args["w_max"] = 4.0
        common.save_checkpoint(folder / f"{script}.pt", dict(
            script=script, step=7, N=2, args=args, model_args=model_args, ema=net.state_dict()))
    plain = common.UNet(**common.NETS["cifar-small"], classes=10)
    common.save_checkpoint(folder / "plain.pt", plain.state_dict())
    return folder


@pytest.fixture
def here(workplace, monkeypatch):
    """The workplace as the current folder, with the stand-in for Inception."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(common, "ranks_differ", False)
    monkeypatch.setattr(evaluate, "Inception", Fake)
    (workplace / "eval.jsonl").unlink(missing_ok=True)
    return workplace


def last_record():
    with open("eval.jsonl") as file:
        return json.loads(file.read().splitlines()[-1])


@pytest.fixture
def command(here, monkeypatch, capsys):
    """Run a script, or tests/evaluate.py, in this process; returns its last line."""
    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [str(ROOT / f"{script}.py"), *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            if script == "evaluate":
                evaluate.main()
            runpy.run_path(sys.argv[0], run_name="__main__")
        assert end.value.code == 0
        return capsys.readouterr().out.strip().splitlines()[-1]
    return run


FP32 = ["--precision", "fp32", "--device", "cpu"]
MEASURES = "FID@30", "IS", "precision", "recall"


def by_hand(images, reference):
    """All four measures of uint8 images (n,H,W,3), from the stand-in's features at once."""
    x, logits = Fake()(planes(images)).double().split([6, 5], 1)
    r, _ = Fake()(planes(reference)).double().split([6, 5], 1)
    (m1, S1), (m2, S2) = moments(x), moments(r)
    roots = torch.linalg.eigvals(S1 @ S2).real.sqrt().sum()
    fid = ((m1 - m2) ** 2).sum() + S1.trace() + S2.trace() - 2 * roots
    p = logits.softmax(1)
    scores = [(part * (part / part.mean(0)).log()).sum(1).mean().exp()
              for part in p.split(len(p) // 10)]
    return [fid.item(), np.mean(scores), *brute_force(x, r)]


SCRIPTS = {
    "ct": (["--sigmas", 80, 1], "NFE 2, sigmas 80.0,1.0,"),
    "cd": (["--w", 0], "NFE 1,"),
    "ctm": (["--steps", 3, "--gamma", 0.5], "NFE 3, steps 3, gamma 0.5,"),
    "guided_distill": (["--w", 1.5], "NFE 2, sampler D, w 1.5,"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_measures_what_it_saves(command, here, script):
    """The numbers are those of the file that --sample with the same flags writes: n, seed, labels,
    network calls and all. The command by itself says the same of it, saved as npz or folder."""
    flags, words = SCRIPTS[script]
    flags = ["--ckpt", f"{script}.pt", "--seed", 3, "--labels", 2, 5, *flags, *FP32]
    line = command(script, "--eval", 30, *flags)
    record = last_record()
    command(script, "--sample", 30, "--save", "s.npz", *flags)
    saved, data = np.load("s.npz"), np.load("data.npz")
    assert saved["arr_1"].tolist() == [2, 5] * 15
    wanted = by_hand(saved["arr_0"], data["arr_0"])
    assert [record[key] for key in MEASURES] == pytest.approx(wanted, rel=1e-4)
    numbers = line.split(":")[0]
    assert numbers.startswith(f"FID@30 {record['FID@30']:.3f}, IS {record['IS']:.3f}, precision ")
    assert "30 samples, labels 2 5 in turn," in line and words in line
    end = f"reference data.npz, 40 images, sha {record['reference_sha']}; Inception fa4e"
    assert "seed 3, EMA weights of" in line and line.endswith(end)
    assert (record["n"], record["seed"], record["step"]) == (30, 3, 7)
    assert record["nfe"] == int(words.split()[1].strip(","))
    assert record["labels"] == "labels 2 5 in turn" and record["args"]["ckpt"] == f"{script}.pt"
    assert "save" not in record["args"]

    alone = command("evaluate", "s.npz", "--reference", "data.npz", "--device", "cpu")
    sha = digest(saved["arr_0"])
    assert alone == f"{numbers}: 30 samples of s.npz, 16 pixels, sha {sha}; {end}"
    if script == "ctm":
        command(script, "--sample", 30, "--save", "folder", *flags)
        again = command("evaluate", "folder", "--reference", "data.npz", "--device", "cpu")
        assert again == alone.replace("s.npz", "folder")


def test_cd_teacher_counts_its_guided_calls(command, here):
    state = torch.load("cd.pt", weights_only=True)
    model_args = state["model_args"] | dict(null=True)
    common.save_checkpoint(here / "teacher.pt", state | dict(
        args=state["args"] | dict(stage="teacher"), model_args=model_args,
        ema=common.UNet(**model_args).state_dict()))
    line = command("cd", "--ckpt", "teacher.pt", "--eval", 10, "--N", 3, "--w", 1, *FP32)
    assert "NFE 10, N 3, w 1.0," in line and "all labels in turn" in line
    assert last_record()["nfe"] == 10


@pytest.fixture
def evaluation(here, capsys):
    """`evaluate.evaluate` of images that `draw` makes, with the stand-in: the line, the record."""
    def run(draw, n, batch=64, y=None, trained=None, **settings):
        defaults = dict(eval=n, inception=None, dataset="data.npz", data_dir=None, labels=None,
                        seed=0, ckpt="x.pt")
        args = types.SimpleNamespace(**defaults | settings)
        evaluate.evaluate(args, CPU, draw, y, (3, 16, 16), 1, trained or {}, batch)
        return capsys.readouterr().out.splitlines()[-1], last_record()
    return run


def draw_data(y, noise, shape):
    """The data set itself, image i for place i."""
    return planes(np.load("data.npz")["arr_0"])[noise.indices].float() / 127.5 - 1


def draw_noise(y, noise, shape):
    """Noise, around a grey that the label says."""
    grey = 0 if y is None else y.view(-1, 1, 1, 1) / 10 - 0.5
    return (noise(torch.zeros(shape)) / 2.5 + grey).clamp(-1, 1)


@pytest.mark.parametrize("batch", [64, 7])
def test_the_training_images_against_themselves(evaluation, batch):
    line, record = evaluation(draw_data, 40, batch, inception="w.pth")
    assert line.startswith("FID@40 0.000, IS ") and "40 samples, unconditional, NFE 1" in line
    assert line.endswith("; Inception fa4e, w.pth, not the weights of published numbers")
    assert record["FID@40"] < 1e-12 and record["precision"] == record["recall"] == 1
    assert record["inception_sha"] == "fa4e" and record["args"]["inception"] == "w.pth"


def test_copies_reach_their_original_alone(evaluation):
    """Ten of the images, four times each: all are references, whose own neighbours are copies."""
    def draw(y, noise, shape):
        return draw_data(y, types.SimpleNamespace(indices=noise.indices % 10), shape)
    _, record = evaluation(draw, 40)
    assert record["precision"] == 1 and record["recall"] == 10 / 40 and record["FID@40"] > 1e-3


def test_at_most_ten_thousand_references_are_kept(evaluation, monkeypatch):
    """All images for FID, some, drawn at random, for precision and recall: the line says so."""
    assert evaluate.REFERENCE_IMAGES == 10_000
    monkeypatch.setattr(evaluate, "REFERENCE_IMAGES", 15)
    line, record = evaluation(draw_data, 40)
    assert record["FID@40"] < 1e-12 and record["recall"] == 1 and record["precision"] < 1
    assert "reference data.npz, 40 images (15 images for precision and recall)" in line


@pytest.mark.parametrize("statistics", [False, True])
def test_references_are_kept_from_everywhere(here, monkeypatch, statistics):
    """Fifteen different ones, not the first: images of a folder are sorted by class."""
    monkeypatch.setattr(evaluate, "REFERENCE_IMAGES", 15)
    images = np.load("data.npz")["arr_0"]
    mu = np.arange(6.0)
    np.savez("whole.npz", images, **(dict(mu=mu, sigma=np.eye(6)) if statistics else {}))
    args = types.SimpleNamespace(dataset="whole.npz", data_dir=None)
    reference = evaluate.reference_features(args, CPU, Fake(), 16, {})
    everything = Fake()(planes(images))[:, :6]
    kept = torch.cdist(reference.features, everything).argmin(1).tolist()
    torch.testing.assert_close(reference.features, everything[kept], rtol=1e-5, atol=1e-6)
    assert len({*kept}) == 15 and min(kept) < 13 and max(kept) > 26
    wanted = torch.from_numpy(mu).float() if statistics else everything.mean(0)
    torch.testing.assert_close(reference.mu.float(), wanted, rtol=1e-5, atol=1e-6)


def test_batch_size_does_not_matter_but_the_seed_does(evaluation):
    y = torch.arange(40) % 10
    wide, narrow = (evaluation(draw_noise, 40, batch, y)[1] for batch in (64, 3))
    for key in ("FID@40", "IS", "precision", "recall"):
        assert wide[key] == pytest.approx(narrow[key], rel=1e-6)
    other = evaluation(draw_noise, 40, y=y, seed=1)[1]
    assert other["FID@40"] != pytest.approx(wide["FID@40"], rel=1e-3)


def test_called_fid_at_50000_samples_only(evaluation, monkeypatch):
    monkeypatch.setattr(evaluate, "precision_recall", lambda *_: (0.5, 0.25))
    monkeypatch.setattr(evaluate, "inception_score", lambda *_: 3.0)
    grey = torch.zeros(5000, 16, 16, 3, dtype=torch.uint8)
    monkeypatch.setattr(common, "draw_part", lambda draw, part, *_: grey[:len(part)])
    line, record = evaluation(None, 50_000, batch=5000)
    numbers = f"FID {record['FID']:.3f}, IS 3.000, precision 0.500, recall 0.250"
    assert line.startswith(f"{numbers}: 50,000 samples")
    line, record = evaluation(None, 49_999, batch=5000)
    assert line.startswith("FID@49999 ") and "FID" not in record


def test_statistics_stand_for_images(evaluation):
    """EDM's layout is FID's alone; with images beside it, as in ADM's, the others' too."""
    data = np.load("data.npz")["arr_0"]
    mu, sigma = moments(Fake()(planes(data))[:, :6].double())
    both = dict(mu=mu.numpy(), sigma=sigma.numpy())
    np.savez("edm.npz", **both)
    np.savez("adm.npz", data[:25], **both, mu_s=np.zeros(3), sigma_s=np.eye(3))
    np.savez("first.npz", data[:25])
    _, images = evaluation(draw_noise, 30)
    _, first = evaluation(draw_noise, 30, dataset="first.npz")
    line, edm = evaluation(draw_noise, 30, dataset="edm.npz")
    assert edm["FID@30"] == pytest.approx(images["FID@30"], rel=1e-6) and edm["IS"] == images["IS"]
    assert "precision" not in edm and "recall" not in edm
    sha = common.file_sha("edm.npz")
    words = f"reference edm.npz, statistics without images for precision and recall, sha {sha}"
    assert words in line and edm["reference_sha"] == sha
    line, adm = evaluation(draw_noise, 30, dataset="adm.npz")
    near = adm["precision"], adm["recall"]
    assert adm["FID@30"] == edm["FID@30"] and near == (first["precision"], first["recall"])
    assert near != (images["precision"], images["recall"])
    assert "reference adm.npz, statistics (25 images for precision and recall), sha" in line


def test_the_hash_tells_references_apart(evaluation):
    """One hash for the same images in another file; another where a pixel or the order differs."""
    data = np.load("data.npz")["arr_0"]
    changed = data.copy()
    changed[3, 5, 5, 1] ^= 1
    np.save("same.npy", data)
    np.save("changed.npy", changed)
    np.save("turned.npy", data[::-1])
    with zipfile.ZipFile("same.zip", "w") as archive:
        for i, image in enumerate(data):
            with archive.open(f"{i:05d}.png", "w") as file:
                Image.fromarray(image).save(file, "PNG")
    names = "data.npz", "same.npy", "same.zip", "changed.npy", "turned.npy"
    shas = [evaluation(draw_data, 10, dataset=name)[1]["reference_sha"] for name in names]
    assert shas[0] == shas[1] == shas[2] == digest(data) and len({*shas}) == 3


@pytest.mark.parametrize("dataset, data_dir, wanted", [
    (None, None, ("imagenet64", "there")), (None, "here", ("imagenet64", "here")),
    ("imagenet64", None, ("imagenet64", "there")), ("cifar10", None, ("cifar10", None)),
    ("cifar10", "here", ("cifar10", "here")), ("x.npz", None, ("x.npz", None))])
def test_the_reference_is_the_training_data_unless_named(dataset, data_dir, wanted):
    trained = dict(args=dict(dataset="imagenet64", data_dir="there"))
    args = types.SimpleNamespace(dataset=dataset, data_dir=data_dir, ckpt="x.pt")
    assert evaluate.dataset_of(args, trained) == wanted


def test_official_batches_and_a_network_of_another_order(tmp_path, monkeypatch):
    """Of ImageNet-64, without the names of the classes: refused, but with what was trained on them.
    Networks and samples without labels do not care."""
    np.savez(tmp_path / "train_data_batch_1.npz", data=np.zeros((4, 12288), np.uint8),
             labels=np.array([1, 2, 3, 1]))
    data = common.load_dataset("imagenet64", str(tmp_path), 64).summary()
    args = types.SimpleNamespace(dataset="imagenet64", data_dir=str(tmp_path), ckpt="x.pt")
    monkeypatch.setattr(evaluate, "data_features", lambda *_: types.SimpleNamespace(sha="none"))
    for classes, script, known, right in ((1000, None, None, False), (0, None, None, True),
                                          (1000, "cd", data | dict(n=5), False),
                                          (1000, "cd", data, True), (None, None, None, True)):
        trained = dict(script=script, model_args=dict(classes=classes), data=known)
        wrong = pytest.raises(UserError, match="map_clsloc.txt.* another order than those of x.pt")
        with contextlib.nullcontext() if right else wrong:
            evaluate.reference_features(args, CPU, Fake(), 64, {} if classes is None else trained)


def test_labels_that_occur_are_said(evaluation):
    data = dict(n=5, names=None, present=[0, 3], digest="x")
    trained = dict(data=data, model_args=dict(classes=10), script="cd", args={})
    line, _ = evaluation(draw_noise, 10, y=torch.arange(10) % 2, trained=trained)
    assert "10 samples, the 2 labels of its data in turn," in line


WITH_FAKE = f"""
sys.path.append({str(ROOT / 'tests')!r})
import conftest, evaluate
from test_eval import Fake
evaluate.Inception = Fake
"""


def test_two_processes_equal_one(command, here):
    """They share the references and the samples; 130 samples are three batches, the last of two."""
    np.savez("many.npz", glyphs(150, seed=2, size=16)[0])
    flags = ["--ckpt", "ctm.pt", "--eval", 130, "--dataset", "many.npz", *FP32]
    alone = ["many.npz", "--reference", "data.npz"]
    lines = [command("ctm", *flags), command("evaluate", *alone)]
    one = last_record()
    two = dict(cwd=here, ranks=2, code=0)
    done = run_script(*flags, script="ctm.py", prelude=WITH_FAKE, **two)
    assert done.stdout.splitlines() == [
        "reference many.npz: 150 images of 16x16 pixels, no labels", lines[0]]
    record = last_record()
    for key in ("FID@130", "IS", "precision", "recall"):
        assert record.pop(key) == pytest.approx(one.pop(key), rel=1e-6)
    assert record == one
    run_evaluate = WITH_FAKE + "sys.argv[0] = 'evaluate.py'\nevaluate.main()"
    done = run_script(*alone, script="tests/evaluate.py", prelude=run_evaluate, **two)
    assert done.stdout.splitlines() == [
        "samples many.npz: 150 images of 16x16 pixels, no labels",
        "reference data.npz: 40 images of 16x16 pixels, 10 classes: 0, 1, 2, 3, ..", lines[1]]


def test_what_cannot_be_written_was_printed(evaluation, here, capsys):
    (here / "eval.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot write eval.jsonl: Is a directory"):
        evaluation(draw_data, 10)
    (here / "eval.jsonl").rmdir()
    assert capsys.readouterr().out.splitlines()[-1].startswith("FID@10 ")


# ---- Inception itself

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as --inception takes it, of random weights that let a signal through."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = module.FeatureExtractorInceptionV3("random", ["2048"])
    torch.manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.nn.init.normal_(net.fc.bias)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(net.state_dict(), path)
    return path


def test_inception_is_torch_fidelitys(weights, monkeypatch):
    """Its outputs are the pooled features, and those times the last layer's matrix, no bias."""
    from torch_fidelity import FeatureExtractorInceptionV3 as Theirs
    load, loads = torch.load, []
    monkeypatch.setattr(torch, "load", lambda file, *args, **more: loads.append((file, more))
                        or load(file, *args, **more))
    inception = evaluate.Inception(weights, torch.device("cpu"))
    files = [more["weights_only"] for file, more in loads if not isinstance(file, io.BytesIO)]
    assert files == [True]  # torch-fidelity unpickles: not our file
    images = torch.from_numpy(rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8))
    features, logits = inception(images).split(inception.widths, 1)
    theirs = Theirs("theirs", ["2048"], str(weights)).eval()
    assert torch.equal(features, theirs(images)[0]) and features.std() > 1e-3
    matrix = load(weights, weights_only=True)["fc.weight"]
    torch.testing.assert_close(logits, features @ matrix.T)
    assert not inception.net.training and not inception.published
    assert inception.sha == common.file_sha(weights)


def test_published_weights_are_known_by_their_hash(weights, monkeypatch, tmp_path):
    """The name of the published file ends with the first eight digits of its SHA-256."""
    import torch_fidelity.feature_extractor_inceptionv3 as module
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name = f"weights-2015-12-05-{hashlib.sha256(weights.read_bytes()).hexdigest()[:8]}.pth"
    monkeypatch.setattr(module, "URL_INCEPTION_V3", f"https://nowhere/{name}")
    (tmp_path / "checkpoints").mkdir()
    os.link(weights, tmp_path / "checkpoints" / name)
    assert evaluate.Inception(None, torch.device("cpu")).published  # where the library keeps them


def test_the_whole_with_inception(weights, here):
    """The command as a user types it, with real features: the same images in two files."""
    images = glyphs(10, seed=1, size=16)[0]
    np.savez("few.npz", images)
    np.save("same.npy", images)
    done = run_script("few.npz", "--reference", "same.npy", "--inception", weights,
                      script="tests/evaluate.py", cwd=here, code=0)
    line, sha = done.stdout.splitlines()[-1], common.file_sha(weights)
    assert line.startswith("FID@10 0.000, IS ")
    assert "precision 1.000, recall 1.000: 10 samples of few.npz, 16 pixels" in line
    assert line.endswith(f"Inception {sha}, {weights}, not the weights of published numbers")


class Payload:
    def __reduce__(self):
        return open, ("unpickled", "w")


def test_weights_are_never_unpickled(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = torch.load(weights, weights_only=True)
    torch.save({"fc.weight": state["fc.weight"], "more": Payload()}, "evil.pth")
    torch.save({"fc.weight": state["fc.weight"]}, "other.pth")
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:1_000_000])
    for name, message in (("evil.pth", "evil.pth is no checkpoint, or holds more than tensors"),
                          ("nowhere.pth", "nowhere.pth: No such file"),
                          ("other.pth", "--inception other.pth holds other weights"),
                          ("cut.pth", "cut.pth is no checkpoint, or is damaged")):
        with pytest.raises(UserError, match=message) as error:
            evaluate.Inception(name, torch.device("cpu"))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "unpickled").exists()


def test_missing_weights_and_package(monkeypatch, tmp_path):
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url",
                        lambda *_, **__: pytest.fail("a download nobody asked for"))
    with pytest.raises(UserError, match="fetch https://.*6726825d.pth and name the file with "
                                        f"--inception, or put it into {tmp_path}/checkpoints"):
        evaluate.Inception(None, torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="needs torch-fidelity .pip install torch_fidelity.,"):
        evaluate.Inception(None, torch.device("cpu"))


# ---- mistakes

def as_eval(name):
    return ["--ckpt", "ctm.pt", "--eval", 10, "--dataset", name]


def alone(name, *flags):
    return ["data.npz", "--reference", name, *flags]


MISTAKES = [
    ("ctm", ["--eval", 100], "--eval does not apply without --ckpt"),
    ("ctm", ["--ckpt", "ctm.pt", "--eval", 9], "argument --eval: invalid count"),
    ("ctm", [*as_eval("data.npz"), "--save", "x.png"], "--save does not apply with --eval"),
    ("ctm", [*as_eval("data.npz"), "--sample", 8], "--sample does not apply with --eval"),
    ("ctm", ["--ckpt", "ctm.pt", "--inception", "x"], "--inception does not apply without --eval"),
    ("ctm", ["--ckpt", "ctm.pt", "--dataset", "x"], "--dataset does not apply without --eval"),
    ("ctm", ["--ckpt", "ctm.pt", "--eval", 10, "--data-dir", "x"], "--data-dir says where a named"),
    ("ctm", as_eval("nowhere.npz"), "--dataset nowhere.npz does not exist"),
    ("ctm", as_eval("three.npy"), "--dataset three.npy holds 3 image(s)"),
    ("ctm", as_eval("wide.npz"), "--dataset wide.npz: mu must be of shape (6,)"),
    ("ctm", as_eval("nan.npz"), "--dataset nan.npz: mu must be of shape (6,)"),
    ("ctm", as_eval("pickled.npz"), "--dataset pickled.npz cannot be read as an npz"),
    ("ctm", as_eval("broken.npz"), "--dataset broken.npz cannot be read as an npz"),
    ("ctm", [*as_eval("data.npz"), "--labels", 10], "--labels 10: this network has the labels"),
    ("cd", ["--ckpt", "cd.pt", "--eval", 10, "--edit", "denoise"], "does not apply with --e"),
    ("ctm", [*as_eval("data.npz"), "--mask", "x"], "--mask does not apply without --edit"),
    ("cd", ["--ckpt", "plain.pt", "--eval", 10], "plain.pt does not say what it was trained on"),
    ("evaluate", ["data.npz"], "the following arguments are required: --reference"),
    ("evaluate", ["nowhere", "--reference", "data.npz"], "nowhere does not exist: name an .npz"),
    ("evaluate", ["three.npy", "--reference", "data.npz"], "three.npy holds 3 image(s): name 10"),
    ("evaluate", ["broken.npz", "--reference", "data.npz"], "broken.npz cannot be read as an npz"),
    ("evaluate", alone("nowhere.npz"), "--reference nowhere.npz does not exist"),
    ("evaluate", alone("three.npy"), "--reference three.npy holds 3 image(s)"),
    ("evaluate", alone("wide.npz"), "--reference wide.npz: mu must be of shape (6,)"),
    ("evaluate", alone("imagenet64"), "--reference imagenet64 needs --data-dir"),
    ("evaluate", alone("data.npz", "--data-dir", "x"), "a path of your own as --reference"),
    ("evaluate", alone("data.npz", "--size", 32), "is 16x16, smaller than 32 pixels"),
    ("evaluate", alone("data.npz", "--sizes", 32), "unrecognized arguments: --sizes 32 (did you"),
]


@pytest.fixture(scope="module")
def wrong_files(workplace):
    np.save(workplace / "three.npy", np.zeros((3, 16, 16, 3), np.uint8))
    np.savez(workplace / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez(workplace / "nan.npz", mu=np.full(6, np.nan), sigma=np.eye(6))
    np.savez(workplace / "pickled.npz", mu=np.array([print] * 6), sigma=np.eye(6))
    (workplace / "broken.npz").write_bytes(b"PK\x03\x04 and no more")


@pytest.mark.parametrize("script, flags, message", MISTAKES, ids=[row[2] for row in MISTAKES])
def test_mistakes(command, here, wrong_files, script, flags, message):
    with pytest.raises(UserError) as error:
        command(script, *flags)
    *trace, said = str(error.value).splitlines()  # a loader's worker says where it was
    assert message in said and (not trace or "worker" in trace[0])
    assert not (here / "eval.jsonl").exists()


def test_latent_students_are_refused(command, here):
    state = copy.deepcopy(torch.load("guided_distill.pt", weights_only=True))
    state["args"]["teacher"] = "diffusers:pipe"
    common.save_checkpoint(here / "latent.pt", state)
    with pytest.raises(UserError, match="--eval does not apply to latent models"):
        command("guided_distill", "--ckpt", "latent.pt", "--eval", 10)


def test_the_command_line_says_it_in_one_line(here, tmp_path):
    done = run_script("data.npz", "--reference", "data.npz", script="tests/evaluate.py", cwd=here,
                      code=2, env=dict(TORCH_HOME=str(tmp_path)))
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("evaluate.py: error: --eval needs Inception's weights: fetch")


def test_images_are_shrunk_to_one_size(command, here):
    """To that of the samples, or to --size."""
    large, _ = glyphs(40, seed=1, size=32)
    np.savez("large.npz", large)
    line = command("evaluate", "data.npz", "--reference", "large.npz")
    shrunk = np.stack([common.fit_image(Image.fromarray(image), 16, "") for image in large])
    data = np.load("data.npz")["arr_0"]
    numbers = [float(word.split()[-1]) for word in line.split(":")[0].split(",")]
    assert numbers == pytest.approx(by_hand(data, shrunk), abs=6e-4) and " 16 pixels" in line
    line = command("evaluate", "large.npz", "--reference", "large.npz", "--size", 16)
    assert line.startswith("FID@40 0.000") and f" 16 pixels, sha {digest(shrunk)};" in line


def test_without_evaluate_beside_the_script(here, tmp_path):
    """A script copied away with common.py says what it misses."""
    for name in ("ctm.py", "common.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, tmp_path / "ctm.py", "--ckpt", "ctm.pt", "--eval", "10"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "--eval measures with tests/evaluate.py" in done.stderr
