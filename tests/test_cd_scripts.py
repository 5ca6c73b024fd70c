"""cd.py as a user runs it: both stages, resuming, several processes, guidance, the ideal teacher, sampling and mistakes."""
import copy
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import cd
import common
from test_scripts import STOP_AT_3, assert_same, records
from util import ROOT, SMALL, assert_mistake, last, run_script, torchrun

PLAIN = [*SMALL[:SMALL.index("--precision")], "--precision", "fp32", "--device", "cpu", "--batch-size", 8, "--micro-batch", 4,
         "--log-every", 1, "--sample-every", 0, "--save-every", 0]
RUN = [*PLAIN, "--total-steps", 5, "--teacher-steps", 4, "--dropout", 0.3, "--flip", "--mu", 0.9, "--w-max", 3]
AT_THE_END_OF_TEACHER = STOP_AT_3.replace('== 2', '== 3')
IN_STUDENT = STOP_AT_3.replace('record["step"] == 2', 'record["step"] == 2 and "teacher" not in str(self.path)')


def run(*flags, **more):
    return run_script(*flags, script="cd.py", **more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A teacher with label dropout, then a guided student with a moving-average target: every kind of state is in play."""
    folder = tmp_path_factory.mktemp("trained")
    run(*RUN, "--out-dir", "whole", "--sample-every", 4, cwd=folder, code=0)
    return folder / "whole"


def test_one_command_leaves_a_teacher_and_a_student(trained):
    teacher, student = last(trained / "teacher"), last(trained)
    assert (teacher["step"], teacher["args"]["stage"], teacher["args"]["label_dropout"]) == (4, "teacher", 0.1)
    assert (student["step"], student["args"]["stage"], student["args"]["teacher"]) == (5, "distill", "whole/teacher/last.pt")
    assert teacher["model_args"]["null"] and teacher["net"]["label_emb.weight"].shape[0] == 11 and teacher["target"] is None
    assert student["model_args"]["extra"] and student["model_args"]["dropout"] == 0.3 and student["target"] is not None
    assert teacher["args"]["batch_size"] == 32 and teacher["args"]["micro_batch"] == 4 and student["args"]["batch_size"] == 8
    for folder, width in ((trained / "teacher", 2), (trained, 2)):  # without guidance, with
        assert Image.open(folder / "samples" / "000004.png").size == (3 * (width * 160 + 4), 3 * 128)
        assert torch.load(folder / "ema.pt", weights_only=True).keys() == last(folder)["net"].keys()
        assert {"loss", "loss_bins", "grad_norm", "images_per_s", "peak_gb", "skipped"} <= records(folder)[0].keys()


@pytest.mark.parametrize("where, part, step", [(STOP_AT_3, "teacher", 3), (AT_THE_END_OF_TEACHER, "teacher", 4), (IN_STUDENT, ".", 3)],
                         ids=["in the teacher", "at its end", "in the student"])
def test_stopped_in_either_stage_and_resumed_is_the_same_run(trained, tmp_path, where, part, step):
    run(*RUN, "--out-dir", "run", cwd=tmp_path, prelude=where, code=128 + signal.SIGTERM)
    assert last(tmp_path / "run" / part)["step"] == step and (tmp_path / "run" / "last.pt").exists() == (part == ".")
    run(*RUN, "--out-dir", "run", cwd=tmp_path, code=0)
    for part in (".", "teacher"):
        assert_same(last(tmp_path / "run" / part), last(trained / part))
        assert [r["loss"] for r in records(tmp_path / "run" / part)] == [r["loss"] for r in records(trained / part)]


def test_the_second_stage_by_its_own_command(trained, tmp_path):
    """A run of both stages is resumed by naming its teacher; and the two stages have folders of their own by default."""
    shutil.copytree(trained, tmp_path / "whole")
    flags = [flag for flag in RUN[RUN.index("--precision"):]]
    del flags[flags.index("--teacher-steps"):flags.index("--teacher-steps") + 2]
    done = run(*flags, "--teacher", "whole/teacher/last.pt", "--out-dir", "whole", cwd=tmp_path, code=0)
    assert "resumed at step 5" in done.stdout
    run(*PLAIN, "--stage", "teacher", "--total-steps", 1, cwd=tmp_path, code=0)
    run("--teacher", "out/cd/teacher/last.pt", *PLAIN[PLAIN.index("--precision"):], "--total-steps", 1, cwd=tmp_path, code=0)
    assert last(tmp_path / "out" / "cd")["args"]["stage"] == "distill" and last(tmp_path / "out" / "cd" / "teacher")["step"] == 1


def test_the_ideal_teacher_knows_mirrored_images(tmp_path):
    np.save(tmp_path / "one.npy", np.arange(16 * 16 * 3, dtype=np.uint8).reshape(1, 16, 16, 3))
    watch = """
ideal = common.ideal_denoiser
def watched(data, *labels):
    print("mirrored:", len(data) == 2 and bool((data[1] == data[0].flip(2)).all()))
    return ideal(data, *labels)
common.ideal_denoiser = watched"""
    for flip in ("--flip", "--no-flip"):
        done = run("--teacher", "ideal", "--dataset", "one.npy", *PLAIN, flip, "--total-steps", 1, "--out-dir", flip[2:], cwd=tmp_path,
                   prelude=watch, code=0)
        assert f"mirrored: {flip == '--flip'}" in done.stdout


def test_two_processes_equal_one(trained, tmp_path):
    run(*RUN, "--out-dir", "run", "--sample-every", 4, cwd=tmp_path, launcher=torchrun(2), code=0)
    for part in ("teacher", "."):
        assert_same(last(tmp_path / "run" / part), last(trained / part), 2e-6)
        a, b = (np.asarray(Image.open(folder / part / "samples" / "000004.png")).astype(int) for folder in (tmp_path / "run", trained))
        assert np.abs(a - b).max() <= 1  # each rank drew its part


def test_the_loops_by_hand(trained):
    """Both stages anew, from their formulas: the batch at once, RAdam, target and EMA."""
    dataset = common.load_dataset("glyphs", None, 16)
    origin = None
    for part, batch in (("teacher", 32), (".", 8)):
        state = last(trained / part)
        args = common.argparse.Namespace(**state["args"])
        common.seed_everything(common.INIT, args.seed)
        net = common.UNet(**state["model_args"])
        if origin is not None:
            net.load_state_dict(origin.state_dict(), strict=False)
        target, ema = (copy.deepcopy(net).requires_grad_(False) for _ in range(2))
        optimizer = torch.optim.RAdam(net.parameters(), args.lr)
        indices = iter(list(common.index_batches(len(dataset), args.seed, 0, state["step"], batch, 4)))
        for k, record in enumerate(records(trained / part)):
            losses = []
            for m in range(batch // 4):
                common.seed_everything(common.STEP, args.seed, k, m)
                x0, y = common.to_device(dataset.__getitems__(next(indices)), torch.device("cpu"), True)
                if origin is None:
                    t = (args.times[0] + args.times[1] * torch.randn(4)).exp()
                    y = torch.where(torch.rand(4) < 0.1, 10, y)
                    column = t.view(4, 1, 1, 1)
                    D_x = common.denoise(net, x0 + column * torch.randn_like(x0), t, y)
                    losses.append(((1 / t**2 + 4) * (D_x - x0).square().mean((1, 2, 3))))
                else:
                    w = 3 * torch.rand(4)
                    times = common.karras_times(18)
                    n = torch.multinomial(torch.ones(17), 4, replacement=True)
                    D = lambda x, t, y: common.denoise(origin, x, t, torch.full((4,), 10) if y is None else y)
                    losses.append(cd.loss_fn(net, target, D, x0, torch.randn_like(x0), times[n], times[n + 1], y, w, common.heun_step,
                                             common.pseudo_huber, lambda t_n, t_n1: 1 / (t_n1 - t_n)))
            optimizer.zero_grad()
            loss = torch.cat(losses).mean()
            loss.backward()
            norm = sum(p.grad.square().sum() for p in net.parameters()).sqrt()
            np.testing.assert_allclose([record["loss"], record["grad_norm"]], [loss.item(), norm.item()], 2e-4)
            optimizer.step()
            with torch.no_grad():
                for p, p_target, p_ema in zip(net.parameters(), target.parameters(), ema.parameters()):
                    p_target.copy_(0.9 * p_target + 0.1 * p)
                    p_ema.copy_(args.ema_decay * p_ema + (1 - args.ema_decay) * p)
        assert_same(net.state_dict(), state["net"], 2e-5)
        assert_same(ema.state_dict(), state["ema"], 2e-5)
        if origin is None:
            origin = common.UNet(**state["model_args"]).requires_grad_(False).eval()
            origin.load_state_dict(state["ema"])
        else:
            assert_same(target.state_dict(), state["target"], 2e-5)


def test_a_changed_teacher_is_noticed(trained, tmp_path):
    flags = [*PLAIN[PLAIN.index("--precision"):], "--total-steps", 2, "--dist", "l2", "--out-dir", "run"]
    torch.save(last(trained / "teacher"), tmp_path / "a.pt")
    run("--teacher", "a.pt", *flags, cwd=tmp_path, code=0)
    (tmp_path / "a.pt").rename(tmp_path / "b.pt")
    run("--teacher", "b.pt", *flags, cwd=tmp_path, code=0)  # the same one elsewhere
    state = last(trained / "teacher")
    state["ema"]["out.2.bias"] += 1
    torch.save(state, tmp_path / "b.pt")
    assert "--teacher-digest" in run("--teacher", "b.pt", *flags, cwd=tmp_path, code=2).stderr


@pytest.mark.parametrize("flags", [["--no-stop-gradient"], ["--stop-gradient", "--w-max", "2"]], ids=" ".join)
def test_continuous_distillation_runs_and_resumes(tmp_path, flags):
    flags = [*PLAIN, "--objective", "continuous", *flags, "--total-steps", 4, "--teacher-steps", 1]
    run(*flags, "--out-dir", "a", cwd=tmp_path, prelude=IN_STUDENT, code=128 + signal.SIGTERM)
    run(*flags, "--out-dir", "a", cwd=tmp_path, code=0)
    run(*flags, "--out-dir", "b", cwd=tmp_path, code=0)
    assert_same(last(tmp_path / "a"), last(tmp_path / "b"))
    assert all(np.isfinite(r["loss"]) for r in records(tmp_path / "a")) and len({r["loss"] for r in records(tmp_path / "a")}) == 4


def test_continuous_training_by_hand(tmp_path):
    """ct.py --objective continuous: its first loss from the formula, with df/dt by central differences in float64."""
    run_script(*PLAIN, "--objective", "continuous", "--teacher", "none", "--total-steps", 1, "--ema-decay", 0, "--out-dir", "run",
               script="ct.py", cwd=tmp_path, code=0)
    state, dataset = last(tmp_path / "run"), common.load_dataset("glyphs", None, 16)
    common.seed_everything(common.INIT, 0)
    net = common.UNet(**state["model_args"]).double()
    net.dtype, losses = torch.float64, []
    for m, i in enumerate(common.index_batches(len(dataset), 0, 0, 1, 8, 4)):
        common.seed_everything(common.STEP, 0, 0, m)
        x0, y = common.to_device(dataset.__getitems__(i), torch.device("cpu"), False)
        u = torch.rand(4)
        t = (0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
        noise = torch.randn_like(x0).double()
        t, h = t.double(), 1e-5 * t.double()
        with torch.no_grad():
            a, b = (common.consistency(net, x0 + common.bcast(t + s * h, x0) * noise, t + s * h, y) for s in (1, -1))
        losses.append((((a - b) / common.bcast(2 * h, x0)) ** 2).mean((1, 2, 3)))
    np.testing.assert_allclose(records(tmp_path / "run")[0]["loss"], torch.cat(losses).mean().item(), 1e-3)


def test_ideal_teacher_on_a_handful_of_images(tmp_path):
    """Distilled from the exact denoiser of four images of two classes, the student draws, in one step, those of the class asked for,
    and from each noise the one to which the probability-flow ODE leads."""
    grid = np.array([[0, 1], [0, 1]]), np.array([[1, 0], [1, 0]]), np.array([[0, 0], [1, 1]]), np.array([[1, 1], [0, 0]])
    images = np.stack([np.kron(g[..., None], np.ones((4, 4, 3))) for g in grid]).astype(np.uint8) * 200 + 27
    np.savez(tmp_path / "four.npz", arr_0=images, arr_1=np.array([0, 0, 1, 1]))
    run("--teacher", "ideal", "--dataset", "four.npz", "--net", "glyphs", "base=32", "mult=1", "blocks=1", "image_size=8", *PLAIN[PLAIN.index("--precision"):],
        "--batch-size", 32, "--micro-batch", 32, "--total-steps", 500, "--lr", 3e-3, "--no-flip", "--ema-decay", 0.97, "--log-every", 50,
        "--out-dir", "run", cwd=tmp_path, code=0)
    run("--ckpt", "run/last.pt", "--sample", 64, "--save", "x.npz", "--device", "cpu", "--precision", "fp32", cwd=tmp_path, code=0)
    samples, data = (torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1 for x in (np.load(tmp_path / "x.npz")["arr_0"], images))
    nearest, which = (samples[:, None] - data).abs().mean((2, 3, 4)).min(1)
    x_T, y = 80 * common.seeded_noise(range(64), 0)(samples), torch.arange(64) % 2
    D = common.ideal_denoiser(data, torch.tensor([0, 0, 1, 1]))
    led_to = (common.heun_sample(lambda x, t: D(x, t, y), x_T, 40)[:, None] - data).abs().mean((2, 3, 4)).argmin(1)
    margin = ((data[2 * y] - data[2 * y + 1]) * x_T / 80).sum((1, 2, 3)).abs()  # of the noise, from the border between the two images
    decided = margin > 6
    found = nearest.median().item(), (which // 2 == y).float().mean().item(), (which == led_to)[decided].float().mean().item()
    assert decided.sum() > 40 and found[0] < 0.1 and found[1] > 0.95 and found[2] > 0.9 and len(set(which.tolist())) == 4, found


# ---- sampling

def test_teacher_samples_are_heuns(trained, tmp_path):
    flags = ["--ckpt", trained / "teacher" / "last.pt", "--sample", 4, "--N", 5, "--device", "cpu", "--precision", "fp32"]
    net, _ = common.load_network(trained / "teacher" / "last.pt", ("cd",))
    x_T, y = 80 * common.seeded_noise(range(4), 0)(torch.zeros(4, 3, 16, 16)), torch.arange(4)

    def D(w):
        return lambda x, t: (1 + w) * common.denoise(net, x, t, y) - w * common.denoise(net, x, t, torch.full((4,), 10))
    for w in (0, 2):
        done = run(*flags, "--w", w, "--save", f"{w}.npz", cwd=tmp_path, code=0)
        with torch.no_grad():
            wanted = common.to_uint8(common.heun_sample(D(w), x_T, 5)).numpy().astype(int)
        assert np.abs(np.load(tmp_path / f"{w}.npz")["arr_0"] - wanted).max() <= 1
        assert f"{9 * (1 + (w > 0))} network call(s)" in done.stdout
    run(*flags, "--churn", 3, "--save", "churn.npz", cwd=tmp_path, code=0)
    noise = common.seeded_noise(range(4), 0)
    noise(x_T)
    with torch.no_grad():
        wanted = common.to_uint8(common.heun_sample(D(0), x_T, 5, 3, noise=noise)).numpy().astype(int)
    found = np.load(tmp_path / "churn.npz")["arr_0"]
    assert np.abs(found - wanted).max() <= 1 and not np.array_equal(found, np.load(tmp_path / "0.npz")["arr_0"])


def test_guided_student_hears_of_w(trained, tmp_path):
    net, _ = common.load_network(trained / "last.pt", ("cd",))
    x_T, y, t = 80 * common.seeded_noise(range(4), 0)(torch.zeros(4, 3, 16, 16)), torch.arange(4), torch.full((4,), 80.0)
    for w in (0.0, 2.5):
        run("--ckpt", trained / "last.pt", "--sample", 4, "--w", w, "--save", f"{w}.npz", "--device", "cpu", "--precision", "fp32",
            cwd=tmp_path, code=0)
        with torch.no_grad():
            wanted = common.to_uint8(common.consistency(net, x_T, t, y, torch.full((4,), 25 * w)).clamp(-1, 1)).numpy().astype(int)
        assert np.abs(np.load(tmp_path / f"{w}.npz")["arr_0"] - wanted).max() <= 1


def test_time_points_from_the_command_line(trained, tmp_path):
    """The levels it prints, it has scored; the best score is that of what it found. No test of quality."""
    flags = ["--ckpt", trained / "last.pt", "--search-times", 2, "--N", 5, "--sample", 20, "--device", "cpu", "--precision", "fp32"]
    quick = f"sys.path.insert(0, {str(ROOT / 'tests')!r}); import bench; bench.train_classifier.__defaults__ = (20, 64)"
    lines = run(*flags, cwd=tmp_path, prelude=quick, code=0).stdout.strip().splitlines()
    scored = {line.split(": Frechet distance ")[0]: float(line.split(": Frechet distance ")[1]) for line in lines[:-1]}
    found = lines[-1].removeprefix("found: ")
    assert found.startswith("--sigmas 80 ") and len(found.split()) == 3 and scored[found] == min(scored.values())
    assert "beside" in run(*flags, cwd=tmp_path, prelude="import sys; sys.modules['bench'] = None", code=2).stderr


# ---- mistakes

MISTAKES = {
    "flag of the student with --stage teacher": (["--stage", "teacher", "--mu", "0.5"], "--mu does not apply with --stage teacher"),
    "flag of the teacher without its stage": (["--label-dropout", "0.1"], "--label-dropout applies to --stage teacher only"),
    "length of a teacher that is there": (["--teacher", "teacher.pt", "--teacher-steps", "5"], "--teacher-steps does not apply with --teacher"),
    "net of another's": (["--teacher", "teacher.pt", "--net", "glyphs"], "--net does not apply with --teacher FILE"),
    "discrete flag in continuous time": (["--objective", "continuous", "--mu", "0.5"], "--mu does not apply with --objective continuous"),
    "continuous flag in discrete time": (["--stop-gradient"], "--stop-gradient applies to --objective continuous only"),
    "law of continuous times": (["--objective", "continuous", "--times", "0.5"], "--times 0.5: name a mean"),
    "teacher in the student's folder": (["--teacher", "student/last.pt", "--out-dir", "student"], "--out-dir student holds the --teacher"),
    "mistake about the second stage": (["--times", "1", "2", "3"], "--times 1.0 2.0 3.0: name a mean"),
    "one time point": (["--N", "1"], "--N"),
    "guidance without labels": (["--teacher", "ideal", "--dataset", "images", "--w-max", "2"], "--w-max needs labels"),
    "hidden labels without labels": (["--stage", "teacher", "--dataset", "images", "--label-dropout", "0.1"], "--label-dropout needs labels"),
    "a student as teacher": (["--teacher", "student.pt"], "--teacher student.pt holds a student"),
    "no teacher": (["--teacher", "none"], "--teacher none: a student needs a teacher"),
    "missing teacher": (["--teacher", "nowhere.pt"], "nowhere.pt: No such file"),
    "levels for a teacher": (["--ckpt", "teacher.pt", "--sigmas", "80"], "--sigmas does not apply"),
    "too much guidance": (["--ckpt", "student.pt", "--w", "3.5"], "--w 3.5: student.pt was trained for weights up to 3"),
    "stage of a checkpoint that knows it": (["--ckpt", "student.pt", "--stage", "teacher"], "--stage does not apply"),
    "churn for a student": (["--ckpt", "student.pt", "--churn", "3"], "--churn does not apply"),
    "data without a search": (["--ckpt", "student.pt", "--dataset", "glyphs"], "--dataset does not apply"),
    "editing without --ckpt": (["--edit", "inpaint"], "--edit applies to sampling only"),
    "a run of the other stage": (["--stage", "teacher", *PLAIN, "--out-dir", "student"], "holds a run with other settings"),
}


@pytest.fixture(scope="module")
def workplace(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("images", "student"):
        (folder / name).mkdir()
    torch.save(last(trained), folder / "student.pt")
    torch.save(last(trained), folder / "student" / "last.pt")
    torch.save(last(trained / "teacher"), folder / "teacher.pt")
    Image.new("RGB", (32, 32)).save(folder / "images" / "0.png")
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line(workplace, mistake):
    assert_mistake(*MISTAKES[mistake], "cd.py", workplace)


def test_help(tmp_path):
    done = run("--help", cwd=tmp_path, code=0)
    for flag in ("stage teacher teacher-steps label-dropout N objective stop-gradient solver mu dist times weighting w-max w churn "
                 "search-times edit image mask factor noise-level noisy ckpt sample eval inception sigmas").split():
        assert f"\n  --{flag}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
