"""guided_distill.py as a user runs it: stages, rounds, resuming, several processes, sampling,
editing, latent models and mistakes."""
import copy
import json
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common
import guided_distill as gd
from test_scripts import BAD_LOSS, STOP_AT_3, assert_same, records
from util import ROOT, SMALL, assert_mistake, fill, last, run_script, torchrun

FP32 = ["--precision", "fp32", "--device", "cpu"]
STEPS = "--batch-size 8 --micro-batch 4 --log-every 1 --sample-every 0 --save-every 0".split()
NET = SMALL[: SMALL.index("--precision")]
ROUNDS = "--start-N 8 --end-N 2 --round-steps 3 --last-steps 3".split()
STAGE_1 = ["--stage1-steps", 3]
SHORT = [*FP32, *STEPS, *ROUNDS, "--lr", 1e-3]
GUIDED = [*SHORT, *STAGE_1, "--flip", "--ema-decay", 0.8, "--w-min", 1]
RUN = [*NET, *GUIDED, "--teacher-steps", 3]
STUDENTS = {"stage1": 0, "N0004": 4, "N0002": 2}
STOPPED = 128 + signal.SIGTERM
CPU = torch.device("cpu")
COMMON_SCRIPTS = "guided_distill", "cd"


def stop_after(step):
    return STOP_AT_3.replace(
        'record["step"] == 2', f'record["step"] == {step - 1} and "teacher" not in str(self.path)')


def run(*flags, **more):
    return run_script(*flags, script="guided_distill.py", **more)


def load(path):
    return torch.load(path, weights_only=True)


def losses(folder):
    return [record["loss"] for record in records(folder)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A teacher with label dropout, stage 1, and rounds of 4 and 2 steps."""
    folder = tmp_path_factory.mktemp("trained")
    run(*RUN, "--out-dir", "whole", "--sample-every", 500, cwd=folder, code=0)
    return folder / "whole"


@pytest.fixture
def teacher(trained):
    return ["--teacher", trained / "teacher" / "last.pt"]


def test_one_command_leaves_the_students_of_all_rounds(trained):
    teacher, end = last(trained / "teacher"), last(trained)
    assert (teacher["step"], teacher["script"]) == (3, "cd")
    assert teacher["args"]["label_dropout"] == 0.1 and teacher["model_args"]["null"]
    assert (end["step"], end["N"], end["args"]["total_steps"]) == (9, 2, 9)
    assert end["model_args"]["cond"] and end["data"]["names"] == list("0123456789")
    for k, (name, N) in enumerate(STUDENTS.items(), start=1):
        student = load(trained / f"{name}.pt")
        assert (student["step"], student["N"], student["args"]["sampler"]) == (3 * k, N, "D")
        assert "optimizer" not in student and student["data"] == end["data"]
        grid = Image.open(trained / "samples" / f"{3 * k:06d}_{name}.png")
        assert grid.size == (3 * (3 * 160 + 2 * 4), 3 * 128)  # w = 1, 1.75, 4
    assert_same(load(trained / "N0002.pt")["ema"], end["ema"])
    assert_same(load(trained / "ema.pt"), end["ema"])
    lines = records(trained)
    assert [line["N"] for line in lines] == [0] * 3 + [4] * 3 + [2] * 3
    np.testing.assert_allclose([line["lr"] for line in lines], [1e-3, 2e-3 / 3, 1e-3 / 3] * 3)
    told = {"loss", "loss_bins", "grad_norm", "images_per_s", "peak_gb", "skipped"}
    assert all(told <= line.keys() for line in lines)


@pytest.mark.parametrize("steps", [(2, 5), (3, 7)], ids=["in stage 1, then in a round",
                                                         "at its end, then in the last round"])
def test_stopped_and_resumed_is_the_same_run(trained, tmp_path, steps):
    for step in steps:
        prelude = stop_after(step)
        run(*RUN, "--out-dir", "run", cwd=tmp_path, prelude=prelude, code=STOPPED)
        assert last(tmp_path / "run")["step"] == step
    run(*RUN, "--out-dir", "run", cwd=tmp_path, code=0)
    assert_same(last(tmp_path / "run"), last(trained))
    for name in STUDENTS:
        file = f"{name}.pt"
        assert_same(load(tmp_path / "run" / file)["ema"], load(trained / file)["ema"])
    assert losses(tmp_path / "run") == losses(trained)


def test_two_processes_equal_one(trained, teacher, tmp_path):
    """With the same teacher: Adam's first steps are little more than signs, and would make much
    of a last bit in it."""
    run(*GUIDED, *teacher, "--out-dir", "run", cwd=tmp_path, launcher=torchrun(2), code=0)
    for name in ("net", "before", "ema"):
        assert_same(last(tmp_path / "run")[name], last(trained)[name], 1e-5)
    assert_same(load(tmp_path / "run" / "N0004.pt")["ema"], load(trained / "N0004.pt")["ema"], 1e-5)
    for ours, one in zip(records(tmp_path / "run"), records(trained), strict=True):
        for key in ("loss", "grad_norm"):
            np.testing.assert_allclose(ours[key], one[key], 1e-3)
        empty, wanted = ([value is None for value in r["loss_bins"]] for r in (ours, one))
        assert empty == wanted


def test_the_loop_by_hand(trained):
    """Stage 1 and both rounds from their formulas: the batch at once, clipped gradients, Adam
    anew in each round, EMA, the teacher."""
    dataset, state = common.load_dataset("glyphs", None, 16), last(trained)
    origin, _ = common.load_network(trained / "teacher" / "last.pt", ("cd",))
    common.seed_everything(common.INIT, 0)
    net = common.UNet(**state["model_args"])
    net.load_state_dict(origin.state_dict(), strict=False)
    indices, log = iter(list(common.index_batches(len(dataset), 0, 0, 9, 8, 4))), records(trained)
    low, high = np.arctan(0.002), np.arctan(80)
    column = lambda c: torch.as_tensor(c, dtype=torch.float32).view(4, 1, 1, 1)
    angle = lambda tau: np.where(tau > 0, low + (high - low) * tau, 0)
    waves = lambda phi: (column(np.cos(phi)), column(np.sin(phi)))

    def v_of(net, z, tau, y, *cond):
        phi = angle(tau)
        alpha, sigma = waves(phi)
        t = torch.tensor(np.tan(phi), dtype=torch.float32)
        return (alpha * z - common.denoise(net, z / alpha, t, y, *cond)) / sigma

    def step(z, v, phi):
        alpha, sigma = waves(phi)
        return alpha * z - sigma * v

    for k in range(9):
        N = (0, 4, 2)[k // 3]
        if k % 3 == 0:
            before, ema = (copy.deepcopy(net).requires_grad_(False) for _ in range(2))
            optimizer = torch.optim.Adam(net.parameters())
        losses = []
        for m in range(2):
            common.seed_everything(common.STEP, 0, k, m)
            x0, y = common.to_device(dataset.__getitems__(next(indices)), CPU, True)
            w = 1 + 3 * torch.rand(4)
            if N == 0:
                tau = torch.rand(4, dtype=torch.float64).numpy()
            else:
                i = torch.randint(1, N + 1, (4,)).double().numpy()
                tau, tau1, tau2 = i / N, (i - 0.5) / N, (i - 1) / N
            noise, phi = torch.randn_like(x0), angle(tau)
            alpha, sigma = waves(phi)
            z = alpha * x0 + sigma * noise
            with torch.no_grad():
                if N == 0:
                    cond, null = (v_of(origin, z, tau, label)
                                  for label in (y, torch.full((4,), 10)))
                    target = column(1 + w) * cond - column(w) * null
                else:
                    phi1, phi2 = angle(tau1), angle(tau2)
                    z1 = step(z, v_of(before, z, tau, y, 25 * w), phi - phi1)
                    z2 = step(z1, v_of(before, z1, tau1, y, 25 * w), phi1 - phi2)
                    alpha, sigma = waves(phi - phi2)
                    target = (alpha * z - z2) / sigma
            missed = v_of(net, z, tau, y, 25 * w) - target
            losses.append(missed.square().mean((1, 2, 3)))
        optimizer.zero_grad()
        loss = torch.cat(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for key, value in (("loss", loss), ("grad_norm", norm)):
            np.testing.assert_allclose(log[k][key], value.item(), 2e-3, err_msg=f"step {k}")
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - k % 3 / 3)
        optimizer.step()
        with torch.no_grad():
            for p, p_ema in zip(net.parameters(), ema.parameters()):
                p_ema.copy_(0.8 * p_ema + 0.2 * p)
        if k % 3 == 2:
            kept = load(trained / f"{list(STUDENTS)[k // 3]}.pt")["ema"]
            far = max((a - kept[name]).abs().max().item() for name, a in ema.state_dict().items())
            # Of steps of 1e-3: rounding may turn the sign that is a first step of Adam.
            assert far < 3e-4, (k, far)


@pytest.mark.parametrize("flags, kept", [
    (["--sampler", "S", "--end-N", 1, *STAGE_1], ["N0001", "N0002", "N0004", "N0008", "stage1"]),
    (["--w-max", 0], ["N0002", "N0004"]),
    (["--sampler", "encoder"], ["N0002", "N0004"]),
], ids=["stochastic", "without guidance", "encoder"])
def test_other_kinds_run_and_resume(teacher, tmp_path, flags, kept):
    a, b = tmp_path / "a", tmp_path / "b"
    more = [*SHORT, *flags, *teacher, "--out-dir"]
    run(*more, "a", cwd=tmp_path, prelude=stop_after(4), code=STOPPED)
    run(*more, "a", cwd=tmp_path, code=0)
    run(*more, "b", cwd=tmp_path, code=0)
    state = last(b)
    assert_same(last(a), state)
    assert sorted({path.stem for path in b.glob("*.pt")} - {"last", "ema"}) == kept
    assert state["model_args"]["cond"] == ("stage1" in kept)
    assert np.isfinite(losses(b)).all()
    if "S" in flags:  # one step from pure noise is a jump that the student before makes already
        assert_same(state["net"], state["before"])
        assert_same(state["ema"], state["before"])


def test_a_steep_step_is_clipped_and_a_bad_one_left_out(teacher, tmp_path):
    folder = tmp_path / "run"
    flags = [*SHORT, *teacher, "--out-dir", "run", *"--w-max 0 --start-N 4 --end-N 1".split(),
             "--round-steps", 2, "--last-steps", 2]
    bad = BAD_LOSS.replace("pseudo_huber", "l2").replace("BAD", "{2}")  # step 1, first half
    bad = bad.replace("else 1)", "else 1e4)")
    run(*flags, cwd=tmp_path, prelude=f"{stop_after(2)}\n{bad}", code=STOPPED)
    state = last(folder)
    moments = state["optimizer"]["state"].values()
    assert (state["step"], state["skipped"]) == (2, 1)
    assert {int(moment["step"]) for moment in moments} == {1}
    length = torch.cat([moment["exp_avg"].flatten() for moment in moments]).norm().item()
    assert records(folder)[1]["grad_norm"] > 10
    assert abs(length - 0.1) < 1e-4  # a tenth of a gradient of length 1
    run(*flags, cwd=tmp_path, code=0)
    assert [r["skipped"] for r in records(folder)] == [1, 1, 1, 1]
    assert last(folder)["skipped"] == 1
    assert all(p.isfinite().all() for p in last(folder)["net"].values())


def test_unlabelled_images_and_the_ideal_teacher(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
    plain = [*NET, *FP32, *STEPS, *"--dataset x.npy --w-max 0 --start-N 4".split(),
             "--round-steps", 2, "--last-steps", 2]
    run(*plain, "--teacher-steps", 2, "--out-dir", "a", cwd=tmp_path, code=0)
    run(*plain, "--teacher", "ideal", "--stage1-steps", 2, "--out-dir", "b", cwd=tmp_path, code=0)
    assert (tmp_path / "b" / "stage1.pt").exists() and not (tmp_path / "a" / "stage1.pt").exists()
    run("--ckpt", "a/N0001.pt", "--sample", 3, *FP32, cwd=tmp_path, code=0)


# ---- sampling and editing

@pytest.fixture(scope="module")
def wild(trained, tmp_path_factory):
    """The students and their teacher, and an encoder, with weights to which label and w matter;
    after three steps they hardly do."""
    folder = tmp_path_factory.mktemp("wild")
    (folder / "teacher").mkdir()
    names = ["stage1.pt", "N0002.pt", "N0004.pt", "teacher/last.pt", "up.pt"]
    for k, name in enumerate(names):
        state = load(trained / name.replace("up", "N0004"))
        if name == "up.pt":
            state["model_args"]["cond"] = False
            state["args"]["sampler"] = "encoder"
        net = fill(common.UNet(**state["model_args"]), k)
        torch.save(state | dict(ema=net.state_dict()), folder / name)
    return folder


@pytest.fixture(scope="module")
def digits():
    """Two images of the data set, (2,16,16,3) uint8."""
    images, _ = common.load_dataset("glyphs", None, 16).__getitems__([0, 1])
    return images.permute(0, 2, 3, 1).numpy()


def drawn(folder, *flags, **more):
    done = run(*flags, "--save", "x.npz", *FP32, cwd=folder, code=0, **more)
    return np.load(folder / "x.npz")["arr_0"].astype(int), done


@torch.no_grad()
def by_hand(path, y, w, N, sampler, z, *more, angle=gd.edm_angle, **options):
    """What `sample` makes of z with a network, labels y and weight w: uint8, or z itself."""
    net, _ = common.load_network(path, ("guided_distill", "cd"))
    w = torch.full((len(z),), w)
    v = gd.conditioned(gd.net_v(net, angle), y, w)
    if net.null_y is not None and not net.cond:
        v = common.guide(gd.edm_v(common.net_denoiser(net), angle), y, w)
    if sampler != "encoder":
        v = gd.clipped(v, angle)
    return gd.sample(v, angle, N, sampler, z, *more, **options)


def far(found, z):
    """How far images are from what is to be seen of z, at most."""
    return np.abs(found - common.to_uint8(z.clamp(-1, 1)).numpy().astype(int)).max()


def test_samples_are_the_formulas(wild, tmp_path):
    """A student in its steps, stage 1 in any number and stochastically, the teacher guided:
    with the noise of the seed."""
    y, zeros = torch.arange(4), torch.zeros(4, 3, 16, 16)
    for name, flags, N, sampler, w, calls in (
            ("N0002.pt", [], 2, "D", 1.0, 2), ("N0004.pt", ["--w", 2.5, "--N", 4], 4, "D", 2.5, 4),
            ("stage1.pt", ["--N", 3, "--w", 2, "--sampler", "S"], 3, "S", 2.0, 3),
            ("teacher/last.pt", ["--N", 3, "--w", 2], 3, "D", 2.0, 6),
            ("teacher/last.pt", ["--N", 3, "--w", -0.5], 3, "D", -0.5, 6)):
        found, done = drawn(tmp_path, "--ckpt", wild / name, "--sample", 4, *flags)
        assert f"{calls} network call(s)" in done.stdout

        def wanted(y, w):
            noise = common.SeededNoise(torch.arange(4), 0)
            return by_hand(wild / name, y, w, N, sampler, noise(zeros), noise)

        assert far(found, wanted(y, w)) <= 1, name
        assert far(found, wanted(y, w - 1)) > 10 and far(found, wanted(y + 1, w)) > 10, name


@torch.no_grad()
def test_at_weight_minus_one_a_teacher_does_not_look_at_labels(wild, tmp_path):
    path = wild / "teacher" / "last.pt"
    net, _ = common.load_network(path, ("cd",))
    null = lambda z, tau: gd.edm_v(common.net_denoiser(net), gd.edm_angle)(z, tau, None)
    noise = common.SeededNoise(torch.arange(4), 0)
    x = gd.sample(gd.clipped(null, gd.edm_angle), gd.edm_angle, 3, "D",
                  noise(torch.zeros(4, 3, 16, 16)))
    for labels in ((), ("--labels", 3)):
        found, done = drawn(tmp_path, "--ckpt", path, "--N", 3, "--w", -1, "--sample", 4, *labels)
        assert far(found, x) <= 1 and "6 network call(s)" in done.stdout


def test_weights_below_zero_are_trained(teacher, tmp_path):
    """--w-min -1: stage 1 draws w from [-1, --w-max]; students draw there, by default at 0."""
    spy = """
def guide(D, y, w, real=common.guide):
    open("w.txt", "a").write(" ".join(map(str, w.tolist())) + " ")
    return real(D, y, w)
monkeypatch.setattr(common, "guide", guide)
"""
    short = "--start-N 2 --stage1-steps 1 --round-steps 1 --last-steps 1 --sample-every 0".split()
    batch = ["--batch-size", 64, "--micro-batch", 64]
    run(*FP32, *teacher, *short, *batch, "--w-min", -1, "--w-max", 2, "--out-dir", "run",
        cwd=tmp_path, prelude=spy, code=0)
    w = np.unique((tmp_path / "w.txt").read_text().split()).astype(float)  # the trial's too
    w.sort()
    assert len(w) == 64 and abs((w + 1) / 3 - (np.arange(64) + 0.5) / 64).max() < 0.15
    for flags, w in (([], 0.0), (["--w", -1], -1.0)):
        found, done = drawn(tmp_path, "--ckpt", "run/N0001.pt", "--sample", 2, *flags)
        noise = common.SeededNoise(torch.arange(2), 0)(torch.zeros(2, 3, 16, 16))
        path = tmp_path / "run" / "N0001.pt"
        assert far(found, by_hand(path, torch.arange(2), w, 1, "D", noise)) <= 1
        assert "1 network call(s)" in done.stdout


def test_editing(wild, digits, tmp_path):
    for i, image in enumerate(digits):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    images = digits.repeat(2, 0)
    edit = ["--ckpt", wild / "N0004.pt", "--image", "0.png", "1.png", "--labels", 3, 4,
            "--sample", 2, "--edit"]
    found, done = drawn(tmp_path, *edit, "img2img", "--strength", 0)
    assert np.array_equal(found, images) and "0 of 4 steps" in done.stdout

    known, y = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor([3, 3, 4, 4])
    inside = torch.zeros(16, 16)
    inside[4:12, 4:12] = 1
    first = common.SeededNoise(torch.arange(4), 0)(known)

    def noised(tau):
        phi = np.arctan(0.002) + tau * (np.arctan(80) - np.arctan(0.002)) if tau else 0.0
        return float(np.cos(phi)) * known + float(np.sin(phi)) * first

    def paste(z, tau):
        return torch.where(inside > 0, z, noised(tau[0].item()))

    half, done = drawn(tmp_path, *edit, "img2img", "--strength", 0.4, "--w", 2)  # 1.6 steps: two
    assert far(half, by_hand(wild / "N0004.pt", y, 2.0, 4, "D", noised(0.5), start=2)) <= 1
    assert "2 of 4 steps" in done.stdout
    painted, _ = drawn(tmp_path, *edit, "inpaint")
    assert far(painted, by_hand(wild / "N0004.pt", y, 1.0, 4, "D", first, paste=paste)) <= 1
    assert (painted[0] != painted[1])[4:12, 4:12].any()
    assert np.array_equal(painted[:, inside == 0], images[:, inside == 0])
    run(*edit, "inpaint", "--save", "x.png", *FP32, cwd=tmp_path, code=0)
    assert Image.open(tmp_path / "x.png").size == (3 * 3 * 16, 2 * 3 * 16)


def test_style_transfer(wild, digits, tmp_path):
    """Encoded by one network and decoded by another: the formulas, with the labels of each."""
    Image.fromarray(digits[0]).save(tmp_path / "0.png")
    found, _ = drawn(tmp_path, "--ckpt", wild / "N0004.pt", "--edit", "style", "--encoder",
                     wild / "up.pt", "--image", "0.png", "--from-labels", 3, "--labels", 5)
    x0 = torch.from_numpy(digits[:1]).permute(0, 3, 1, 2) / 127.5 - 1
    above = lambda tau: torch.where(tau > 0, gd.edm_angle(tau), gd.BOTTOM)

    def wanted(origin, label):
        origin, label = torch.tensor([origin]), torch.tensor([label])
        z = by_hand(wild / "up.pt", origin, 0.0, 4, "encoder", x0, angle=above)
        return by_hand(wild / "N0004.pt", label, 1.0, 4, "D", z)

    assert far(found, wanted(3, 5)) <= 1
    assert far(found, wanted(5, 5)) > 10 and far(found, wanted(3, 3)) > 10
    done = run("--ckpt", wild / "up.pt", cwd=tmp_path, code=2)
    assert "is to be named as --encoder" in done.stderr


# ---- latent models

# see there: a torchvision of another build
IMPORTABLE = f"sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest"
# nine steps, after which w is to be heard
LATENT = [*FP32, *STEPS, *ROUNDS, *STAGE_1, "--lr", 0.03, "--w-max", 14, "--ema-decay", 0.5,
          "--teacher", "diffusers:pipe", "--dataset", "latents.npz"]


def run_latent(folder, *flags, prelude="", **more):
    return run(*flags, cwd=folder, prelude=f"{IMPORTABLE}\n{prelude}", **more)


def pipeline(folder, prediction="epsilon", labels=False, **more):
    """A random latent diffusion pipeline, of 17k parameters, and a data set for it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    plain = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                 mid_block_type="UNetMidBlock2D", num_class_embeds=4)
    text = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2,
                cross_attention_dim=8)
    small = dict(sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)
    unet = diffusers.UNet2DConditionModel(**small | (plain if labels else text) | more)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, prediction_type=prediction)
    for part, name in ((unet, "unet"), (vae, "vae"), (scheduler, "scheduler")):
        part.save_pretrained(folder / "pipe" / name)
    if not labels:
        pipe = diffusers.StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None,
                                                 requires_safety_checker=False)
        pipe.save_pretrained(folder / "pipe")
    rng = np.random.default_rng(0)
    latents, embeddings, null = (rng.normal(size=size).astype(np.float32)
                                 for size in ((12, 4, 8, 8), (12, 5, 8), (5, 8)))
    conditions = dict(embeddings=embeddings, null=null)
    if labels:
        conditions = dict(labels=np.arange(12) % 3)
    if more.get("in_channels") == 9:
        masks = rng.random((12, 1, 8, 8)) < 0.5
        masked = rng.normal(size=(12, 4, 8, 8)).astype(np.float32)
        conditions |= dict(masks=masks, masked=masked)
    np.savez(folder / "latents.npz", latents=latents.astype(np.float16), **conditions)


def draw_alone(folder, students):
    """Pictures of exported folders, drawn by a process that knows diffusers only."""
    code = f"""
import sys; {IMPORTABLE}
import numpy as np, torch, diffusers
z, c = np.load("z.npy"), np.load("latents.npz")
words = torch.from_numpy(c["embeddings"][:2])
for name, N, w in {students!r}:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        "run/" + name, safety_checker=None, tokenizer=None, text_encoder=None,
        feature_extractor=None, image_encoder=None)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(prompt_embeds=words, negative_prompt_embeds=words, latents=torch.from_numpy(z),
                  guidance_scale=w + 1, num_inference_steps=N, output_type="np").images
    np.save(name + ".npy", images)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def of_diffusers(folder, pipe="pipe"):
    """The UNet and alpha^2 of a pipeline, and the data beside it; extra channels are in `extra`."""
    import diffusers
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / pipe / "unet")
    alphas = diffusers.DDIMScheduler.from_pretrained(folder / pipe / "scheduler").alphas_cumprod
    data = {key: torch.from_numpy(value).float()
            for key, value in np.load(folder / "latents.npz").items()}
    extra = [data.get(key, data["latents"][:, :0]) for key in ("masks", "masked")]
    return unet, alphas, data | dict(extra=torch.cat(extra, 1))


def first_loss(folder, prediction):
    """Of stage 1, by hand: the student still being its conditional teacher, it misses
    w (v_cond - v_null)."""
    unet, alphas, data = of_diffusers(folder)
    losses, indices = [], common.index_batches(12, 0, 0, 9, 8, 4)
    for m in range(2):
        common.seed_everything(common.STEP, 0, 0, m)
        batch, w = next(indices), 2 + 12 * torch.rand(4)
        k = (1000 * torch.rand(4, dtype=torch.float64)).ceil().long() - 1
        a = alphas[k].view(4, 1, 1, 1)
        z = a.sqrt() * data["latents"][batch] + (1 - a).sqrt() * torch.randn(4, 4, 8, 8)
        with torch.no_grad():
            z = torch.cat([z, data["extra"][batch]], 1)
            cond = unet(z, k, data["embeddings"][batch]).sample
            missed = cond - unet(z, k, data["null"].expand(4, -1, -1)).sample
        if prediction == "epsilon":
            missed = missed / a.sqrt()
        losses.append(w**2 * missed.square().mean((1, 2, 3)))
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_text_pipeline_is_distilled_and_drawn_with_diffusers_alone(tmp_path, prediction):
    pipeline(tmp_path, prediction)
    whole = tmp_path / "run"
    run_latent(tmp_path, *LATENT, "--out-dir", "run", code=0)
    assert [r["N"] for r in records(whole)] == [0] * 3 + [4] * 3 + [2] * 3
    np.testing.assert_allclose(losses(whole)[0], first_loss(tmp_path, prediction), 1e-3)
    z = common.SeededNoise(torch.arange(2), 0)(torch.zeros(2, 4, 8, 8))
    np.save(tmp_path / "z.npy", z.numpy())
    students = [("N0002", 2, 7.5), ("N0004", 4, 2.0), ("stage1", 8, 14.0)]
    draw_alone(tmp_path, students)
    for name, N, w in students:
        ours, done = drawn(tmp_path, "--ckpt", f"run/{name}.pt", "--w", w, "--N", N, "--sample", 2,
                           prelude=IMPORTABLE)
        alone = np.load(tmp_path / f"{name}.npy")
        assert f"{N} network call(s)" in done.stdout
        assert ours.shape == (2, 16, 16, 3) and ours.std() > 5
        assert np.abs(ours - (255 * alone).round()).max() <= 1, name
    other, _ = drawn(tmp_path, "--ckpt", "run/stage1.pt", "--w", 2, "--N", 8, "--sample", 2,
                     prelude=IMPORTABLE)
    assert np.abs(other - ours).max() > (10 if prediction == "v_prediction" else 0)
    for name, N, message in (("N0002", 4, "was trained for N 2"),
                             ("stage1", 1001, "the teacher knows 1000 times")):
        done = run_latent(tmp_path, "--ckpt", f"run/{name}.pt", "--N", N, code=2)
        assert message in done.stderr
    if prediction == "epsilon":  # what follows is the same for both
        return
    run_latent(tmp_path, *LATENT, "--gradient-checkpointing", "--out-dir", "less", code=0)
    assert_same(last(tmp_path / "less"), last(whole), 1e-6)
    again = [*LATENT, "--out-dir", "again"]
    run_latent(tmp_path, *again, prelude=stop_after(5), code=STOPPED)
    run_latent(tmp_path, *again, code=0)
    assert_same(last(tmp_path / "again"), last(whole))


def test_a_class_conditional_latent_model(tmp_path):
    pipeline(tmp_path, "v_prediction", labels=True)
    out_dir, pipe = tmp_path / "run", tmp_path / "pipe"
    train = [*LATENT, "--out-dir", "run"]
    run_latent(tmp_path, *train, "--sample-every", 500, code=0)
    grid = Image.open(out_dir / "samples" / "000009_N0002.png")
    assert grid.size == (3 * (3 * 16 + 2 * 4), 3 * 8 * 16)  # eight rows of 16 pixels
    blocks = [np.asarray(grid)[:, x : x + 48].astype(int) for x in (0, 60, 120)]  # w = 0, 3.5, 14
    assert blocks[0].std() > 5
    assert all(np.abs(blocks[a] - blocks[b]).max() > 2 for a, b in ((0, 1), (0, 2), (1, 2)))
    assert last(out_dir)["args"]["w_min"] == 0  # GD's range of class-conditional latents
    assert (out_dir / "N0002" / "unet" / "config.json").exists()
    away = tmp_path / "elsewhere"  # a student knows where its teacher and its data lie
    away.mkdir()
    draw = ["--ckpt", "../run/N0002.pt", "--sample", 3, "--save", "x.npz", *FP32, "--labels"]
    run_latent(away, *draw, 2, code=0)
    assert len(np.load(away / "x.npz")["arr_0"]) == 3
    done = run_latent(away, *draw, 3, code=2)
    assert done.stderr.endswith("this network has the labels 0 to 2\n"), done.stderr
    edit_config(pipe / "scheduler" / "scheduler_config.json", "v_prediction", "sample")
    assert "is not the teacher any more" in run_latent(away, *draw, 2, code=2).stderr
    run_latent(tmp_path, *train, "--overwrite", "--end-N", 4, code=0)
    assert (out_dir / "N0004" / "unet").is_dir() and not (out_dir / "N0002").exists()
    (pipe / "vae").rename(tmp_path / "vae")  # missed at once, not at the first picture
    done = run_latent(tmp_path, *LATENT, "--out-dir", "other", "--sample-every", 500, code=2)
    assert "pipe/vae does not decode latents (4, 8, 8); training needs it for" in done.stderr
    assert not (tmp_path / "other").exists()


def open_model(folder, guided=True, data="latents.npz", to_v=False):
    run_on = SimpleNamespace(device=CPU, dtype=torch.float32, checkpointing=False, main=True)
    return gd.LatentModel(f"diffusers:{folder / 'pipe'}", folder / data, guided, run_on, to_v)


def edit_config(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_data_that_a_latent_model_refuses(tmp_path):
    def refused(message, guided=True, **arrays):
        np.savez(tmp_path / "bad.npz", **dict(np.load(tmp_path / "latents.npz")) | arrays)
        with pytest.raises(common.UserError, match=message):
            open_model(tmp_path, guided, "bad.npz")

    words, null = np.zeros((12, 5, 8)), np.zeros((5, 8))
    for labels in (False, True):
        pipeline(tmp_path, "v_prediction", labels=labels)
        open_model(tmp_path)
        refused(r"takes {'latents': \(12, 4, 8, 8\), .*, not {'latents': \(12, 4, 8, 4\)",
                latents=np.zeros((12, 4, 8, 4)))
        refused(r"not {'latents': \(9, 4, 8, 8\)", latents=np.zeros((9, 4, 8, 8)))
    refused("labels 0 to 2; if guided, its last", labels=np.arange(12) % 4)
    refused("labels 0 to 3;", guided=False, labels=np.arange(12) % 5)
    refused(r"'labels': \(12,\)}, not .*'labels': \(12, 3\)", labels=np.eye(12, 3, dtype=int))
    refused(r"'labels': \(12,\)}, not .*embeddings", embeddings=words, null=null)
    open_model(tmp_path, guided=False)
    pipeline(tmp_path, "v_prediction")
    refused(r"'null': \(5, 8\)}, not .*\(5, 6\)", embeddings=words[..., :6], null=null[:, :6])
    refused(r"'null': \(5, 8\)}, not .*\(4, 8\)", null=null[:4])
    np.savez(tmp_path / "bad.npz", latents=np.zeros((12, 4, 8, 8)), labels=np.arange(12))
    with pytest.raises(common.UserError, match="embeddings.*, not .*labels"):
        open_model(tmp_path, data="bad.npz")


def test_latent_models_that_are_refused(tmp_path):
    pipeline(tmp_path)
    model, unet = open_model(tmp_path), tmp_path / "pipe" / "unet"
    edit_config(unet / "config.json", "{", "{ ")
    assert open_model(tmp_path).digest != model.digest
    edit_config(tmp_path / "pipe" / "scheduler" / "scheduler_config.json",
                '"rescale_betas_zero_snr": false', '"rescale_betas_zero_snr": true')
    with pytest.raises(common.UserError, match="nothing about x at zero SNR; .* --stage teacher"):
        open_model(tmp_path)
    assert open_model(tmp_path, to_v=True).prediction == "v_prediction"
    (tmp_path / "full").write_text("a file where a folder should be")
    with pytest.raises(common.UserError, match="cannot write .*full"):
        model.export(model.net, tmp_path / "full")
    model.shape = 3, 8, 8
    with pytest.raises(common.UserError, match=r"vae does not decode latents \(3, 8, 8\)"):
        model.open_vae()
    for more in (dict(in_channels=8), dict(time_cond_proj_dim=16),
                 dict(class_embed_type="timestep"), dict(sample_size=(8, 16))):
        pipeline(tmp_path, "v_prediction", **more)
        with pytest.raises(common.UserError, match="more than square latents"):
            open_model(tmp_path)
    unet.rename(tmp_path / "unet")
    with pytest.raises(common.UserError, match="cannot read .*unet and .*: No such file"):
        open_model(tmp_path)


def test_teachers_of_another_family_are_refused(tmp_path):
    """By the class of their scheduler; one of the family gives the betas that it would draw with,
    those too that its file leaves out."""
    diffusers = pytest.importorskip("diffusers")
    pipeline(tmp_path, "v_prediction")
    file = tmp_path / "pipe" / "scheduler" / "scheduler_config.json"

    def model_of(**settings):
        file.write_text(json.dumps(settings))
        return open_model(tmp_path)
    for name in gd.SCHEDULERS:
        model, own = model_of(_class_name=name), getattr(diffusers, name)()
        assert torch.equal(model.scheduler.betas, own.betas), name
        assert model.prediction == own.config.prediction_type
    for settings, message in (
            (dict(_class_name="FlowMatchEulerDiscreteScheduler", shift=3.0),
             "its scheduler is FlowMatchEulerDiscreteScheduler; what can be distilled has"),
            (dict(_class_name="EDMEulerScheduler"), "its scheduler is EDMEulerScheduler"),
            (dict(beta_start=0.1), "its scheduler is None"),
            (dict(_class_name="UniPCMultistepScheduler", prediction_type="flow_prediction",
                  use_flow_sigmas=True), "UniPCMultistepScheduler is set up for a flow"),
            (dict(_class_name="DDIMScheduler", prediction_type="flow"), "continuous times .flow."),
            (dict(_class_name="EulerDiscreteScheduler", timestep_type="continuous"),
             "EulerDiscreteScheduler is set up for a flow or continuous")):
        with pytest.raises(common.UserError, match=message):
            model_of(**settings)


@pytest.mark.parametrize("shards", [{}, dict(max_shard_size="30KB")], ids=["one file", "shards"])
def test_weights_in_fp16_only(tmp_path, capsys, shards):
    """They are read, which is said, and what is exported is found without a variant's name."""
    diffusers = pytest.importorskip("diffusers")
    pipeline(tmp_path, "v_prediction")
    whole = open_model(tmp_path)
    whole.open_vae()
    capsys.readouterr()
    for part, kind in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        folder = tmp_path / "pipe" / part
        model = kind.from_pretrained(folder).half()
        shutil.rmtree(folder)
        model.save_pretrained(folder, variant="fp16", **shards)
    half = open_model(tmp_path)
    half.open_vae()
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "fp16" in line] == [
        f"{tmp_path / 'pipe' / part} holds weights in fp16 only" for part in ("unet", "vae")]
    half.export(half.net, tmp_path / "exported")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "exported" / "vae")
    pairs = [(half.teacher, whole.teacher), (half.vae, whole.vae), (vae, whole.vae)]
    for found, wanted in pairs:
        for p, q in zip(found.parameters(), wanted.parameters(), strict=True):
            assert p.dtype == torch.float32 and torch.equal(p, q.half().float())


def test_weights_that_a_file_lacks(tmp_path):
    """diffusers would draw them at random."""
    pipeline(tmp_path, "v_prediction")
    files = pytest.importorskip("safetensors.torch")
    path = tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = files.load_file(path)
    del weights["conv_in.bias"]
    files.save_file(weights, path)
    with pytest.raises(common.UserError, match="pipe/unet holds no weights conv_in.bias"):
        open_model(tmp_path)


def test_the_adapter(tmp_path):
    """Timesteps, one DDIM step and guidance as diffusers has them; a student begins as its
    teacher, to the last bit."""
    diffusers = pytest.importorskip("diffusers")
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    w = torch.tensor([2.0, 14.0])
    for prediction in ("epsilon", "v_prediction", "sample"):
        pipeline(tmp_path, prediction)
        model = open_model(tmp_path)
        _, c, none = model.dataset.__getitems__(np.arange(2))
        y = c, none
        teacher, student = model.v(model.teacher), model.v(model.net)
        for N in (1, 2, 4, 8):
            scheduler = model.scheduler
            scheduler.set_timesteps(N)
            taus = torch.arange(N, 0, -1, dtype=torch.float64) / N
            assert (model.index(taus) - 1).tolist() == scheduler.timesteps.tolist()
            for tau, k in zip(taus, scheduler.timesteps):
                tau = tau.expand(2)
                with torch.no_grad():
                    out = model.teacher(z, k, encoder_hidden_states=c).sample
                    found = gd.ddim(gd.conditioned(teacher, y, None), model.angle, z, tau,
                                    tau - 1 / N)
                    assert torch.equal(student(z, tau, y, w), teacher(z, tau, y))
                wanted = scheduler.step(out, k, z).prev_sample
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            null = model.dataset.null.expand(2, -1, -1)
            assert torch.equal(teacher(z, tau, (None, none)), teacher(z, tau, (null, none)))
    wanted = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(None, w, 256)
    # sines of 14000, in float32
    torch.testing.assert_close(gd.w_features(w, 256), wanted, rtol=0, atol=2e-3)


# ---- mistakes

STYLE = "--edit style --image images/0.png --labels 1 --from-labels"
MISTAKES = [
    ("--ckpt N0002.pt --N 4", "--N 4: N0002.pt was trained for N 2"),
    ("--ckpt N0002.pt --sampler S", "--sampler S: N0002.pt was trained for sampler D"),
    ("--ckpt N0002.pt --w 4.5", "--w 4.5: N0002.pt was trained for weights from 1 to 4"),
    ("--ckpt N0002.pt --w -0.5", "--w -0.5: N0002.pt was trained for weights from 1 to 4"),
    ("--ckpt N0002.pt --w -1.5",
     "argument --w: invalid guidance weight (-1 or more) value: '-1.5'"),
    ("--ckpt plain.pt --w -1", "--w -1: plain.pt was trained for weights from 0 to 0"),
    ("--w-min -1.5", "argument --w-min: invalid guidance weight (-1 or more) value: '-1.5'"),
    ("--w-max -1", "argument --w-max: invalid number value: '-1'"),
    ("--w-min -1 --w-max 0", "--w-min does not apply without --w-max"),
    ("--ckpt N0002.pt --sigmas 80", "unrecognized arguments: --sigmas"),
    ("--sigmas 80", "unrecognized arguments: --sigmas"),
    ("--total-steps 80",
     "--total-steps does not apply to rounds: name --stage1-steps"),
    ("--N 4", "--N does not apply"),
    ("--start-N 12", "--start-N 12 --end-N 1: steps are halved"),
    ("--end-N 6", "--end-N 6: steps are halved"),
    ("--start-N 8 --end-N 8", "--end-N 8: steps are halved"),
    ("--w-min 3 --w-max 2", "--w-min 3.0 is above --w-max 2.0"),
    ("--w-max 0 --stage1-steps 5", "--stage1-steps does not apply without --w-max"),
    ("--sampler encoder --w-max 2", "--sampler encoder goes with --w-max 0"),
    ("--sampler encoder --sample-every 5", "with --w-max 0, --sample-every 0 and"),
    ("--stage teacher", "teachers of images are trained by python cd.py --stage teacher"),
    ("--stage teacher --teacher diffusers:pipe --w-max 2", "--w-max does not apply with --stage"),
    ("--stage teacher --teacher diffusers:pipe --start-N 4", "--start-N does not apply with --sta"),
    ("--stage teacher --teacher diffusers:pipe", "needs --dataset FILE.npz"),
    ("--stage teacher --teacher diffusers:pipe --dataset x.npz --dropout 0.1",
     "--dropout does not apply with --teacher diffusers:PATH"),
    ("--label-dropout 0.1", "--label-dropout does not apply with --stage distill"),
    ("--ckpt N0002.pt --stage teacher", "--stage does not apply with --ckpt"),
    ("--teacher plain.pt", "plain.pt, trained without --label-dropout, cannot guide"),
    ("--dataset images", "needs labels"),
    ("--no-class-cond", "needs labels, and there are none; so does --w-max"),
    ("--teacher nowhere.pt", "nowhere.pt: No such file"),
    ("--teacher none", "--teacher none: what is distilled"),
    ("--teacher N0002.pt", "N0002.pt was written by guided_distill.py"),
    ("--teacher diffusers:pipe", "needs --dataset FILE.npz"),
    ("--dataset bedroom256 --teacher ideal", "bedroom256 needs --data-dir"),
    ("--ckpt N0002.pt --edit img2img", "--edit img2img needs --image"),
    ("--ckpt N0002.pt --edit inpaint --strength 1",
     "--strength does not apply with --edit inpaint"),
    ("--ckpt N0002.pt --image x.png", "--image does not apply without --edit"),
    ("--ckpt N0002.pt --edit inpaint --image images/0.png", "say with --labels"),
    (f"--ckpt S.pt {STYLE} 1 --encoder encoder.pt", "--edit style decodes without noise"),
    (f"--ckpt N0002.pt {STYLE} 1", "--edit style needs --encoder"),
    (f"--ckpt N0002.pt {STYLE} 1 --encoder N0002.pt", "what --sampler encoder trains, and only"),
    (f"--ckpt N0002.pt {STYLE} 11 --encoder encoder.pt", "--from-labels 11: this network has"),
]


@pytest.fixture(scope="module")
def workplace(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    student, teacher = load(trained / "N0002.pt"), last(trained / "teacher")
    for name, sampler in (("N0002", "D"), ("encoder", "encoder"), ("S", "S")):
        args = student["args"] | dict(sampler=sampler)
        torch.save(student | dict(args=args), folder / f"{name}.pt")
    torch.save(teacher, folder / "teacher.pt")
    for key in ("net", "ema"):
        teacher[key]["label_emb.weight"] = teacher[key]["label_emb.weight"][:10]
    teacher["model_args"]["null"] = False
    torch.save(teacher, folder / "plain.pt")
    (folder / "images").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "images" / "0.png")
    return folder


@pytest.mark.parametrize("flags, message", MISTAKES, ids=[row[0] for row in MISTAKES])
def test_mistakes_end_in_one_line(workplace, flags, message):
    assert_mistake(flags.split(), message, "guided_distill.py", workplace)


def test_help(tmp_path):
    done = run("--help", cwd=tmp_path, code=0)
    for flag in ("teacher teacher-steps sampler w-min w-max start-N end-N "
                 "stage1-steps round-steps last-steps weighting w N edit image strength mask "
                 "encoder from-labels ckpt sample").split():
        assert f"\n  --{flag}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
