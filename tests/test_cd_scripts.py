"""cd.py as a user runs it: both stages, resuming, processes, guidance, sampling, mistakes."""
import argparse
import copy
import shutil
import signal
import types

import numpy as np
import pytest
import torch
from PIL import Image

import cd
import common
import scoreboard
from test_scripts import STOP_AT_3, assert_same, records, step_by_hand
from util import assert_mistake, close, exact_derivative, fill, glyph_set, last, run_script

MACHINE = ["--precision", "fp32", "--device", "cpu"]
NET = ["--net", "glyphs", "image_size=8", "base=32", "mult=1,1", "blocks=1"]
BATCHES = [*MACHINE, "--batch-size", 8, "--micro-batch", 4, "--log-every", 1, "--sample-every", 0,
           "--save-every", 0]
PLAIN = [*NET, *BATCHES]
GUIDED = ["--total-steps", 5, "--dropout", 0.3, "--flip", "--mu", 0.9, "--w-max", 3]
RUN = [*PLAIN, *GUIDED, "--teacher-steps", 4]
AT_THE_END_OF_TEACHER = STOP_AT_3.replace("== 2", "== 3")
IN_STUDENT = STOP_AT_3.replace('record["step"] == 2',
                               'record["step"] == 2 and "teacher" not in str(self.path)')


def run(*flags, **more):
    return run_script(*flags, script="cd.py", **more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A teacher with label dropout, then a guided student with an averaged target: all states."""
    folder = tmp_path_factory.mktemp("trained")
    run(*RUN, "--out-dir", "whole", cwd=folder, code=0)
    return folder / "whole"


def test_one_command_leaves_a_teacher_and_a_student(trained):
    teacher, student = last(trained / "teacher"), last(trained)
    wanted = dict(stage="teacher", label_dropout=0.1, batch_size=32, micro_batch=4)
    assert teacher["step"] == 4 and wanted.items() <= teacher["args"].items()
    wanted = dict(stage="distill", teacher="whole/teacher/last.pt", batch_size=8)
    assert student["step"] == 5 and wanted.items() <= student["args"].items()
    assert teacher["model_args"]["null"] and teacher["target"] is None
    assert teacher["net"]["label_emb.weight"].shape[0] == 11
    assert student["model_args"]["cond"] and student["model_args"]["dropout"] == 0.3
    assert student["target"] is not None
    for folder in (trained / "teacher", trained):
        weights = torch.load(folder / "ema.pt", weights_only=True)
        assert weights.keys() == last(folder)["net"].keys()
        fields = "step images loss loss_bins grad_norm lr images_per_s peak_gb skipped"
        assert records(folder)[0].keys() == set(fields.split())


@pytest.mark.parametrize("where, part, step", [
    (STOP_AT_3, "teacher", 3), (AT_THE_END_OF_TEACHER, ".", 1), (IN_STUDENT, ".", 3)],
    ids=["in the teacher", "at its end", "in the student"])
def test_stopped_in_either_stage_and_resumed_is_the_same_run(trained, tmp_path, where, part, step):
    """Also where the checkpoint has the names of flags that it had before."""
    folder = tmp_path / "run"
    run(*RUN, "--out-dir", "run", cwd=tmp_path, prelude=where, code=128 + signal.SIGTERM)
    state = last(folder / part)
    assert state["step"] == step and (folder / "last.pt").exists() == (part == ".")
    state["args"]["times"] = state["args"].pop("p_t")
    if part == ".":
        state["model_args"]["extra"] = state["model_args"].pop("cond")
    torch.save(state, folder / part / "last.pt")
    run(*RUN, "--out-dir", "run", cwd=tmp_path, code=0)
    for part in (".", "teacher"):
        assert_same(last(folder / part), last(trained / part))
        losses = [record["loss"] for record in records(folder / part)]
        assert losses == [record["loss"] for record in records(trained / part)]


def test_the_second_stage_by_its_own_command(trained, tmp_path):
    """A run of both stages is resumed by naming its teacher; and each has a folder of its own by
    default. Of its labels a teacher hides the share that is asked for."""
    shutil.copytree(trained, tmp_path / "whole")
    done = run(*BATCHES, *GUIDED, "--teacher", "whole/teacher/last.pt", "--out-dir", "whole",
               cwd=tmp_path, code=0)
    assert "resumed at step 5" in done.stdout
    watch = """
edm_loss = common.edm_loss
def watched(net, x0, noise, t, y):
    print("hidden:", (y == 10).sum().item(), "of", len(y))
    return edm_loss(net, x0, noise, t, y)
common.edm_loss = watched"""
    batch = [*NET, *MACHINE, "--batch-size", 400, "--micro-batch", 400, "--total-steps", 1]
    done = run(*batch, "--stage", "teacher", "--label-dropout", 0.2, "--sample-every", 0,
               cwd=tmp_path, prelude=watch, code=0)
    hidden = done.stdout.split("hidden: ")[1].split()
    assert 50 < int(hidden[0]) < 110 and hidden[2] == "400"
    run(*BATCHES, "--teacher", "out/cd/teacher/last.pt", "--total-steps", 1, cwd=tmp_path, code=0)
    assert last(tmp_path / "out" / "cd")["args"]["stage"] == "distill"


def test_grids(trained, tmp_path):
    """Two blocks each: without guidance and with it."""
    show = ["--sample-every", 1, "--total-steps", 1, "--out-dir"]
    run(*PLAIN, "--stage", "teacher", "--label-dropout", 0.5, "--N", 2, *show, "a", cwd=tmp_path,
        code=0)
    run(*BATCHES, "--teacher", trained / "teacher" / "last.pt", "--w-max", 3, *show, "b",
        cwd=tmp_path, code=0)
    for folder in "ab":
        picture = Image.open(tmp_path / folder / "samples" / "000001.png")
        assert picture.size == (6 * (2 * 80 + 4), 6 * 64)


def test_hidden_labels():
    torch.manual_seed(0)
    y = torch.arange(10).repeat(2000)
    some = cd.hide_labels(y, 0.1, 10)
    assert abs((some == 10).double().mean() - 0.1) < 0.01
    assert torch.equal(some[some != 10], y[some != 10])


def test_the_ideal_teacher_knows_mirrored_images(tmp_path):
    image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(1, 16, 16, 3)
    np.save(tmp_path / "one.npy", image)
    watch = """
ideal = common.ideal_denoiser
def watched(data, *labels):
    print("mirrored:", len(data) == 2 and bool((data[1] == data[0].flip(2)).all()))
    return ideal(data, *labels)
common.ideal_denoiser = watched"""
    for flip in ("--flip", "--no-flip"):
        done = run(*PLAIN, "--teacher", "ideal", "--dataset", "one.npy", flip, "--total-steps", 1,
                   "--net", "glyphs", "base=32", "mult=1", "blocks=1", "--out-dir", flip[2:],
                   cwd=tmp_path, prelude=watch, code=0)
        assert f"mirrored: {flip == '--flip'}" in done.stdout


def test_two_processes_equal_one(trained, tmp_path):
    run(*RUN, "--out-dir", "run", cwd=tmp_path, ranks=2, code=0)
    for part in ("teacher", "."):
        assert_same(last(tmp_path / "run" / part), last(trained / part), 2e-6)


def teacher_losses(net, args, x0, y):
    """EDM's loss of a micro-batch, from its formula."""
    t = (args.p_t[0] + args.p_t[1] * torch.randn(len(x0))).exp()
    y = torch.where(torch.rand(len(x0)) < 0.1, 10, y)
    D_x = common.denoise(net, x0 + t.view(-1, 1, 1, 1) * torch.randn_like(x0), t, y)
    return (1 / t**2 + 4) * (D_x - x0).square().mean((1, 2, 3))


def student_losses(net, target, teacher, x0, y):
    w = 3 * torch.rand(4)
    n = torch.multinomial(torch.ones(17), 4, replacement=True)
    times, null = common.karras_times(18), torch.full((4,), 10)

    def D(x, t, y):
        return common.denoise(teacher, x, t, null if y is None else y)

    def weight(t_n, t_n1):
        return 1 / (t_n1 - t_n)
    noise = torch.randn_like(x0)
    masks = common.dropout_masks(net, 4)
    return cd.loss_fn(net, target, D, x0, noise, times[n], times[n + 1], y, w, masks,
                      common.heun_step, common.pseudo_huber, weight)


def test_the_loops_by_hand(trained):
    """Both stages anew, from their formulas: the batch at once, RAdam, target and EMA."""
    dataset = glyph_set(8)
    teacher = None
    for part, batch in (("teacher", 32), (".", 8)):
        state = last(trained / part)
        args = argparse.Namespace(**state["args"])
        common.seed_everything(common.INIT, args.seed)
        net = common.UNet(**state["model_args"])
        if teacher is not None:
            net.load_state_dict(teacher.state_dict(), strict=False)
        target, ema = (copy.deepcopy(net).requires_grad_(False) for _ in range(2))
        optimizer = torch.optim.RAdam(net.parameters(), args.lr)
        indices = common.index_batches(len(dataset), args.seed, 0, state["step"], batch, 4)
        for k, record in enumerate(records(trained / part)):
            losses = []
            for m in range(batch // 4):
                common.seed_everything(common.STEP, args.seed, k, m)
                images = dataset.__getitems__(next(indices))
                x0, y = common.to_device(images, torch.device("cpu"), True)
                if teacher is None:
                    losses.append(teacher_losses(net, args, x0, y))
                else:
                    losses.append(student_losses(net, target, teacher, x0, y))
            decays = {target: 0.9, ema: args.ema_decay}
            step_by_hand(record, net, optimizer, losses, decays)
        assert_same(net.state_dict(), state["net"], 2e-5)
        assert_same(ema.state_dict(), state["ema"], 2e-5)
        if teacher is not None:
            assert_same(target.state_dict(), state["target"], 2e-5)
        teacher = common.UNet(**state["model_args"]).requires_grad_(False).eval()
        teacher.load_state_dict(state["ema"])


def test_a_teacher_ramps_up_by_hand(tmp_path):
    """From 0 over 20 images, 8 a step: lr times 0, 0.4, 0.8, 1. Stopped on the way and resumed, it
    goes on with the same; so does a run of before --lr-ramp, without it."""
    flags = [*PLAIN, "--stage", "teacher", "--total-steps", 4, "--lr", 0.01, "--out-dir", "run"]
    ramp = [*flags, "--lr-ramp", 20]
    run(*ramp, cwd=tmp_path, prelude=STOP_AT_3, code=128 + signal.SIGTERM)
    assert "outlasts" not in run(*ramp, cwd=tmp_path, code=0).stdout
    state, dataset = last(tmp_path / "run"), glyph_set(8)
    args = argparse.Namespace(**state["args"])
    common.seed_everything(common.INIT, args.seed)
    net = common.UNet(**state["model_args"])
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.RAdam(net.parameters(), 1.0)
    indices = common.index_batches(len(dataset), args.seed, 0, 4, 8, 4)
    for k, record in enumerate(records(tmp_path / "run")):
        losses = []
        for m in range(2):
            common.seed_everything(common.STEP, args.seed, k, m)
            x0, y = common.to_device(dataset.__getitems__(next(indices)), "cpu", False)
            t = (args.p_t[0] + args.p_t[1] * torch.randn(4)).exp()
            D_x = common.denoise(net, x0 + t.view(4, 1, 1, 1) * torch.randn_like(x0), t, y)
            losses.append((1 / t**2 + 4) * (D_x - x0).square().mean((1, 2, 3)))
        optimizer.param_groups[0]["lr"] = 0.01 * (0, 0.4, 0.8, 1)[k]
        assert abs(record["lr"] - optimizer.param_groups[0]["lr"]) < 1e-9
        step_by_hand(record, net, optimizer, losses, {ema: args.ema_decay})
    assert_same(net.state_dict(), state["net"], 2e-5)
    assert_same(ema.state_dict(), state["ema"], 2e-5)

    for key in ("dropout_size", "lr_ramp"):
        state["args"].pop(key, None), state["model_args"].pop(key, None)
    torch.save(state, tmp_path / "run" / "last.pt")
    run(*flags, cwd=tmp_path, code=0)
    assert_mistake(ramp, "--lr-ramp 0 there, 20 now", "cd.py", tmp_path)
    done = run(*flags, "--overwrite", "--total-steps", 1, "--lr-ramp", 80, cwd=tmp_path, code=0)
    assert ("note: --lr-ramp 80 outlasts the run of 8 images: the learning rate ends at 0.001\n"
            in done.stdout)


def test_guidance_weights_are_uniform(trained, tmp_path, monkeypatch):
    """From 0 to --w-max, one for each image."""
    args = argparse.Namespace(**last(trained)["args"])
    args.teacher, args.out_dir = str(trained / "teacher" / "last.pt"), str(tmp_path / "run")
    args.total_steps, args.batch_size, args.micro_batch = 1, 256, 256
    here = types.SimpleNamespace(rank=0, world=1, main=True, restarted=False, compile=False,
                                 device=torch.device("cpu"), dtype=torch.float32,
                                 checkpointing=False, capturable=False)
    seen = []

    def see(net, target, D, x0, noise, t_n, t_n1, y, w, *rest):
        seen.append(w)
        return net.out[2].bias.sum() * x0.mean((1, 2, 3))
    monkeypatch.setattr(cd, "loss_fn", see)
    monkeypatch.setattr(common, "ranks_differ", False)
    assert cd.train(args, here, types.SimpleNamespace(number=0))
    w = seen[0].sort().values / args.w_max
    assert w.shape == (256,) and (w - (torch.arange(256) + 0.5) / 256).abs().max() < 0.1


def test_a_changed_teacher_is_noticed(trained, tmp_path):
    flags = [*BATCHES, "--total-steps", 2, "--dist", "l2", "--out-dir", "run"]
    state = last(trained / "teacher")
    torch.save(state, tmp_path / "a.pt")
    run("--teacher", "a.pt", *flags, cwd=tmp_path, code=0)
    (tmp_path / "a.pt").rename(tmp_path / "b.pt")
    run("--teacher", "b.pt", *flags, cwd=tmp_path, code=0)  # the same one elsewhere
    state["ema"]["out.2.bias"] += 1
    torch.save(state, tmp_path / "b.pt")
    assert "--teacher-digest" in run("--teacher", "b.pt", *flags, cwd=tmp_path, code=2).stderr


def test_data_other_than_the_teachers(tmp_path):
    """Other classes are refused, also as many; other images of the same classes are noted."""
    data = tmp_path / "set"
    for name in ("cat", "dog"):
        (data / name).mkdir(parents=True)
        Image.effect_noise((8, 8), 80).save(data / name / "1.png")
    data_flags = [*BATCHES, "--dataset", "set", "--total-steps", 1]
    run(*data_flags, *NET, "--stage", "teacher", "--out-dir", "teacher", cwd=tmp_path, code=0)
    student = [*data_flags, "--teacher", "teacher/last.pt", "--dist", "l2", "--out-dir"]
    assert "note:" not in run(*student, "a", cwd=tmp_path, code=0).stdout
    Image.effect_noise((8, 8), 80).save(data / "dog" / "2.png")
    done = run(*student, "b", cwd=tmp_path, code=0)
    assert ("note: --teacher teacher/last.pt was trained on other images than set (2 images there, "
            "3 now)\n") in done.stdout
    (data / "dog").rename(data / "hound")
    assert_mistake([*student, "c"], "--teacher teacher/last.pt was trained on other classes than "
                   "set has (classes only there: dog, only now: hound)", "cd.py", tmp_path)
    state = last(tmp_path / "teacher")  # of before, it does not say
    del state["data"]
    torch.save(state, tmp_path / "teacher" / "last.pt")
    assert "note:" not in run(*student, "d", cwd=tmp_path, code=0).stdout


@pytest.mark.parametrize("flags", [
    "continuous --no-stop-gradient --gradient-checkpointing", "continuous --w-max 2",
    "scm --w-max 2 --dropout 0.3 --warm-up 3 --lr-decay 1"])
def test_continuous_distillation_runs_and_resumes(tmp_path, flags):
    """As by one process without a stop, to the bit, and as by two. The cut columns are those of
    fast features, and stay zero."""
    flags = [*PLAIN, "--objective", *flags.split(), "--total-steps", 4, "--teacher-steps", 1]
    run(*flags, "--out-dir", "a", cwd=tmp_path, prelude=IN_STUDENT, code=128 + signal.SIGTERM)
    run(*flags, "--out-dir", "a", cwd=tmp_path, code=0)
    run(*flags, "--out-dir", "b", cwd=tmp_path, code=0)
    run(*flags, "--out-dir", "two", cwd=tmp_path, ranks=2, code=0)
    assert_same(last(tmp_path / "a"), last(tmp_path / "b"))
    assert_same(last(tmp_path / "a"), last(tmp_path / "two"), 1e-5)
    losses = [record["loss"] for record in records(tmp_path / "a")]
    assert np.isfinite(losses).all() and len(set(losses)) == 4
    state = last(tmp_path / "a")
    for part in ("net", "ema"):
        weight = state[part]["time_embed.0.weight"]  # of base 32: 250 10000^(-i / 16) rad
        zero = (weight == 0).all(0)
        assert zero.tolist() == 2 * [250 * 10000 ** (-i / 16) > 1 for i in range(16)]
    if "scm" in flags:
        lines = records(tmp_path / "a")
        np.testing.assert_allclose([line["lr"] for line in lines],
                                   [state["args"]["lr"] / max(k, 1) ** 0.5 for k in range(4)])
        assert all("loss_bins" not in line and len(line["tangent_bins"]) == 4 for line in lines)


@pytest.mark.parametrize("script", ["cd", "ct"])
def test_scm_by_hand(tmp_path, script):
    """Three steps of sCD and sCT anew, by formulas and forward derivatives: the cut, r, the clamped
    times, c, the tangents logged, the learning rates, the weights."""
    flags = "--objective scm --r 0.8 --warm-up 4 --tangent-c 0.3 --lr-decay 1 --p-t 0 4"
    run(*PLAIN, "--total-steps", 5, "--stage", "teacher", "--out-dir", "t", cwd=tmp_path, code=0)
    done = run_script(*BATCHES, *flags.split(), "--bandwidth", 30, "--teacher", "t/last.pt",
                      "--total-steps", 3, "--ema-decay", 0, "--out-dir", "run",
                      script=f"{script}.py", cwd=tmp_path, code=0)
    assert ("time embedding: 8 of 32 features turn by more than 30 rad" in done.stdout
            and "note: --warm-up 4 outlasts the run: r ends at 0.6" in done.stdout)
    state, lines, dataset = last(tmp_path / "run"), records(tmp_path / "run"), glyph_set(8)
    teacher, net = (common.UNet(**state["model_args"]) for _ in range(2))
    for one in (teacher, net):
        one.load_state_dict(last(tmp_path / "t")["ema"])
    keep = torch.tensor(2 * [250 * 10000 ** (-i / 16) <= 30 for i in range(16)])
    net.time_embed[0].weight.data *= keep
    net.time_embed[0].weight.register_hook(lambda gradient: gradient * keep)
    begun, clamped = copy.deepcopy(net.state_dict()), 0
    optimizer = torch.optim.RAdam(net.parameters(), 1.0)
    for k, record in enumerate(lines):
        tangents, levels, losses, r = [], [], [], 0.8 * (k + 1) / 4
        for m, i in enumerate(common.index_batches(len(dataset), 0, k, k + 1, 8, 4)):
            common.seed_everything(common.STEP, 0, k, m)
            x0, y = common.to_device(dataset.__getitems__(i), torch.device("cpu"), False)
            t = (4 * torch.randn(4)).exp().clamp(0.002, 80)
            column = t.view(4, 1, 1, 1)
            noise = torch.randn_like(x0)
            x = x0 + column * noise
            R = (column**2 + 0.25).sqrt()
            with torch.no_grad():
                v = noise if script == "ct" else (x - common.denoise(teacher, x, t, y)) / column
                F_x, dF = exact_derivative(net, x, t, v, y)
                c_skip, c_out = 0.25 / R**2, 0.5 * column / R
                df_dt = c_skip * v - 0.5 * column / R**4 * x + 0.125 / R**3 * F_x
                df_dt += c_out * dF / column
                g = (1 - r) * 0.5 * c_skip * (F_x - (x - column * v - c_skip * x) / c_out)
                g += r * R * df_dt
                tangents.append(g.square().mean((1, 2, 3)).sqrt())
                g /= tangents[-1].view(4, 1, 1, 1) + 0.3
            levels.append(t)
            F_net = net(x / R, 250 * t.log(), y)
            losses.append((F_net - (F_net.detach() - g)).square().mean((1, 2, 3)))
        levels = torch.cat(levels)
        clamped += sum(level in (torch.tensor(0.002), 80.0) for level in levels)
        which = torch.bucketize(levels, torch.tensor([0.1, 1.0, 10.0]))
        wanted = [torch.cat(tangents)[which == i].mean().item() for i in range(4)]
        np.testing.assert_allclose(np.array(record["tangent_bins"], float), wanted, 0.01)
        optimizer.param_groups[0]["lr"] = 1e-4 / max(k, 1) ** 0.5
        step_by_hand(record, net, optimizer, losses, {}, 0.01)
    start, ours, theirs = (torch.cat([weight.flatten() for weight in weights.values()])
                           for weights in (begun, net.state_dict(), state["net"]))
    assert (ours - theirs).norm() < 0.02 * (ours - start).norm()
    assert clamped > 0


def test_continuous_training_by_hand(tmp_path):
    """ct.py --objective continuous: its first loss, df/dt by central differences in float64."""
    run_script(*PLAIN, "--objective", "continuous", "--teacher", "none", "--total-steps", 1,
               "--ema-decay", 0, "--out-dir", "run", script="ct.py", cwd=tmp_path, code=0)
    dataset = glyph_set(8)
    common.seed_everything(common.INIT, 0)
    net = common.UNet(**last(tmp_path / "run")["model_args"]).double()
    net.dtype, losses = torch.float64, []
    for m, i in enumerate(common.index_batches(len(dataset), 0, 0, 1, 8, 4)):
        common.seed_everything(common.STEP, 0, 0, m)
        x0, y = common.to_device(dataset.__getitems__(i), torch.device("cpu"), False)
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        t = ((low + torch.rand(4) * (high - low)) ** 7).double()
        noise = torch.randn_like(x0).double()
        h = 1e-5 * t
        with torch.no_grad():
            ends = [common.consistency(net, x0 + common.bcast(t_h, x0) * noise, t_h, y)
                    for t_h in (t + h, t - h)]
        df_dt = (ends[0] - ends[1]) / common.bcast(2 * h, x0)
        losses.append(df_dt.square().mean((1, 2, 3)))
    np.testing.assert_allclose(records(tmp_path / "run")[0]["loss"], torch.cat(losses).mean(), 1e-3)


def test_ideal_teacher_on_a_handful_of_images(tmp_path):
    """Distilled from the exact denoiser of four images of two classes, the student draws, in one
    step, those of the class asked for, and from each noise the one to which the ODE leads."""
    blocks = np.array([[[0, 1], [0, 1]], [[1, 0], [1, 0]], [[0, 0], [1, 1]], [[1, 1], [0, 0]]])
    images = blocks.repeat(4, 1).repeat(4, 2)[..., None].repeat(3, 3).astype(np.uint8) * 200 + 27
    np.savez(tmp_path / "four.npz", arr_0=images, arr_1=np.array([0, 0, 1, 1]))
    run("--teacher", "ideal", "--dataset", "four.npz", "--net", "glyphs", "base=32", "mult=1",
        "blocks=1", "image_size=8", *MACHINE, "--batch-size", 32, "--total-steps", 300,
        "--sample-every", 0, "--lr", 3e-3, "--no-flip", "--ema-decay", 0.97, "--out-dir", "run",
        cwd=tmp_path, code=0)
    run("--ckpt", "run/last.pt", "--sample", 64, "--save", "x.npz", *MACHINE, cwd=tmp_path, code=0)

    def as_x(images):
        return torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    samples, data = as_x(np.load(tmp_path / "x.npz")["arr_0"]), as_x(images)
    off, which = (samples[:, None] - data).abs().mean((2, 3, 4)).min(1)
    y = torch.arange(64) % 2
    noise = common.SeededNoise(torch.arange(64), 0)(samples)
    D = common.guide(common.ideal_denoiser(data, torch.tensor([0, 0, 1, 1])), y, None)
    ends = common.heun_sample(D, 80 * noise, 40)
    leads_to = (ends[:, None] - data).abs().mean((2, 3, 4)).argmin(1)
    margin = ((data[2 * y] - data[2 * y + 1]) * noise).sum((1, 2, 3)).abs()
    clear = margin > 6  # far from the border between the two images
    assert clear.sum() > 40 and off.median() < 0.1 and len(set(which.tolist())) == 4
    assert (which // 2 == y).double().mean() > 0.95
    assert (which == leads_to)[clear].double().mean() > 0.9


# ---- sampling

def assert_drawn(path, x):
    """The images saved are x (n,C,H,W), to the rounding of a byte."""
    saved = np.load(path)["arr_0"].astype(int)
    assert np.abs(saved - common.to_uint8(x).numpy()).max() <= 1
    return saved


@pytest.fixture(scope="module")
def wild(trained, tmp_path_factory):
    """The teacher with weights to which labels matter; after three steps they hardly do."""
    path = tmp_path_factory.mktemp("wild") / "teacher.pt"
    state = last(trained / "teacher")
    net = fill(common.UNet(**state["model_args"]), 0)
    torch.save(state | dict(ema=net.state_dict()), path)
    return path


@torch.no_grad()
def test_teacher_samples_are_heuns(wild, tmp_path):
    flags = ["--ckpt", wild, "--sample", 4, "--N", 5, *MACHINE]
    net, _ = common.load_network(wild, ("cd",))
    y, null, noise = torch.arange(4), torch.full((4,), 10), common.SeededNoise(torch.arange(4), 0)
    x_T = 80 * noise(torch.zeros(4, 3, 8, 8))

    def heun(w, churn=0.0):
        def D(x, t):
            return (1 + w) * common.denoise(net, x, t, y) - w * common.denoise(net, x, t, null)
        return common.heun_sample(D, x_T, 5, churn, noise=noise)
    saved = {}
    for w in (0, 2):
        done = run(*flags, "--w", w, "--save", f"{w}.npz", cwd=tmp_path, code=0)
        saved[w] = assert_drawn(tmp_path / f"{w}.npz", heun(w))
        assert f"{9 * (1 + (w > 0))} network call(s)" in done.stdout
    run(*flags, "--churn", 3, "--save", "churn.npz", cwd=tmp_path, code=0)
    churned = assert_drawn(tmp_path / "churn.npz", heun(0, 3))
    assert not np.array_equal(churned, saved[0])
    unconditional = common.heun_sample(lambda x, t: common.denoise(net, x, t, null), x_T, 5)
    for w, wanted in ((-1, unconditional), (-0.5, heun(-0.5))):
        done = run(*flags, "--w", w, "--save", "below.npz", cwd=tmp_path, code=0)
        assert not np.array_equal(assert_drawn(tmp_path / "below.npz", wanted), saved[0])
        assert "18 network call(s)" in done.stdout


@torch.no_grad()
@pytest.mark.parametrize("name", common.SAMPLERS)
def test_samplers_of_a_teacher(wild, tmp_path, name):
    """Each draws its own samples, guided too, with the seed's noise, in as many calls as said."""
    net, _ = common.load_network(wild, ("cd",))
    y, noise = torch.arange(4), common.SeededNoise(torch.arange(4), 0)
    x_T = 80 * noise(torch.zeros(4, 3, 8, 8))
    D = common.guide(common.net_denoiser(net), y, torch.full((4,), 0.5))
    x = common.SAMPLERS[name](D, x_T, 5, noise=noise)
    done = run("--ckpt", wild, "--sample", 4, "--N", 5, "--sampler", name, "--w", 0.5, *MACHINE,
               "--save", "x.npz", cwd=tmp_path, code=0)
    assert_drawn(tmp_path / "x.npz", x)
    calls = {"heun": 18, "dpm2": 18}.get(name, 10)
    assert f"4 samples, {calls} network call(s) each" in done.stdout


@torch.no_grad()
def test_guided_student_hears_of_w(trained, tmp_path):
    net, _ = common.load_network(trained / "last.pt", ("cd",))
    x_T = 80 * common.SeededNoise(torch.arange(4), 0)(torch.zeros(4, 3, 8, 8))
    for w in (0.0, 2.5):
        run("--ckpt", trained / "last.pt", "--sample", 4, "--w", w, "--save", f"{w}.npz", *MACHINE,
            cwd=tmp_path, code=0)
        t, cond = torch.full((4,), 80.0), torch.full((4,), 25 * w)
        x = common.consistency(net, x_T, t, torch.arange(4), cond)
        assert_drawn(tmp_path / f"{w}.npz", x.clamp(-1, 1))


@pytest.fixture(scope="module", params=["cd", "ct"])
def free_form(request, trained, tmp_path_factory):
    """A run of four steps, resumed after three: its script, flags and folder."""
    flags = [*BATCHES, "--ema-decay", 0, "--total-steps", 4, "--out-dir", "free"]
    if request.param == "cd":
        flags += ["--teacher", trained / "teacher" / "last.pt", "--mu", 0.9,
                  "--lr", 0.003]
    else:
        flags += [*NET, "--recipe", "ct", "--lr", 0.1]
    script, free = f"{request.param}.py", ["--parametrisation", "free"]
    folder = tmp_path_factory.mktemp("free")
    run_script(*flags, *free, script=script, cwd=folder, code=143, prelude=STOP_AT_3)
    assert last(folder / "free")["step"] == 3
    done = run_script(*flags, *free, script=script, cwd=folder, code=0)
    assert "resumed at step 3" in done.stdout
    return script, flags, folder


def test_free_form_is_kept_in_the_checkpoint(free_form):
    script, flags, folder = free_form
    state = last(folder / "free")
    assert state["model_args"]["parametrisation"] == "free"
    done = run_script(*flags, script=script, cwd=folder, code=2)
    assert "parametrisation free there, skip now" in done.stderr
    losses = [record["loss"] for record in records(folder / "free")]
    run_script(*flags, "--out-dir", "skip", script=script, cwd=folder, code=0)
    skip = last(folder / "skip")
    assert skip["model_args"]["parametrisation"] == "skip" and np.isfinite(losses).all()
    assert losses[0] != records(folder / "skip")[0]["loss"]
    del skip["model_args"]["parametrisation"], skip["args"]["parametrisation"]  # of before
    torch.save(skip, folder / "skip" / "last.pt")
    done = run_script(*flags, "--out-dir", "skip", script=script, cwd=folder, code=0)
    assert "resumed at step 4" in done.stdout
    done = run_script(*flags, *"--out-dir skip --parametrisation free".split(), script=script,
                      cwd=folder, code=2)
    assert "parametrisation skip there, free now" in done.stderr


@torch.no_grad()
def test_free_form_is_drawn_as_it_was_trained(free_form):
    """From last.pt, ema.pt, by the scoreboard, and edited: F(c_in x, ln t) itself; what says
    nothing is the skip form, and another picture."""
    script, _, folder = free_form
    state = last(folder / "free")
    net = common.UNet(**state["model_args"]).eval()
    net.load_state_dict(state["ema"])
    shape, y, t = (4, 3, 8, 8), torch.arange(4), torch.full((4,), 80.0)
    z = common.SeededNoise(y, 0)(torch.zeros(shape))
    x = net(80 * z / (80**2 + 0.25) ** 0.5, 250 * t.log(), y).clamp(-1, 1)
    draw = ["--sample", 4, *MACHINE, "--save", "drawn.npz", "--ckpt"]
    for name in ("last.pt", "ema.pt"):
        run_script(*draw, f"free/{name}", script=script, cwd=folder, code=0)
        saved = assert_drawn(folder / "drawn.npz", x)
    assert saved.std() > 5
    machine = types.SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32,
                                    checkpointing=False)
    _, way = scoreboard.multistep(80.0).open(folder / "free" / "last.pt", machine)
    close(way(y, common.SeededNoise(y, 0), shape), x, 1e-4, 1e-5)
    edit = "--edit interpolate --labels 0 --sample 1 --ckpt free/last.pt --save edit.npz".split()
    run(*edit, *MACHINE, cwd=folder, code=0)
    assert_drawn(folder / "edit.npz", x[:1])  # begins at the noise of image 0
    del state["model_args"]["parametrisation"]
    torch.save(state, folder / "untold.pt")
    run_script(*draw, "untold.pt", script=script, cwd=folder, code=0)
    untold = np.load(folder / "drawn.npz")["arr_0"].astype(int)
    assert np.abs(untold - saved).mean() > 1


def test_time_points_from_the_command_line(trained, tmp_path):
    """The levels it prints, it has scored; the best score is that of what it found."""
    flags = ["search-times", "--ckpt", trained / "last.pt", "--N", 5, "--sample", 20, *MACHINE]
    quick = """
def quick(*ends, real=range):
    return real(20) if ends == (500,) else real(*ends)  # the classifier's training
monkeypatch.setattr("builtins.range", quick)
"""
    done = run_script(*flags, script="tests/bench.py", cwd=tmp_path, prelude=quick, code=0)
    *lines, final = done.stdout.strip().splitlines()
    scores = dict(line.split(": Frechet distance ") for line in lines)
    best = final.removeprefix("found: ")
    assert best.startswith("--sigmas 80 ") and len(best.split()) == 3
    assert float(scores[best]) == min(map(float, scores.values()))
    teacher = ["search-times", "--ckpt", trained / "teacher" / "last.pt"]
    done = run_script(*teacher, script="tests/bench.py", cwd=tmp_path, code=2)
    assert done.stderr.startswith("bench.py: error: ") and "holds a teacher" in done.stderr


# ---- mistakes

TEACHER = ["--stage", "teacher"]
CONTINUOUS, SCM = ["--objective", "continuous"], ["--objective", "scm"]
IMAGES = ["--dataset", "images"]
MISTAKES = [
    ([*TEACHER, "--mu", "0.5"], "--mu does not apply with --stage teacher"),
    ([*TEACHER, "--sigmas", "80"], "--sigmas does not apply with --stage teacher"),
    ([*TEACHER, *IMAGES, "--label-dropout", "0.1"], "--label-dropout needs labels"),
    ([*TEACHER, *PLAIN, "--out-dir", "student"], "holds a run with other settings"),
    (["--label-dropout", "0.1"], "--label-dropout does not apply with --stage distill"),
    (["--lr-ramp", "10"], "--lr-ramp does not apply with --stage distill"),
    (["--dropout-size", "8"], "--dropout-size does not apply without --dropout"),
    ([*PLAIN, *TEACHER, "--dropout", "0.1", "--dropout-size", "3", "--out-dir", "small"],
     "dropout_size=3: the smallest map has 4 pixels, so none would drop out"),
    (["--objective", "scm", "--precision", "tf32"], "--precision tf32 does not apply with "
     "--objective scm, whose derivatives are differences in fp32: name auto, bf16 or fp32"),
    (["--bandwidth", "1"], "--bandwidth does not apply with --objective discrete"),
    ([*TEACHER, "--objective", "scm"], "--objective does not apply with --stage teacher"),
    ([*CONTINUOUS, "--r", "0.5"], "--r does not apply with --objective continuous"),
    ([*SCM, "--stop-gradient"], "--stop-gradient does not apply with --objective scm"),
    ([*SCM, "--parametrisation", "free"],
     "--parametrisation does not apply with --objective scm"),
    ([*CONTINUOUS, "--parametrisation", "skip"],
     "--parametrisation does not apply with --objective continuous"),
    ([*TEACHER, "--parametrisation", "free"],
     "--parametrisation does not apply with --stage teacher"),
    (["--ckpt", "student.pt", "--parametrisation", "free"],
     "--parametrisation does not apply with --ckpt"),
    ([*SCM, "--mu", "0.5"], "--mu does not apply with --objective scm"),
    ([*SCM, "--tangent-c", "0"], "argument --tangent-c: invalid number value: '0'"),
    ([*SCM, "--r", "1.5"], "argument --r: invalid number value: '1.5'"),
    (["--teacher", "teacher.pt", "--teacher-steps", "5"],
     "--teacher-steps does not apply with --teacher teacher.pt"),
    (["--teacher", "teacher.pt", "--net", "glyphs"], "--net does not apply with --teacher"),
    (["--teacher", "teacher.pt", "--class-cond"], "--class-cond does not apply with --teacher"),
    (["--teacher", "student/last.pt", "--out-dir", "student"],
     "--out-dir student holds the --teacher"),
    (["--teacher", "student.pt"], "--teacher student.pt holds a student"),
    (["--teacher", "none"], "--teacher none: a student needs one"),
    (["--teacher", "nowhere.pt"], "nowhere.pt: No such file"),
    (["--teacher", "ideal", *IMAGES, "--w-max", "2"], "--w-max needs labels"),
    (["--teacher", "plain.pt", "--w-max", "2"], "trained without --label-dropout, cannot guide"),
    (["--out-dir", "other"], "--out-dir other holds a run of ct.py"),
    *(([*CONTINUOUS, f"--{key}", value], f"--{key} does not apply with --objective continuous")
      for key, value in dict(mu=0.5, N=9, solver="heun", dist="l2", weighting="one").items()),
    (["--stop-gradient"], "--stop-gradient does not apply with --objective discrete"),
    ([*CONTINUOUS, "--p-t", "0.5"], "--p-t 0.5: name MEAN STD"),
    (["--p-t", "1", "2", "3"], "--p-t 1.0 2.0 3.0: name MEAN STD"),
    (["--N", "1"], "--N"),
    (["--edit", "inpaint"], "--edit does not apply without --ckpt"),
    (["--ckpt", "teacher.pt", "--sigmas", "80"], "--sigmas does not apply to teacher.pt"),
    (["--ckpt", "student.pt", "--w", "3.5"],
     "--w 3.5: student.pt was trained for weights from 0 to 3"),
    (["--ckpt", "student.pt", "--w", "-0.5"],
     "--w -0.5: student.pt was trained for weights from 0 to 3"),
    (["--ckpt", "plain.pt", "--w", "-0.5"], "--w -0.5: plain.pt was trained for no guidance"),
    (["--ckpt", "teacher.pt", "--w", "-1.01"],
     "argument --w: invalid guidance weight (-1 or more) value: '-1.01'"),
    (["--w-max", "-0.5"], "argument --w-max: invalid number value: '-0.5'"),
    (["--ckpt", "student.pt", "--sampler", "heun"], "--sampler does not apply to student.pt"),
    (["--ckpt", "teacher.pt", "--sampler", "deis", "--churn", "3"],
     "--churn does not apply with --sampler deis"),
    (["--ckpt", "teacher.pt", "--sampler", "ddim"], "argument --sampler: invalid choice: 'ddim'"),
    (["--sampler", "deis"], "--sampler does not apply without --ckpt"),
    (["--ckpt", "student.pt", "--stage", "teacher"], "--stage does not apply to student.pt"),
    (["--ckpt", "student.pt", "--churn", "3"], "--churn does not apply to student.pt"),
    (["--ckpt", "student.pt", "--dataset", "glyphs"], "--dataset does not apply without --eval"),
    (["--ckpt", "student.pt", "--search-times", "2"],
     "--search-times 2 (did you mean python tests/bench.py search-times?)"),
]


@pytest.fixture(scope="module")
def workplace(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("images", "student", "other"):
        (folder / name).mkdir()
    torch.save(last(trained), folder / "student.pt")
    torch.save(last(trained), folder / "student" / "last.pt")
    torch.save(last(trained) | dict(script="ct"), folder / "other" / "last.pt")
    teacher = last(trained / "teacher")
    torch.save(teacher, folder / "teacher.pt")
    teacher["model_args"]["null"] = False
    teacher["ema"]["label_emb.weight"] = teacher["ema"]["label_emb.weight"][:10]
    torch.save(teacher, folder / "plain.pt")
    Image.new("RGB", (32, 32)).save(folder / "images" / "0.png")
    return folder


@pytest.mark.parametrize("flags, message", MISTAKES, ids=lambda value: value if value else "")
def test_mistakes_end_in_one_line(workplace, flags, message):
    assert_mistake(flags, message, "cd.py", workplace)


def test_help(tmp_path):
    done = run("--help", cwd=tmp_path, code=0)
    flags = ("stage teacher teacher-steps label-dropout N objective stop-gradient solver mu dist "
             "p-t weighting parametrisation w-max w sampler churn edit image mask factor "
             "noise-level noisy ckpt sample eval inception sigmas lr-ramp dropout-size")
    for flag in flags.split():
        assert f"\n  --{flag}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
