"""guided_distill.py as a user runs it: stages, rounds, resuming, several processes, sampling,
editing, latent models and mistakes."""

import copy
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
STEPS += ["--lr", 1e-3]
NET = SMALL[: SMALL.index("--precision")]
HALVINGS = ["--round-steps", 3, "--last-steps", 3]
ROUNDS = ["--start-N", 8, "--end-N", 2, *HALVINGS, "--stage1-steps", 3]
RUN = [
    *NET, *FP32, *STEPS, *ROUNDS, "--teacher-steps", 3, "--flip", "--ema-decay", 0.8, "--w-min", 1]


def stop_after(step):
    return STOP_AT_3.replace(
        'record["step"] == 2', f'record["step"] == {step - 1} and "teacher" not in str(self.path)')


def run(*flags, **more):
    return run_script(*flags, script="guided_distill.py", **more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A teacher with label dropout, stage 1, and rounds of 4 and 2 steps."""
    folder = tmp_path_factory.mktemp("trained")
    run(*RUN, "--out-dir", "whole", "--sample-every", 500, cwd=folder, code=0)
    return folder / "whole"


def load(path):
    return torch.load(path, weights_only=True)


def test_one_command_leaves_the_students_of_all_rounds(trained):
    teacher, end = last(trained / "teacher"), last(trained)
    assert (
        teacher["step"], teacher["script"], teacher["args"]["label_dropout"],
        teacher["model_args"]["null"]) == (3, "cd", 0.1, True)
    assert (end["step"], end["N"], end["args"]["total_steps"]) == (9, 2, 9) and end["model_args"][
        "cond"]
    for k, (name, N) in enumerate((("stage1", 0), ("N0004", 4), ("N0002", 2))):
        student = load(trained / f"{name}.pt")
        assert (student["step"], student["N"], student["args"]["sampler"]) == (
            3 * (k + 1), N, "D") and "optimizer" not in student
        assert Image.open(trained / "samples" / f"{3 * (k + 1):06d}_{name}.png").size == (
            3 * (3 * 160 + 2 * 4),
            3 * 128,
        )  # w = 1, 1.75, 4
    assert_same(load(trained / "N0002.pt")["ema"], end["ema"])
    assert_same(torch.load(trained / "ema.pt", weights_only=True), end["ema"])
    lines = records(trained)
    assert [line["N"] for line in lines] == [0] * 3 + [4] * 3 + [2] * 3
    np.testing.assert_allclose([line["lr"] for line in lines], [1e-3, 2e-3 / 3, 1e-3 / 3] * 3)
    assert all(
        {"loss", "loss_bins", "grad_norm", "images_per_s", "peak_gb", "skipped"} <= line.keys()
        for line in lines)


@pytest.mark.parametrize(
    "step", [2, 3, 5, 7], ids=["in stage 1", "at its end", "in a round", "in its successor"])
def test_stopped_and_resumed_is_the_same_run(trained, tmp_path, step):
    run(*RUN, "--out-dir", "run", cwd=tmp_path, prelude=stop_after(step), code=128 + signal.SIGTERM)
    assert last(tmp_path / "run")["step"] == step
    run(*RUN, "--out-dir", "run", cwd=tmp_path, code=0)
    assert_same(last(tmp_path / "run"), last(trained))
    for name in ("stage1", "N0004", "N0002"):
        assert_same(
            load(tmp_path / "run" / f"{name}.pt")["ema"], load(trained / f"{name}.pt")["ema"])
    assert [r["loss"] for r in records(tmp_path / "run")] == [r["loss"] for r in records(trained)]


def test_two_processes_equal_one(trained, tmp_path):
    """With the same teacher: Adam's first steps are little more than signs, and would make much
    of a last bit in it."""
    flags = [*RUN[RUN.index("--precision") :]]
    del flags[flags.index("--teacher-steps") : flags.index("--teacher-steps") + 2]
    run(
        *flags, "--teacher", trained / "teacher" / "last.pt", "--out-dir", "run", cwd=tmp_path,
        launcher=torchrun(2), code=0)
    for name in ("net", "before", "ema"):
        assert_same(last(tmp_path / "run")[name], last(trained)[name], 1e-5)
    assert_same(load(tmp_path / "run" / "N0004.pt")["ema"], load(trained / "N0004.pt")["ema"], 1e-5)
    for ours, one in zip(records(tmp_path / "run"), records(trained), strict=True):
        np.testing.assert_allclose(
            [ours["loss"], ours["grad_norm"]], [one["loss"], one["grad_norm"]], 1e-3)
        assert [value is None for value in ours["loss_bins"]] == [
            value is None for value in one["loss_bins"]]


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

    def v_of(D):
        def v(z, tau, *c):
            phi = angle(tau)
            t = torch.tensor(np.tan(phi), dtype=torch.float32)
            return (column(np.cos(phi)) * z - D(z / column(np.cos(phi)), t, *c)) / column(
                np.sin(phi))

        return v

    for k in range(9):
        N = (0, 4, 2)[k // 3]
        if k % 3 == 0:
            before, ema = (copy.deepcopy(net).requires_grad_(False) for _ in range(2))
            optimizer = torch.optim.Adam(net.parameters())
        losses = []
        for m in range(2):
            common.seed_everything(common.STEP, 0, k, m)
            x0, y = common.to_device(dataset.__getitems__(next(indices)), torch.device("cpu"), True)
            w = 1 + 3 * torch.rand(4)
            guided = lambda z, t, y, w: common.denoise(net, z, t, y, 25 * w)
            teacher = lambda z, t, y, w: common.denoise(before, z, t, y, 25 * w)
            if N == 0:
                tau = torch.rand(4, dtype=torch.float64).numpy()
            else:
                i = torch.randint(1, N + 1, (4,)).double().numpy()
                tau, tau1, tau2 = i / N, (i - 0.5) / N, (i - 1) / N
            noise, phi = torch.randn_like(x0), angle(tau)
            z = column(np.cos(phi)) * x0 + column(np.sin(phi)) * noise
            with torch.no_grad():
                if N == 0:
                    D = lambda z, t, y: common.denoise(origin, z, t, y)
                    null = torch.full((4,), 10)
                    target = column(1 + w) * v_of(D)(z, tau, y) - column(w) * v_of(D)(z, tau, null)
                else:
                    phi1, phi2 = angle(tau1), angle(tau2)
                    z1 = column(np.cos(phi - phi1)) * z - column(np.sin(phi - phi1)) * v_of(
                        teacher)(z, tau, y, w)
                    z2 = column(np.cos(phi1 - phi2)) * z1 - column(np.sin(phi1 - phi2)) * v_of(
                        teacher)(z1, tau1, y, w)
                    target = (column(np.cos(phi - phi2)) * z - z2) / column(np.sin(phi - phi2))
            losses.append((v_of(guided)(z, tau, y, w) - target).square().mean((1, 2, 3)))
        optimizer.zero_grad()
        loss = torch.cat(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        np.testing.assert_allclose(
            [log[k]["loss"], log[k]["grad_norm"]], [loss.item(), norm.item()], 2e-3,
            err_msg=f"step {k}")
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - k % 3 / 3)
        optimizer.step()
        with torch.no_grad():
            for p, p_ema in zip(net.parameters(), ema.parameters()):
                p_ema.copy_(0.8 * p_ema + 0.2 * p)
        if k % 3 == 2:
            kept = load(trained / ("stage1.pt", "N0004.pt", "N0002.pt")[k // 3])["ema"]
            far = max((a - kept[name]).abs().max().item() for name, a in ema.state_dict().items())
            assert far < 3e-4, (
                k,
                far,
            )  # of steps of 1e-3: rounding may turn the sign that is a first step of Adam


@pytest.mark.parametrize(
    "flags, kept",
    [
        (["--sampler", "S", "--end-N", 1], ["N0008", "N0004", "N0002", "N0001", "stage1"]),
        (["--w-max", 0], ["N0004", "N0002"]), (["--sampler", "encoder"], ["N0004", "N0002"])],
    ids=str,
)
def test_other_kinds_run_and_resume(trained, tmp_path, flags, kept):
    more = [
        *FP32, *STEPS, "--start-N", 8, "--end-N", 2, "--round-steps", 3, "--last-steps", 3, *flags,
        "--teacher", trained / "teacher" / "last.pt"]
    more += ["--stage1-steps", 3] if "stage1" in kept else []
    run(*more, "--out-dir", "a", cwd=tmp_path, prelude=stop_after(4), code=128 + signal.SIGTERM)
    run(*more, "--out-dir", "a", cwd=tmp_path, code=0)
    run(*more, "--out-dir", "b", cwd=tmp_path, code=0)
    assert_same(last(tmp_path / "a"), last(tmp_path / "b"))
    assert sorted(
        p.stem for p in (tmp_path / "b").glob("*.pt") if p.stem not in ("last", "ema")
    ) == sorted(kept)
    assert last(tmp_path / "b")["model_args"]["cond"] == ("stage1" in kept)
    assert all(np.isfinite(r["loss"]) for r in records(tmp_path / "b"))
    if "S" in flags:  # one step from pure noise is a jump that the student before makes already
        assert_same(last(tmp_path / "b")["net"], last(tmp_path / "b")["before"])
        assert_same(last(tmp_path / "b")["ema"], last(tmp_path / "b")["before"])


def test_a_steep_step_is_clipped_and_a_bad_one_left_out(trained, tmp_path):
    flags = [
        *FP32, *STEPS, "--w-max", 0, "--start-N", 4, "--round-steps", 2, "--last-steps", 2,
        "--teacher", trained / "teacher" / "last.pt", "--out-dir", "run"]
    bad = (
        BAD_LOSS.replace("pseudo_huber", "l2").replace("BAD", "{3}").replace("else 1)", "else 1e4)")
    )  # bad: step 2, first half
    run(*flags, cwd=tmp_path, prelude=f"{stop_after(2)}\n{bad}", code=128 + signal.SIGTERM)
    state = last(tmp_path / "run")
    moments = state["optimizer"]["state"].values()
    assert (state["step"], state["skipped"]) == (2, 1) and {
        int(moment["step"]) for moment in moments} == {1}
    length = torch.cat([moment["exp_avg"].flatten() for moment in moments]).norm().item()
    assert (
        records(tmp_path / "run")[0]["grad_norm"] > 10 and abs(length - 0.1) < 1e-4
    )  # a tenth of a gradient of length 1
    run(*flags, cwd=tmp_path, code=0)
    assert [r["skipped"] for r in records(tmp_path / "run")] == [0, 1, 1, 1] and last(
        tmp_path / "run")["skipped"] == 1
    assert all(p.isfinite().all() for p in last(tmp_path / "run")["net"].values())


def test_unlabelled_images_and_the_ideal_teacher(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
    plain = [
        *NET, *FP32, *STEPS, "--dataset", "x.npy", "--w-max", 0, "--start-N", 4, "--round-steps", 2,
        "--last-steps", 2]
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
    for k, (name, made_of) in enumerate(
        {
            "stage1.pt": "", "N0002.pt": "", "N0004.pt": "", "teacher/last.pt": "",
            "up.pt": "N0004.pt"}.items()
    ):
        state = load(trained / (made_of or name))
        if made_of:
            state["model_args"]["cond"], state["args"]["sampler"] = False, "encoder"
        torch.save(
            state | dict(ema=fill(common.UNet(**state["model_args"]), k).state_dict()),
            folder / name)
    return folder


def drawn(folder, *flags, **more):
    done = run(*flags, "--save", "x.npz", *FP32, cwd=folder, code=0, **more)
    return np.load(folder / "x.npz")["arr_0"].astype(int), done


def wanted_of(x):
    return common.to_uint8(x.clamp(-1, 1)).numpy().astype(int)


def test_samples_are_the_formulas(wild, tmp_path):
    """A student in its steps, stage 1 in any number and stochastically, the teacher guided:
    with the noise of the seed."""
    y, zeros = torch.arange(4), torch.zeros(4, 3, 16, 16)
    for name, flags, N, sampler, w, calls in (
        ("N0002.pt", [], 2, "D", 1.0, 2), ("N0004.pt", ["--w", 2.5, "--N", 4], 4, "D", 2.5, 4),
        ("stage1.pt", ["--N", 3, "--w", 2, "--sampler", "S"], 3, "S", 2.0, 3),
        ("teacher/last.pt", ["--N", 3, "--w", 2], 3, "D", 2.0, 6)):
        found, done = drawn(tmp_path, "--ckpt", wild / name, "--sample", 4, *flags)
        net, _ = common.load_network(wild / name, ("guided_distill", "cd"))

        def by_hand(y, w, N=N, sampler=sampler, net=net):
            noise, w_all = common.SeededNoise(torch.arange(4), 0), torch.full((4,), w)
            v = (
                (lambda z, tau: gd.net_v(net, gd.edm_angle)(z, tau, y, w_all)) if net.cond
                else common.guide(gd.edm_v(common.net_denoiser(net), gd.edm_angle), y, w_all))
            with torch.no_grad():
                return wanted_of(gd.sample(v, gd.edm_angle, N, sampler, noise(zeros), noise))

        assert (
            np.abs(found - by_hand(y, w)).max() <= 1 and f"{calls} network call(s)" in done.stdout
        ), name
        assert (
            np.abs(found - by_hand(y, w - 1)).max() > 10
            and np.abs(found - by_hand(y + 1, w)).max() > 10), name


def test_editing(wild, tmp_path):
    dataset = common.load_dataset("glyphs", None, 16)
    for i in range(2):
        Image.fromarray(dataset.__getitems__([i])[0][0].permute(1, 2, 0).numpy()).save(
            tmp_path / f"{i}.png")
    images = np.stack(
        [np.asarray(Image.open(tmp_path / f"{i}.png")).astype(int) for i in range(2)]).repeat(2, 0)
    edit = [
        "--ckpt", wild / "N0004.pt", "--image", "0.png", "1.png", "--labels", 3, 4, "--sample", 2]
    found, done = drawn(tmp_path, *edit, "--edit", "img2img", "--strength", 0)
    assert np.array_equal(found, images) and "0 of 4 steps" in done.stdout

    net, _ = common.load_network(wild / "N0004.pt", ("guided_distill",))
    known, y, inside = (
        torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor([3, 3, 4, 4]),
        torch.zeros(16, 16))
    inside[4:12, 4:12] = 1
    first = common.SeededNoise(torch.arange(4), 0)(known)

    def noised(tau):
        phi = np.arctan(0.002) + tau * (np.arctan(80) - np.arctan(0.002)) if tau else 0.0
        return float(np.cos(phi)) * known + float(np.sin(phi)) * first

    def by_hand(z, w, **more):
        with torch.no_grad():
            return wanted_of(
                gd.sample(
                    lambda z, tau: gd.net_v(net, gd.edm_angle)(z, tau, y, torch.full((4,), w)),
                    gd.edm_angle, 4, "D", z, **more)
            )

    half, done = drawn(
        tmp_path, *edit, "--edit", "img2img", "--strength", 0.4, "--w", 2
    )  # 1.6 steps: two
    assert (
        np.abs(half - by_hand(noised(0.5), 2.0, start=2)).max() <= 1
        and "2 of 4 steps" in done.stdout)
    painted, _ = drawn(tmp_path, *edit, "--edit", "inpaint")
    by_paste = by_hand(
        first, 1.0, paste=lambda z, tau: torch.where(inside > 0, z, noised(tau[0].item())))
    assert np.abs(painted - by_paste).max() <= 1 and (painted[0] != painted[1])[4:12, 4:12].any()
    assert np.array_equal(painted[:, inside == 0], images[:, inside == 0])
    run(*edit, "--edit", "inpaint", "--save", "x.png", *FP32, cwd=tmp_path, code=0)
    assert Image.open(tmp_path / "x.png").size == (3 * 3 * 16, 2 * 3 * 16)


def test_style_transfer(wild, tmp_path):
    """Encoded by one network and decoded by another: the formulas, with the labels of each."""
    image = common.load_dataset("glyphs", None, 16).__getitems__([0])[0]
    Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(tmp_path / "0.png")
    found, _ = drawn(
        tmp_path, "--ckpt", wild / "N0004.pt", "--edit", "style", "--encoder", wild / "up.pt",
        "--image", "0.png", "--from-labels", 3, "--labels", 5)
    up, _ = common.load_network(wild / "up.pt", ("guided_distill",))
    down, _ = common.load_network(wild / "N0004.pt", ("guided_distill",))
    above = lambda tau: torch.where(tau > 0, gd.edm_angle(tau), gd.BOTTOM)

    def by_hand(origin, label):
        with torch.no_grad():
            z = gd.sample(
                lambda z, tau: gd.net_v(up, above)(z, tau, torch.tensor([origin]), None), above, 4,
                "encoder", image / 127.5 - 1)
            return wanted_of(
                gd.sample(
                    lambda z, tau: gd.net_v(down, gd.edm_angle)(
                        z, tau, torch.tensor([label]), torch.ones(1)),
                    gd.edm_angle,
                    4,
                    "D",
                    z,
                )
            )

    assert np.abs(found - by_hand(3, 5)).max() <= 1
    assert np.abs(found - by_hand(5, 5)).max() > 10 and np.abs(found - by_hand(3, 3)).max() > 10
    assert "is to be named as --encoder" in run("--ckpt", wild / "up.pt", cwd=tmp_path, code=2).stderr


# ---- latent models

# see there: a torchvision of another build
IMPORTABLE = f"sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest"
LATENT = [
    *FP32,
    *STEPS[:-1],
    0.03,
    *ROUNDS,
    "--w-max",
    14,
    "--ema-decay",
    0.5,
]  # nine steps, after which w is to be heard


def pipeline(folder, prediction="epsilon", labels=False, **more):
    """A random latent diffusion pipeline, of 17k parameters, and a data set for it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    plain = dict(
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        mid_block_type="UNetMidBlock2D", num_class_embeds=4)
    text = dict(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
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
        diffusers.StableDiffusionPipeline(
            vae, None, None, unet, scheduler, None, None, requires_safety_checker=False
        ).save_pretrained(folder / "pipe")
    rng = np.random.default_rng(0)
    latents, embeddings, null = (
        rng.normal(size=size).astype(np.float32) for size in ((12, 4, 8, 8), (12, 5, 8), (5, 8)))
    conditions = (
        dict(labels=np.arange(12) % 3) if labels else dict(embeddings=embeddings, null=null))
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


def first_loss(folder, prediction):
    """Of stage 1, by hand: the student still being its conditional teacher, it misses w (v_cond
    - v_null)."""
    import diffusers

    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "pipe" / "unet")
    alphas = diffusers.DDIMScheduler.from_pretrained(folder / "pipe" / "scheduler").alphas_cumprod
    data = {
        key: torch.from_numpy(value).float()
        for key, value in np.load(folder / "latents.npz").items()}
    losses, indices = [], common.index_batches(12, 0, 0, 9, 8, 4)
    for m in range(2):
        common.seed_everything(common.STEP, 0, 0, m)
        batch, w, k = (
            next(indices), 2 + 12 * torch.rand(4),
            (1000 * torch.rand(4, dtype=torch.float64)).ceil().long() - 1)
        a = alphas[k].view(4, 1, 1, 1)
        z = a.sqrt() * data["latents"][batch] + (1 - a).sqrt() * torch.randn(4, 4, 8, 8)
        with torch.no_grad():
            missed = (
                unet(z, k, data["embeddings"][batch]).sample
                - unet(z, k, data["null"].expand(4, -1, -1)).sample)
        missed = missed / a.sqrt() if prediction == "epsilon" else missed
        losses.append(w**2 * missed.square().mean((1, 2, 3)))
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_text_pipeline_is_distilled_and_drawn_with_diffusers_alone(tmp_path, prediction):
    pipeline(tmp_path, prediction)
    flags = ["--teacher", "diffusers:pipe", "--dataset", "latents.npz", *LATENT]
    run(*flags, "--out-dir", "run", cwd=tmp_path, prelude=IMPORTABLE, code=0)
    assert [r["N"] for r in records(tmp_path / "run")] == [0] * 3 + [4] * 3 + [2] * 3
    np.testing.assert_allclose(
        records(tmp_path / "run")[0]["loss"], first_loss(tmp_path, prediction), 1e-3)
    np.save(
        tmp_path / "z.npy", common.SeededNoise(torch.arange(2), 0)(torch.zeros(2, 4, 8, 8)).numpy())
    students = [("N0002", 2, 7.5), ("N0004", 4, 2.0), ("stage1", 8, 14.0)]
    draw_alone(tmp_path, students)
    for name, N, w in students:
        draw = ["--ckpt", f"run/{name}.pt", "--w", w, "--N", N, "--sample", 2]
        ours, done = drawn(tmp_path, *draw, prelude=IMPORTABLE)
        alone = np.load(tmp_path / f"{name}.npy")
        assert f"{N} network call(s)" in done.stdout
        assert ours.shape == (2, 16, 16, 3) and ours.std() > 5
        assert np.abs(ours - (255 * alone).round()).max() <= 1, name
    other, _ = drawn(
        tmp_path, "--ckpt", "run/stage1.pt", "--w", 2, "--N", 8, "--sample", 2, prelude=IMPORTABLE)
    assert np.abs(other - ours).max() > (10 if prediction == "v_prediction" else 0)
    assert (
        "was trained for N 2"
        in run("--ckpt", "run/N0002.pt", "--N", 4, cwd=tmp_path, prelude=IMPORTABLE, code=2).stderr)
    if prediction == "epsilon":  # resuming is the same for both
        return
    run(
        *flags, "--out-dir", "again", cwd=tmp_path, prelude=f"{IMPORTABLE}\n{stop_after(5)}",
        code=128 + signal.SIGTERM)
    run(*flags, "--out-dir", "again", cwd=tmp_path, prelude=IMPORTABLE, code=0)
    assert_same(last(tmp_path / "again"), last(tmp_path / "run"))


def test_a_class_conditional_latent_model(tmp_path):
    pipeline(tmp_path, "v_prediction", labels=True)
    train = ["--teacher", "diffusers:pipe", "--dataset", "latents.npz", *LATENT, "--out-dir", "run"]
    run(*train, "--sample-every", 500, cwd=tmp_path, prelude=IMPORTABLE, code=0)
    grid = Image.open(tmp_path / "run" / "samples" / "000009_N0002.png")
    assert grid.size == (3 * (3 * 16 + 2 * 4), 3 * 8 * 16)  # eight rows of 16 pixels
    low, middle, high = (
        np.asarray(grid)[:, x : x + 48].astype(int) for x in (0, 60, 120)
    )  # w = 2, 5, 14
    assert (
        low.std() > 5 and np.abs(low - middle).max() > 2 and np.abs(low - high).max() > 2
        and np.abs(middle - high).max() > 2)
    assert (tmp_path / "run" / "N0002" / "unet" / "config.json").exists()
    away = tmp_path / "elsewhere"  # a student knows where its teacher and its data lie
    away.mkdir()
    draw = ["--ckpt", "../run/N0002.pt", "--sample", 3, "--save", "x.npz", *FP32, "--labels"]
    run(*draw, 2, cwd=away, prelude=IMPORTABLE, code=0)
    assert len(np.load(away / "x.npz")["arr_0"]) == 3
    done = run(*draw, 3, cwd=away, prelude=IMPORTABLE, code=2)
    assert done.stderr.endswith("this network has the labels 0 to 2\n"), done.stderr
    config = tmp_path / "pipe" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("v_prediction", "sample"))
    assert (
        "is not the teacher any more" in run(*draw, 2, cwd=away, prelude=IMPORTABLE, code=2).stderr)
    run(*train, "--overwrite", "--end-N", 4, cwd=tmp_path, prelude=IMPORTABLE, code=0)
    assert (tmp_path / "run" / "N0004" / "unet").is_dir() and not (
        tmp_path / "run" / "N0002").exists()
    (tmp_path / "pipe" / "vae").rename(tmp_path / "vae")  # missed at once, not at the first picture
    done = run(
        *train, "--out-dir", "other", "--sample-every", 500, cwd=tmp_path, prelude=IMPORTABLE,
        code=2)
    assert (
        "pipe/vae does not decode latents (4, 8, 8); training needs it for" in done.stderr
        and not (tmp_path / "other").exists())


def open_model(folder, guided=True, data="latents.npz"):
    run_on = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    return gd.LatentModel(f"diffusers:{folder / 'pipe'}", folder / data, guided, run_on)


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
    with pytest.raises(common.UserError, match="nothing about x at zero SNR"):
        open_model(tmp_path)
    (tmp_path / "full").write_text("a file where a folder should be")
    with pytest.raises(common.UserError, match="cannot write .*full"):
        model.export(model.net, tmp_path / "full")
    model.shape = 3, 8, 8
    with pytest.raises(common.UserError, match=r"vae does not decode latents \(3, 8, 8\)"):
        model.open_vae()
    for more in (dict(in_channels=9), dict(time_cond_proj_dim=16),
                 dict(class_embed_type="timestep"), dict(sample_size=(8, 16))):
        pipeline(tmp_path, "v_prediction", **more)
        with pytest.raises(common.UserError, match="more than square latents"):
            open_model(tmp_path)
    unet.rename(tmp_path / "unet")
    with pytest.raises(common.UserError, match="cannot read .*unet and .*: No such file"):
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
        c = model.dataset.__getitems__(np.arange(2))[1]
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
                    found = gd.ddim(gd.conditioned(teacher, c, None), model.angle, z, tau,
                                    tau - 1 / N)
                    assert torch.equal(student(z, tau, c, w), teacher(z, tau, c))
                wanted = scheduler.step(out, k, z).prev_sample
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            null = model.dataset.null.expand(2, -1, -1)
            assert torch.equal(teacher(z, tau, None), teacher(z, tau, null))
    wanted = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(None, w, 256)
    # sines of 14000, in float32
    torch.testing.assert_close(gd.w_features(w, 256), wanted, rtol=0, atol=2e-3)


# ---- mistakes

MISTAKES = {
    "N of a student": ("--ckpt N0002.pt --N 4", "--N 4: N0002.pt was trained for N 2"),
    "sampler of a student": (
        "--ckpt N0002.pt --sampler S", "--sampler S: N0002.pt was trained for sampler D"),
    "too much guidance": (
        "--ckpt N0002.pt --w 4.5", "--w 4.5: N0002.pt was trained for weights from 1 to 4"),
    "noise levels": ("--ckpt N0002.pt --sigmas 80", "unrecognized arguments: --sigmas"),
    "noise levels in training": ("--sigmas 80", "unrecognized arguments: --sigmas"),
    "length of the whole": (
        "--total-steps 80",
        "--total-steps does not apply with --stage distill: name --stage1-steps"),
    "steps of the rounds": ("--N 4", "--N does not apply"),
    "start that does not halve": ("--start-N 12", "--start-N 12 --end-N 1: steps are halved"),
    "end above the start": ("--start-N 8 --end-N 8", "--end-N 8: steps are halved"),
    "range of weights": ("--w-min 3 --w-max 2", "--w-min 3.0 is above --w-max 2.0"),
    "stage 1 of nothing": (
        "--w-max 0 --stage1-steps 5", "--stage1-steps does not apply without --w-max"),
    "guided encoder": ("--sampler encoder --w-max 2", "--sampler encoder goes with --w-max 0"),
    "student's flag with --stage teacher": (
        "--stage teacher --w-max 2", "--w-max does not apply with --stage teacher"),
    "label dropout of a student": (
        "--label-dropout 0.1", "--label-dropout does not apply with --stage distill"),
    "teacher without null label": (
        "--teacher plain.pt", "plain.pt was trained without --label-dropout"),
    "guidance without labels": ("--dataset images", "needs labels"),
    "no teacher": ("--teacher nowhere.pt", "nowhere.pt: No such file"),
    "a student as teacher": ("--teacher N0002.pt", "N0002.pt was written by guided_distill.py"),
    "edit without images": ("--ckpt N0002.pt --edit img2img", "--edit img2img needs --image"),
    "strength of another task": (
        "--ckpt N0002.pt --edit inpaint --strength 1",
        "--strength does not apply with --edit inpaint"),
    "images of no edit": ("--ckpt N0002.pt --image x.png", "--image does not apply without --edit"),
    "edit without classes": (
        "--ckpt N0002.pt --edit inpaint --image images/0.png", "say with --labels"),
    "style with noise": (
        "--ckpt S.pt --edit style --image images/0.png --labels 1 "
        "--from-labels 1 --encoder encoder.pt",
        "--edit style decodes without noise"),
    "a decoder as encoder": (
        "--ckpt N0002.pt --edit style --image images/0.png --labels 1 "
        "--from-labels 1 --encoder N0002.pt",
        "what --sampler encoder trains, and only that"),
    "a class to come from that is not there": (
        "--ckpt N0002.pt --edit style --image images/0.png --labels 1 "
        "--from-labels 11 --encoder encoder.pt",
        "--from-labels 11: this network has"),
    "no labels, and guidance": ("--no-class-cond", "needs labels, and there are none; so does --w-max"),
    "pictures of an encoder": (
        "--sampler encoder --sample-every 5",
        "--sampler encoder goes with --w-max 0 and --sample-every 0"),
    "no teacher at all": ("--teacher none", "--teacher none: what is distilled"),
    "more images than the ideal teacher goes through": (
        "--dataset bedroom256 --teacher ideal", "bedroom256 needs --data-dir"),
    "latents without data": ("--teacher diffusers:pipe", "needs --dataset FILE.npz"),
}


@pytest.fixture(scope="module")
def workplace(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "images").mkdir()
    student = load(trained / "N0002.pt")
    torch.save(student, folder / "N0002.pt")
    for name, sampler in ("encoder.pt", "encoder"), ("S.pt", "S"):
        torch.save(student | dict(args=student["args"] | dict(sampler=sampler)), folder / name)
    teacher = last(trained / "teacher")
    torch.save(teacher, folder / "teacher.pt")
    for key in ("net", "ema"):
        teacher[key]["label_emb.weight"] = teacher[key]["label_emb.weight"][:10]
    torch.save(
        teacher | dict(model_args=teacher["model_args"] | dict(null=False)), folder / "plain.pt")
    Image.new("RGB", (32, 32)).save(folder / "images" / "0.png")
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line(workplace, mistake):
    flags, message = MISTAKES[mistake]
    assert_mistake(flags.split(), message, "guided_distill.py", workplace)


def test_help(tmp_path):
    done = run("--help", cwd=tmp_path, code=0)
    for flag in (
        "stage teacher teacher-steps label-dropout sampler w-min w-max start-N end-N "
        "stage1-steps round-steps last-steps "
        "weighting w N edit image strength mask encoder from-labels ckpt sample").split():
        assert f"\n  --{flag}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
