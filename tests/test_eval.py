"""FID, IS, precision and recall: against independent computations, and `--eval` as a user calls it."""
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

import common
from common import UserError
from util import ROOT, TINY, run_script, torchrun

CPU = types.SimpleNamespace(rank=0, world=1, main=True, device=torch.device("cpu"), dtype=torch.float32)
INCEPTION = common.Inception
rng = np.random.default_rng(0)


class Fake:
    """A small stand-in for Inception: 6 features, nonlinear in the mean colours of 4x4 patches, and 5 logits."""
    widths, published, path, sha = (6, 5), True, "fake.pth", "fa4e"

    def __init__(self, path, device):
        self.weights = [torch.from_numpy(np.random.default_rng(1).normal(size=shape)).float() for shape in ((48, 6), (6, 5))]

    def __call__(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        x = torch.tanh(torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1) @ self.weights[0])
        return torch.cat([x, 4 * x @ self.weights[1]], 1)


def normal(n, D, seed=0):
    """(n,D) float64, correlated, not centred."""
    r = np.random.default_rng(seed)
    return r.normal(size=(n, D)) @ r.normal(size=(D, D)) + r.normal(size=D)


def moments(x):
    return torch.from_numpy(x.mean(0)), torch.from_numpy(np.cov(x, rowvar=False))


# ---- the measures alone

def test_frechet_distance_of_independent_coordinates():
    """Of N(m, diag s^2) the distance is the sum of (m1 - m2)^2 + (s1 - s2)^2; and no rotation of the space changes it."""
    m1, m2, s1, s2 = (torch.from_numpy(rng.uniform(0.1, 2, 5)) for _ in range(4))
    Q, _ = torch.linalg.qr(torch.from_numpy(rng.normal(size=(5, 5))))
    wanted = ((m1 - m2) ** 2 + (s1 - s2) ** 2).sum().item()
    assert common.frechet_distance(m1, s1.square().diag(), m2, s2.square().diag()) == pytest.approx(wanted, rel=1e-12)
    rotated = Q @ m1, Q @ s1.square().diag() @ Q.T, Q @ m2, Q @ s2.square().diag() @ Q.T
    assert common.frechet_distance(*rotated) == pytest.approx(wanted, rel=1e-12)


def test_frechet_distance_by_eigenvalues_and_by_torch_fidelity():
    (m1, S1), (m2, S2) = moments(normal(50, 7, 1)), moments(normal(60, 7, 2))
    roots = np.sqrt(np.linalg.eigvals(S1.numpy() @ S2.numpy()).real).sum()
    wanted = ((m1 - m2) ** 2).sum().item() + np.trace(S1) + np.trace(S2) - 2 * roots
    assert common.frechet_distance(m1, S1, m2, S2) == pytest.approx(wanted, rel=1e-10)
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    theirs = fid.fid_statistics_to_metric(dict(mu=m1.numpy(), sigma=S1.numpy()), dict(mu=m2.numpy(), sigma=S2.numpy()), False)
    assert common.frechet_distance(m1, S1, m2, S2) == pytest.approx(theirs[fid.KEY_METRIC_FID], rel=1e-8)


def test_frechet_distance_to_itself_is_zero_even_if_singular():
    for x in (normal(500, 20, 3), normal(12, 200, 4)):
        assert common.frechet_distance(*moments(x), *moments(x)) < 1e-9 * np.cov(x, rowvar=False).trace()


def test_inception_score_known_values():
    """All sure of the same: 1. Sure, and all K classes alike in each split: K. Undecided: 1."""
    K, sure = 7, 1000.0  # so sure that p underflows to 0
    assert common.inception_score(sure * torch.eye(K)[[3] * 100]) == pytest.approx(1)
    assert common.inception_score(sure * torch.eye(K).repeat(10, 1)) == pytest.approx(K)
    assert common.inception_score(torch.zeros(50, K)) == pytest.approx(1)


def test_inception_score_by_its_definition_and_by_torch_fidelity():
    logits = torch.from_numpy(rng.normal(size=(60, 9)) * 2)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    scores = []
    for start in range(0, 60, 6):
        part = p[start:start + 6]
        scores.append(math.exp(np.mean([sum(p_y * math.log(p_y / q_y) for p_y, q_y in zip(row, part.mean(0))) for row in part])))
    assert common.inception_score(logits) == pytest.approx(np.mean(scores), rel=1e-10)
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    assert common.inception_score(logits) == pytest.approx(
        isc.isc_features_to_metric(logits, splits=10, shuffle=False)[isc.KEY_METRIC_ISC_MEAN], rel=1e-10)


def brute_force(samples, reference, k=3):
    def covered(points, centres):
        reach = [sorted(math.dist(a, b) for j, b in enumerate(centres) if j != i)[k - 1] for i, a in enumerate(centres)]
        return np.mean([any(math.dist(p, c) <= r for c, r in zip(centres, reach)) for p in points])
    return covered(samples, reference), covered(reference, samples)


def test_precision_and_recall_by_hand():
    """On a line: the references 0 1 2 3 reach 3 2 2 3, so -3 to 6; the samples 1 6 9 10 20 reach 9 5 8 9 14, so -8 to 34 is covered."""
    line = [torch.tensor(values, dtype=torch.float64)[:, None] for values in ([1, 6, 9, 10, 20], [0, 1, 2, 3])]
    assert common.precision_recall(*line) == (2 / 5, 1)
    assert common.precision_recall(*line[::-1]) == (1, 2 / 5)
    assert common.precision_recall(line[0] + 100, line[1]) == (0, 0)


def test_precision_and_recall_by_brute_force_and_by_torch_fidelity():
    samples, reference = normal(60, 3, 5), 1.5 * normal(45, 3, 6)
    wanted = brute_force(samples, reference)
    assert 0.1 < wanted[0] < 0.9 and 0.1 < wanted[1] < 0.9 and wanted[0] != wanted[1]
    a, b = torch.from_numpy(samples), torch.from_numpy(reference)
    assert common.precision_recall(a, b) == pytest.approx(wanted, abs=1e-12)
    assert common.precision_recall(a, b, chunk=7) == pytest.approx(wanted, abs=1e-12)
    assert common.precision_recall(a, b, k=1) == pytest.approx(brute_force(samples, reference, 1), abs=1e-12)
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    theirs = prc.prc_features_to_metric(a, b, verbose=False)
    assert common.precision_recall(a, b) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_distances_do_not_drown_in_large_features():
    """In float32 |a|^2 + |b|^2 - 2ab of features near 1000 would lose all that sets these apart."""
    samples, reference = normal(30, 4, 7) + 1000, 1.3 * normal(30, 4, 8) + 1000
    wanted = brute_force(samples.astype(np.float32).astype(float), reference.astype(np.float32).astype(float))
    assert common.precision_recall(torch.from_numpy(samples).float(), torch.from_numpy(reference).float()) == pytest.approx(wanted)


def test_image_features():
    images = torch.from_numpy(rng.integers(0, 256, (50, 3, 8, 8), dtype=np.uint8))
    order, fake = torch.from_numpy(rng.permutation(50)), Fake(None, None)
    batches = ((order[i:i + 8], images[order[i:i + 8]]) for i in range(0, 50, 8))
    mu, sigma, features, logits = common.image_features(CPU, fake, batches, 50, 20)
    found = fake(images).double()
    torch.testing.assert_close(mu, found[:, :6].mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sigma, found[:, :6].T.cov(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(torch.cat([features, logits], 1).double(), found[:20], rtol=1e-5, atol=1e-6)


# ---- the command

@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a random checkpoint of each script, and 40 digits, the data set they say they were trained on."""
    folder = tmp_path_factory.mktemp("eval")
    images, labels = common.glyphs(40, seed=1, size=16)
    np.savez(folder / "data.npz", arr_0=images, arr_1=labels)
    for script, more in (("ct", {}), ("cd", {}), ("ctm", dict(extra=True)), ("guided_distill", dict(extra=True))):
        model_args = TINY | dict(classes=10, dropout=0.0) | more
        torch.manual_seed(0)
        net = common.UNet(**model_args)
        for p in net.parameters():  # what is zero at first, not to see noise alone
            if not p.any():
                torch.nn.init.normal_(p, std=0.05)
        args = dict(dataset="data.npz", data_dir=None, stage="distill", w_max=4.0 * ("w_max" in more), w_min=0.0, sampler="D", teacher="x")
        args["w_max"] = 4.0 if script == "guided_distill" else 0.0
        common.save_checkpoint(folder / f"{script}.pt", dict(script=script, step=7, N=2, args=args, model_args=model_args, ema=net.state_dict()))
    common.save_checkpoint(folder / "plain.pt", common.UNet(**common.NETS["glyphs"], classes=10).state_dict())
    return folder


@pytest.fixture
def command(workplace, monkeypatch, capsys):
    """Run a script in this process, in the workplace, with the stand-in for Inception; returns what it printed and its record."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(common, "ranks_differ", False)
    monkeypatch.setattr(common, "Inception", Fake)
    (workplace / "eval.jsonl").unlink(missing_ok=True)

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [str(ROOT / f"{script}.py"), *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(sys.argv[0], run_name="__main__")
        assert end.value.code == 0
        return capsys.readouterr().out.strip(), json.loads((workplace / "eval.jsonl").read_text().splitlines()[-1])
    return run


FP32 = ["--precision", "fp32", "--device", "cpu"]
MEASURES = ("FID@30", "IS", "precision", "recall")


def by_hand(images, reference):
    """All four measures of uint8 images (n,H,W,3), from the stand-in's features at once, by numpy."""
    (x, logits), (r, _) = (Fake(None, None)(torch.from_numpy(part.transpose(0, 3, 1, 2).copy())).double().split([6, 5], 1)
                           for part in (images, reference))
    (m1, S1), (m2, S2) = moments(x.numpy()), moments(r.numpy())
    fid = ((m1 - m2) ** 2).sum() + S1.trace() + S2.trace() - 2 * np.sqrt(np.linalg.eigvals((S1 @ S2).numpy()).real).sum()
    p = logits.softmax(1)
    scores = [(part * (part / part.mean(0)).log()).sum(1).mean().exp() for part in p.split(len(p) // 10)]
    return [fid.item(), np.mean(scores), *brute_force(x.numpy(), r.numpy())]


SCRIPTS = {
    "ct": (["--sigmas", 80, 1], "NFE 2, sigmas 80.0,1.0,"),
    "cd": (["--w", 0], "NFE 1,"),
    "ctm": (["--steps", 3, "--gamma", 0.5], "NFE 3, steps 3, gamma 0.5,"),
    "guided_distill": (["--w", 1.5], "NFE 2, sampler D, w 1.5,"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_measures_what_it_saves(command, workplace, script):
    """The numbers are those of the file that --sample with the same flags writes: n, seed, labels, network calls and all."""
    flags, words = SCRIPTS[script]
    line, record = command(script, "--ckpt", f"{script}.pt", "--eval", 30, "--seed", 3, "--labels", 2, 5, *flags, *FP32)
    monkey_flags = ["--ckpt", f"{script}.pt", "--sample", 30, "--seed", 3, "--labels", 2, 5, "--save", "s.npz", *flags, *FP32]
    command(script, *monkey_flags)
    with np.load(workplace / "s.npz") as saved, np.load(workplace / "data.npz") as data:
        assert saved["arr_1"].tolist() == [2, 5] * 15
        assert [record[key] for key in MEASURES] == pytest.approx(by_hand(saved["arr_0"], data["arr_0"]), rel=1e-4)
    assert words in line and "30 samples, labels 2 5 in turn," in line and "seed 3, EMA weights of" in line
    assert "reference data.npz, 40 images, sha" in line and record["reference_sha"] in line and "\n" not in line
    assert line.startswith(f"FID@30 {record['FID@30']:.3f}, IS {record['IS']:.3f}, precision ")
    assert (record["n"], record["seed"], record["step"], record["labels"]) == (30, 3, 7, "labels 2 5 in turn")
    assert record["nfe"] == int(words.split()[1].strip(",")) and record["args"]["ckpt"] == f"{script}.pt"


def test_cd_teacher_counts_its_guided_calls(command, workplace):
    state = torch.load(workplace / "cd.pt", weights_only=True)
    model_args = state["model_args"] | dict(null=True)
    common.save_checkpoint(workplace / "teacher.pt", state | dict(
        args=state["args"] | dict(stage="teacher"), model_args=model_args, ema=common.UNet(**model_args).state_dict()))
    line, record = command("cd", "--ckpt", "teacher.pt", "--eval", 10, "--N", 3, "--w", 1, *FP32)
    assert "NFE 10, N 3, w 1.0," in line and record["nfe"] == 10 and "all labels in turn" in line


def evaluation(workplace, monkeypatch, capsys, draw, n, batch=64, y=None, **more):
    """`common.evaluate` of images that `draw` makes, with the stand-in: the line, and the record."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(common, "ranks_differ", False)
    monkeypatch.setattr(common, "Inception", more.pop("inception", Fake))
    args = types.SimpleNamespace(**dict(eval=n, inception=None, dataset="data.npz", data_dir=None, labels=None, seed=0, ckpt="x.pt") | more)
    common.evaluate(args, CPU, draw, y, (3, 16, 16), 1, {}, batch)
    record = json.loads((workplace / "eval.jsonl").read_text().splitlines()[-1])
    return capsys.readouterr().out.strip(), record


def data_set(workplace):
    """A draw function that gives the data set itself, image i for place i."""
    images = torch.from_numpy(np.load(workplace / "data.npz")["arr_0"]).permute(0, 3, 1, 2)
    return lambda y, noise, shape, indices: images[indices].float() / 127.5 - 1


@pytest.mark.parametrize("batch", [64, 7])
def test_the_training_images_against_themselves(workplace, monkeypatch, capsys, batch):
    line, record = evaluation(workplace, monkeypatch, capsys, data_set(workplace), 40, batch)
    assert line.startswith("FID@40 0.000, IS ") and "unconditional" in line
    assert record["FID@40"] < 1e-12 and record["precision"] == record["recall"] == 1


def test_copies_reach_their_original_alone(workplace, monkeypatch, capsys):
    """Ten of the images, four times each: all are references, whose own neighbours are copies, at distance 0."""
    ten = data_set(workplace)
    _, record = evaluation(workplace, monkeypatch, capsys, lambda y, noise, shape, i: ten(y, noise, shape, i % 10), 40)
    assert record["precision"] == 1 and record["recall"] == 10 / 40 and record["FID@40"] > 1e-3


def test_at_most_ten_thousand_references_are_kept(workplace, monkeypatch, capsys):
    """All images for FID, some, drawn at random, for precision and recall: the line says so."""
    monkeypatch.setattr(common, "REFERENCE_IMAGES", 15)
    line, record = evaluation(workplace, monkeypatch, capsys, data_set(workplace), 40)
    assert record["FID@40"] < 1e-12 and record["recall"] == 1 and record["precision"] < 1
    assert "reference data.npz, 40 images (15 images for precision and recall)" in line


def test_references_are_kept_from_everywhere(workplace, monkeypatch):
    """Fifteen different ones, not the first: images of a folder are sorted by class."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(common, "REFERENCE_IMAGES", 15)
    dataset, fake = common.load_dataset("data.npz", None, 16), Fake(None, None)
    everything = fake(dataset.__getitems__(np.arange(40))[0])[:, :6]
    for statistics in (None, "given"):
        mu, _, features, _ = common.reference_features(CPU, fake, dataset, statistics)
        kept = torch.cdist(features, everything).argmin(1).tolist()
        torch.testing.assert_close(features, everything[kept], rtol=1e-5, atol=1e-6)
        assert len({*kept}) == 15 and min(kept) < 13 and max(kept) > 26
        torch.testing.assert_close(mu.float(), (features if statistics else everything).mean(0), rtol=1e-5, atol=1e-6)


def test_a_last_batch_of_one():
    images = rng.integers(0, 256, (65, 16, 16, 3), dtype=np.uint8)
    mu, sigma, features, sha = common.reference_features(CPU, Fake(None, None), common.ArrayImages([images], None, 16, "65"), None)
    found = Fake(None, None)(torch.from_numpy(images).permute(0, 3, 1, 2))[:, :6]
    torch.testing.assert_close(mu.float(), found.mean(0), rtol=1e-5, atol=1e-6)
    planes = (hashlib.sha256(image.transpose(2, 0, 1).tobytes()).digest()[:8] for image in images)
    assert sha == hashlib.sha256(b"".join(planes)).hexdigest()[:12]


def test_batch_size_does_not_matter(workplace, monkeypatch, capsys):
    def draw(y, noise, shape, indices):
        assert torch.equal(y, indices % 10)
        return (noise(torch.zeros(shape)) / 3 + y.view(-1, 1, 1, 1) / 10 - 0.5).clamp(-1, 1)
    y = torch.arange(40) % 10
    records = [evaluation(workplace, monkeypatch, capsys, draw, 40, batch, y)[1] for batch in (64, 3)]
    for key in ("FID@40", "IS", "precision", "recall"):
        assert records[0][key] == pytest.approx(records[1][key], rel=1e-6)
    other = evaluation(workplace, monkeypatch, capsys, draw, 40, y=y, seed=1)[1]
    assert other["FID@40"] != pytest.approx(records[0]["FID@40"], rel=1e-3)


def test_called_fid_at_50000_samples_only(workplace, monkeypatch, capsys):
    for name, value in (("precision_recall", (0.5, 0.25)), ("inception_score", 3.0)):
        monkeypatch.setattr(common, name, lambda *_, value=value: value)
    monkeypatch.setattr(common, "draw_part", lambda draw, part, *_: torch.zeros(len(part), 16, 16, 3, dtype=torch.uint8))
    line, record = evaluation(workplace, monkeypatch, capsys, None, 50_000, batch=5000)
    assert line.startswith(f"FID {record['FID']:.3f}, IS 3.000, precision 0.500, recall 0.250: 50,000 samples")
    line, record = evaluation(workplace, monkeypatch, capsys, None, 49_999, batch=5000)
    assert line.startswith("FID@49999 ") and "FID" not in record


def test_statistics_stand_for_images(workplace, monkeypatch, capsys):
    """EDM's layout is FID's alone; with images beside the statistics, as in ADM's, precision and recall too."""
    data = np.load(workplace / "data.npz")["arr_0"]
    x = Fake(None, None)(torch.from_numpy(data.transpose(0, 3, 1, 2).copy()))[:, :6].double().numpy()
    edm = dict(mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    np.savez(workplace / "edm.npz", **edm)
    np.savez(workplace / "adm.npz", data[:25], **edm, mu_s=np.zeros(3), sigma_s=np.eye(3))
    np.savez(workplace / "first.npz", data[:25])
    draw = lambda y, noise, shape, i: (noise(torch.zeros(shape)) / 2).clamp(-1, 1)  # noqa: E731
    (_, images), (line, edm), (both, adm), (_, first) = (
        evaluation(workplace, monkeypatch, capsys, draw, 30, dataset=f"{name}.npz") for name in ("data", "edm", "adm", "first"))
    assert edm["FID@30"] == pytest.approx(images["FID@30"], rel=1e-6) and adm["FID@30"] == edm["FID@30"]
    assert edm["IS"] == images["IS"] and "precision" not in edm and "recall" not in edm
    assert "reference edm.npz, statistics without images for precision and recall, sha" in line
    assert (adm["precision"], adm["recall"]) == (first["precision"], first["recall"]) != (images["precision"], images["recall"])
    assert "reference adm.npz, statistics (25 images for precision and recall), sha" in both


def test_the_hash_tells_references_apart(workplace, monkeypatch, capsys):
    """One hash for the same images in another file; another where a pixel or the order differs."""
    data = np.load(workplace / "data.npz")["arr_0"]
    changed = data.copy()
    changed[3, 5, 5, 1] ^= 1
    np.save(workplace / "same.npy", data)
    np.save(workplace / "changed.npy", changed)
    np.save(workplace / "turned.npy", data[::-1])
    with zipfile.ZipFile(workplace / "same.zip", "w") as archive:
        from PIL import Image
        for i, image in enumerate(data):
            with archive.open(f"{i:05d}.png", "w") as file:
                Image.fromarray(image).save(file, "PNG")
    shas = [evaluation(workplace, monkeypatch, capsys, data_set(workplace), 10, dataset=name)[1]["reference_sha"]
            for name in ("data.npz", "same.npy", "same.zip", "changed.npy", "turned.npy")]
    assert shas[0] == shas[1] == shas[2] and len({*shas}) == 3
    planes = (hashlib.sha256(image.transpose(2, 0, 1).tobytes()).digest()[:8] for image in data)
    assert shas[0] == hashlib.sha256(b"".join(planes)).hexdigest()[:12]


def test_the_reference_is_the_training_data_unless_named():
    found = dict(args=dict(dataset="imagenet64", data_dir="there"))
    for dataset, data_dir, wanted in ((None, None, ("imagenet64", "there")), (None, "here", ("imagenet64", "here")),
                                      ("imagenet64", None, ("imagenet64", "there")), ("cifar10", None, ("cifar10", None)),
                                      ("cifar10", "here", ("cifar10", "here")), ("x.npz", None, ("x.npz", None))):
        assert common.dataset_of(types.SimpleNamespace(dataset=dataset, data_dir=data_dir, ckpt="x.pt"), found) == wanted


DRIVER = f"""
import sys, runpy
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import common
from test_eval import Fake
common.Inception = Fake
sys.argv[0] = {str(ROOT / 'ct.py')!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_equal_one(command, workplace):
    """They share the references and the samples; 130 samples are three batches, of which one has two."""
    flags = ["--ckpt", "ct.pt", "--eval", 130, "--dataset", "many.npz", *FP32]
    np.savez(workplace / "many.npz", common.glyphs(150, seed=2, size=16)[0])
    alone, record = command("ct", *flags)
    (workplace / "driver.py").write_text(DRIVER)
    done = subprocess.run([*torchrun(2), str(workplace / "driver.py"), *map(str, flags)], cwd=workplace, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == alone  # one line, the same
    two = json.loads((workplace / "eval.jsonl").read_text().splitlines()[-1])
    for key in ("FID@130", "IS", "precision", "recall"):
        assert two.pop(key) == pytest.approx(record.pop(key), rel=1e-6)
    assert two == record


def test_records_are_appended(command, workplace):
    """Another line each time, even after one that a killed process left half-written."""
    file = workplace / "eval.jsonl"
    command("ct", "--ckpt", "ct.pt", "--eval", 10, *FP32)
    file.write_text(file.read_text() + '{"FID@50": 1')
    command("ct", "--ckpt", "ct.pt", "--eval", 11, *FP32)
    first, broken, second = file.read_text().splitlines()
    assert json.loads(first)["n"] == 10 and broken == '{"FID@50": 1' and json.loads(second)["n"] == 11


def test_what_cannot_be_written_was_printed(workplace, monkeypatch, capsys):
    (workplace / "eval.jsonl").unlink(missing_ok=True)
    (workplace / "eval.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot write eval.jsonl: Is a directory"):
        evaluation(workplace, monkeypatch, capsys, data_set(workplace), 10)
    (workplace / "eval.jsonl").rmdir()
    assert capsys.readouterr().out.startswith("FID@10 ")


# ---- Inception itself

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as --inception takes it, of random weights that let a signal through."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    net = module.FeatureExtractorInceptionV3("random", ["2048"])
    monkeypatch.undo()
    torch.manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.nn.init.normal_(net.fc.bias)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(net.state_dict(), path)
    return path


def test_inception_is_torch_fidelitys(weights, monkeypatch):
    """Its two outputs are the pooled features, and those times the last layer's matrix, without the bias."""
    from torch_fidelity import FeatureExtractorInceptionV3 as Theirs
    load, loads = torch.load, []
    monkeypatch.setattr(torch, "load", lambda file, *args, **more: loads.append((file, more)) or load(file, *args, **more))
    inception = common.Inception(weights, torch.device("cpu"))
    assert [more["weights_only"] for file, more in loads if not isinstance(file, io.BytesIO)] == [True]  # theirs unpickles: not our file
    images = torch.from_numpy(rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8))
    features, logits = inception(images).split(inception.widths, 1)
    theirs = Theirs("theirs", ["768", "2048"], str(weights)).eval()
    assert torch.equal(features, theirs(images)[1]) and features.std() > 1e-3 and not inception.net.training
    torch.testing.assert_close(logits, features @ load(weights, weights_only=True)["fc.weight"].T)
    assert not inception.published and common.file_sha(weights) == inception.sha


def test_published_weights_are_known_by_their_hash(weights, monkeypatch, tmp_path):
    """The name of the published file ends with the first eight digits of its SHA-256."""
    import torch_fidelity.feature_extractor_inceptionv3 as module
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(module, "URL_INCEPTION_V3", f"https://nowhere/weights-inception-2015-12-05-{hashlib.sha256(weights.read_bytes()).hexdigest()[:8]}.pth")
    (tmp_path / "checkpoints").mkdir()
    os.link(weights, tmp_path / "checkpoints" / module.URL_INCEPTION_V3.rsplit("/")[-1])
    assert common.Inception(None, torch.device("cpu")).published  # found where the library keeps them


IMPORTABLE = f"sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest"  # see there: a torchvision of another build


def test_the_whole_with_inception(command, weights, monkeypatch):
    """Real features end to end: the same images as the reference give 0."""
    images = common.glyphs(10, seed=1, size=16)[0]
    np.savez("few.npz", images)
    monkeypatch.setattr(common, "Inception", INCEPTION)
    monkeypatch.setattr(common, "draw_part", lambda draw, part, *_: torch.from_numpy(images)[part])
    line, record = command("ct", "--ckpt", "ct.pt", "--eval", 10, "--dataset", "few.npz", "--inception", weights, *FP32)
    assert line.startswith("FID@10 0.000, IS ") and "precision 1.000, recall 1.000: 10 samples" in line
    assert line.endswith(f"Inception {common.file_sha(weights)}, {weights}, not the weights of published numbers")
    assert 0 <= record["FID@10"] < 1e-9 and record["inception_sha"] == common.file_sha(weights)


class Payload:
    def __reduce__(self):
        return open, ("unpickled", "w")


def test_weights_are_never_unpickled(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = torch.load(weights, weights_only=True)
    torch.save({**state, "more": Payload()}, "evil.pth")
    torch.save({key: value for key, value in state.items() if "Mixed_7c" not in key}, "other.pth")
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:1_000_000])
    for name, message in (("evil.pth", "evil.pth is no checkpoint, or holds more than tensors"), ("nowhere.pth", "nowhere.pth: No such file"),
                          ("other.pth", "--inception other.pth holds other weights"), ("cut.pth", "cut.pth is no checkpoint, or is damaged")):
        with pytest.raises(UserError, match=message) as error:
            common.Inception(name, torch.device("cpu"))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "unpickled").exists()


def test_missing_weights_and_package(monkeypatch, tmp_path):
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("a download nobody asked for"))
    with pytest.raises(UserError, match=f"fetch https://.*6726825d.pth and name the file with --inception, or put it into {tmp_path}/checkpoints"):
        common.Inception(None, torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match=r"--eval needs torch-fidelity \(pip install torch-fidelity\)"):
        common.Inception(None, torch.device("cpu"))


# ---- mistakes

MISTAKES = {
    "without a checkpoint": (["--eval", 100], "--eval applies to sampling only: name a checkpoint with --ckpt"),
    "too few for ten splits": (["--ckpt", "ct.pt", "--eval", 9], "argument --eval: invalid count"),
    "with a file to save": (["--ckpt", "ct.pt", "--eval", 10, "--save", "x.png"], "--save does not apply with --eval"),
    "with a number of samples": (["--ckpt", "ct.pt", "--eval", 10, "--sample", 8], "--sample does not apply with --eval"),
    "weights for nothing": (["--ckpt", "ct.pt", "--inception", "x.pth"], "--inception does not apply without --eval"),
    "a reference for nothing": (["--ckpt", "ct.pt", "--dataset", "data.npz"], "--dataset does not apply without --eval"),
    "where a path lies": (["--ckpt", "ct.pt", "--eval", 10, "--data-dir", "x"], "--data-dir says where a named data set lies"),
    "no such reference": (["--ckpt", "ct.pt", "--eval", 10, "--dataset", "nowhere.npz"], "nowhere.npz does not exist"),
    "three references": (["--ckpt", "ct.pt", "--eval", 10, "--dataset", "three.npy"], "three.npy holds 3 image(s)"),
    "statistics of other features": (["--ckpt", "ct.pt", "--eval", 10, "--dataset", "wide.npz"], "wide.npz: mu must be of shape (6,)"),
    "statistics that are no numbers": (["--ckpt", "ct.pt", "--eval", 10, "--dataset", "nan.npz"], "nan.npz: mu must be of shape (6,)"),
    "pickled statistics": (["--ckpt", "ct.pt", "--eval", 10, "--dataset", "pickled.npz"], "pickled.npz cannot be read as an npz"),
    "a broken npz": (["--ckpt", "ct.pt", "--eval", 10, "--dataset", "broken.npz"], "broken.npz cannot be read as an npz"),
    "labels it has not": (["--ckpt", "ct.pt", "--eval", 10, "--labels", 10], "--labels 10: this network has the labels 0 to 9"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(command, workplace, mistake):
    np.save(workplace / "three.npy", np.zeros((3, 16, 16, 3), np.uint8))
    np.savez(workplace / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez(workplace / "nan.npz", mu=np.full(6, np.nan), sigma=np.eye(6))
    np.savez(workplace / "pickled.npz", mu=np.array([print] * 6), sigma=np.eye(6))
    (workplace / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    flags, message = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        command("ct", *flags)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (workplace / "eval.jsonl").exists()


def test_mistakes_of_other_scripts(command, workplace):
    for script, flags, message in (
            ("cd", ["--ckpt", "cd.pt", "--eval", 10, "--edit", "denoise"], "--edit does not apply with --eval"),
            ("cd", ["--ckpt", "cd.pt", "--eval", 10, "--search-times", 2], "--search-times does not apply with --eval"),
            ("cd", ["--ckpt", "cd.pt", "--dataset", "data.npz"], "--dataset does not apply without --eval or --search-times"),
            ("ctm", ["--ckpt", "ctm.pt", "--eval", 10, "--mask", "x.png"], "--mask does not apply without --edit"),
            ("cd", ["--ckpt", "plain.pt", "--eval", 10], "plain.pt does not say what it was trained on; name --dataset")):
        with pytest.raises(UserError) as error:
            command(script, *flags)
        assert message in str(error.value)


def test_latent_students_are_refused(command, workplace):
    state = copy.deepcopy(torch.load(workplace / "guided_distill.pt", weights_only=True))
    state["args"]["teacher"] = "diffusers:pipe"
    common.save_checkpoint(workplace / "latent.pt", state)
    with pytest.raises(UserError, match="--eval does not apply to latent models"):
        command("guided_distill", "--ckpt", "latent.pt", "--eval", 10)


def test_the_command_line_says_it_in_one_line(workplace, tmp_path):
    done = run_script("--ckpt", workplace / "ct.pt", "--eval", 10, cwd=workplace, code=2, prelude=IMPORTABLE, env=dict(TORCH_HOME=str(tmp_path)))
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("ct.py: error: --eval needs ")
