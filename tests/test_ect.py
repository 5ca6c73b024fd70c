"""ct.py --recipe ect: mapping, loss where the target is the image, from teacher to student."""
import argparse
import copy
import math
import signal
import sys

import numpy as np
import pytest
import torch

import cd
import common
import ct
from test_scripts import STOP_AT_3, assert_same, records, step_by_hand
from util import (SMALL, TINY, VECTORS, assert_mistake, close, fill, gauss, glyph_set, gradient,
                  img, last, run_script)

IN_STUDENT = STOP_AT_3.replace(' == 2', ' == 2 and "teacher" not in str(self.path)')

# ---- the mapping

@pytest.mark.parametrize("q, stage, r", VECTORS["ect"]["r"])
def test_mapping(q, stage, r):
    close(ct.ect_r(torch.tensor(VECTORS["ect"]["r_t"]), stage, q, 8.0, 1.0), r)


def test_mapping_without_sigmoid():
    """K = 0: n(t) = 1, a fixed ratio."""
    r = ct.ect_r(torch.tensor([0.5, 80.0]), 1, 2.0, 0.0, 1.0)
    close(r, VECTORS["ect"]["r_const_q2_stage1_of_0.5_80"])


def test_mapping_knows_b():
    """At t = ln(3) / B the sigmoid is 1/4, whatever B is."""
    for b in (0.5, 2.0):
        t = math.log(3) / b
        close(ct.ect_r(torch.tensor([t]), 4, 2.0, 8.0, b), [t * (1 - 3 / 32)])


def settings(**flags):
    """As parse_flags makes them, where every flag applies."""
    return argparse.Namespace(**dict(teacher=None) | ct.recipe(flags) | flags)


@pytest.mark.parametrize("q, stages", [(2.0, 16), (4.0, 8), (256.0, 2), (1e5, 1)])
def test_r_is_below_t_in_the_last_stage_that_is_allowed(q, stages):
    ct.check(settings(recipe="ect", q=q, stages=stages))
    t = torch.logspace(-4, 3, 10_000)
    gap = t - ct.ect_r(t, stages - 1, q, 8.0, 1.0)  # what 1 / (t - r) is made of
    close(gap / t, q**-stages * (1 + 8 / (1 + t.double().exp())), 2e-2, 0)
    with pytest.raises(common.UserError, match="the same number"):
        ct.check(settings(recipe="ect", q=q * 1.1, stages=stages + 1))


# ---- the loss

class Toy(torch.nn.Module):
    """A network whose consistency function is f(x, t) = x / (1 + 4 t^2)."""
    def forward(self, x_in, c_noise, y=None, cond=None, masks=None):
        t = (c_noise.double() / 250).exp()
        c_skip, c_out, c_in = (common.bcast(s, x_in) for s in common.cm_scalings(t))
        x = x_in.double() / c_in
        f = x / (1 + 4 * common.bcast(t, x) ** 2)
        return ((f - c_skip * x) / c_out).float()


def toy_losses(dist, weight):
    t = (-1.1 + 2.0 * gauss((4,), 7)).exp()
    r = ct.ect_r(t, 2, 2.0, 8.0, 1.0)
    close(t, VECTORS["ect"]["loss"]["t"])
    close(r, VECTORS["ect"]["loss"]["r"])
    x0, noise = img((4, 3, 16, 16)), gauss((4, 3, 16, 16), 5)
    return t, r, ct.loss_fn(Toy(), Toy(), x0, noise, r, t, None, None, dist, weight)


def test_loss_vectors():
    """c = 0 is `norm`. iCT's c, 0.06 for 64 pixels, by the formula that the reference confirms."""
    t, r, losses = toy_losses(common.make_distance("norm", "cpu"), ct.WEIGHTS["inverse"])
    close(losses, VECTORS["ect"]["loss"]["c0"], 1e-4)

    def with_c(c):
        distance = torch.tensor(VECTORS["ect"]["loss"]["c0"]) * (t - r)
        return (distance**2 + c**2).sqrt() - c
    close(with_c(0.06) / (t - r), VECTORS["ect"]["loss"]["c0.06"], 1e-4)
    _, _, losses = toy_losses(common.pseudo_huber, ct.WEIGHTS["inverse"])
    close(losses, with_c(0.00054 * math.sqrt(768)) / (t - r), 1e-4)
    assert abs(0.00054 * math.sqrt(3 * 64 * 64) - 0.06) < 2e-4


def test_edm_weighting():
    """ImageNet-64's (t^2 + sigma_data^2) / (t sigma_data)^2, whatever r is."""
    t, _, losses = toy_losses(common.norm, ct.WEIGHTS["edm"])
    _, _, plain = toy_losses(common.norm, ct.WEIGHTS["one"])
    close(losses, plain * (t**2 + 0.25) / (t * 0.5) ** 2)


def test_where_r_is_0_the_target_is_the_image():
    """And the noise of t_min. To the order of t_min / t it is the loss of denoising, over t."""
    net, t = fill(common.UNet(**TINY)), torch.tensor([0.05, 0.4, 1.5])
    x0, noise = img((3, 3, 16, 16)), gauss((3, 3, 16, 16), 5)
    r = ct.ect_r(t, 0, 2.0, 8.0, 1.0)
    assert r.tolist() == [0, 0, 0]
    losses = ct.loss_fn(net, net, x0, noise, r, t, None, None, common.norm, ct.WEIGHTS["inverse"])
    column = t.view(3, 1, 1, 1)
    x_t = x0 + column * noise
    exact = common.consistency(net, x_t, t) - (x0 + 0.002 * noise)
    exact = exact.square().sum((1, 2, 3)).sqrt() / t
    close(losses, exact.detach(), 1e-4)
    denoising = (common.denoise(net, x_t, t) - x0).square().sum((1, 2, 3)).sqrt() / t
    difference = ((losses - denoising) / denoising).abs()
    assert (difference < 2 * 0.002 / t).all() and not torch.equal(losses, denoising), difference


def test_times_below_t_min_teach_nothing_and_spoil_nothing():
    """Both branches are the identity there: distance 0, where a root has no derivative."""
    net = fill(common.UNet(**TINY))
    x0, noise, grads = img((2, 3, 16, 16)), gauss((2, 3, 16, 16), 5), []
    for t in (torch.tensor([1.0, 0.001]), torch.tensor([1.0])):
        net.zero_grad()
        B = len(t)
        r = ct.ect_r(t, 3, 2.0, 8.0, 1.0)
        losses = ct.loss_fn(net, net, x0[:B], noise[:B], r, t, None, None, common.norm,
                            ct.WEIGHTS["inverse"])
        losses.sum().backward()
        grads.append(gradient(net))
    assert losses[0] > 0 and grads[1].norm() > 0
    close(grads[0], grads[1], 1e-4, 1e-4 * grads[1].abs().max().item())


def test_the_weight_sees_levels_below_t_min():
    """Taken after the clamp, t = 0.001 would weigh 1 / 0, and r = 0 not 1 / t."""
    seen = []

    def weight(*levels):
        seen.extend(levels)
        return 1
    t, r = torch.tensor([0.001, 1.0]), torch.tensor([0.0, 0.0])
    x0 = img((2, 3, 16, 16))
    ct.loss_fn(Toy(), Toy(), x0, x0, r, t, None, None, common.norm, weight)
    assert torch.equal(seen[0], r) and torch.equal(seen[1], t)


def test_norm_by_finite_differences():
    x = img((2, 3, 4, 4)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: common.norm(x, gauss((2, 3, 4, 4), 5).double()), x)


# ---- recipes

def test_recipes_are_the_papers():
    wanted = {
        "cifar10": dict(q=2, stages=8, dist="norm", weighting="inverse", p_t=[-1.1, 2.0], lr=1e-4,
                        batch_size=128, total_steps=200_000, dropout=0.2, ema_decay=0.9999,
                        flip=False,
                        sigmas=[80, 0.821], class_cond=False),
        "imagenet64": dict(q=4, stages=4, dist="huber", weighting="edm", p_t=[-0.8, 1.6],
                           batch_size=128, total_steps=100_000, ema_decay=0.9999,
                           sigmas=[80, 1.526], class_cond=True, dropout=0.4, dropout_size=16,
                           flip=False),
    }
    for dataset, settings in wanted.items():
        settings = settings | dict(mapping=[8, 1])
        actual = ct.recipe(dict(recipe="ect", dataset=dataset))
        assert settings == {key: actual[key] for key in settings}, dataset
        assert "teacher" not in actual and actual["batch_size"] % actual["micro_batch"] == 0
    assert ct.recipe(dict(recipe="ct"))["teacher"] == ct.recipe({})["teacher"] == "none"
    continuous = ct.recipe(dict(objective="continuous", dataset="cifar10"))
    wanted = dict(recipe="ct", teacher=None, lr=5e-6, p_t=["uniform"], batch_size=512, dropout=0.3)
    assert wanted == {key: continuous[key] for key in wanted}
    ours = ct.recipe(dict(objective="continuous"))
    assert (ours["lr"], ours["dropout"]) == (1e-4, 0)


def test_recipes_of_scm_are_the_papers():
    """sCM Tables 3 to 6; ours for glyphs, and from scratch."""
    big = dict(lr=1e-4, r=1.0, warm_up=10_000, tangent_c=0.1, total_steps=400_000, teacher=None)
    wanted = {
        "cifar10": big | dict(batch_size=512, p_t=[-1.0, 1.8], dropout=0.2, sigmas=[80, 0.821],
                              lr_decay=None),
        "imagenet64": big | dict(batch_size=2048, p_t=[-1.0, 1.6], dropout=0.45, lr_decay=35_000,
                                 sigmas=[80, 0.98238]),  # 0.5 tan 1.1
    }
    assert ct.recipe(dict(objective="scm", dataset="imagenet64"))["dropout_size"] == 16
    for dataset, settings in wanted.items():
        ours = ct.recipe(dict(objective="scm", dataset=dataset))
        assert settings == {key: ours[key] for key in settings}, dataset
        ours = cd.recipe(dict(objective="scm", dataset=dataset))
        settings |= dict(dropout=0)
        del settings["teacher"]
        settings["p_t"] = dict(cifar10=[-1.0, 1.4]).get(dataset, settings["p_t"])
        assert settings == {key: ours[key] for key in settings}, dataset
    half_life = math.log(0.5) / math.log(ct.recipe(dict(objective="scm", dataset="cifar10"))
                                         ["ema_decay"])
    assert abs(half_life * 512 / 0.5e6 - 1) < 0.01  # images
    scratch = ct.recipe(dict(objective="scm", teacher="none"))
    assert (scratch["r"], scratch["warm_up"], scratch["lr"]) == (0.1, 1500, 1e-3)
    for module, dataset, bandwidth in ((ct, "glyphs", 1), (cd, "glyphs", 1), (cd, "cifar10", 2.5)):
        ours = module.recipe(dict(objective="continuous", dataset=dataset))
        assert ours["bandwidth"] == bandwidth


def parse(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ct.py", *words.split()])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return common.parse_flags(ct.make_parser(), ct.recipe, ct.check)


@pytest.mark.parametrize("flags, message", [
    ("--q 2", "--q does not apply with --recipe ict"),
    ("--recipe ct --stages 2", "--stages does not apply with --recipe ct"),
    ("--mapping 8 1", "--mapping does not apply with --recipe ict"),
    ("--teacher-steps 3", "--teacher-steps does not apply with --teacher none"),
    ("--recipe ct --dist l2 --teacher a.pt", "--teacher does not apply with --recipe ct"),
    ("--recipe ect --s0 10", "--s0 does not apply with --recipe ect"),
    ("--recipe ect --s1 10", "--s1 does not apply with --recipe ect"),
    ("--recipe ect --mu0 0.9", "--mu0 does not apply with --recipe ect"),
    ("--recipe ect --schedule sqrt", "--schedule does not apply with --recipe ect"),
    ("--recipe ect --objective continuous", "--objective continuous does not apply"),
    ("--recipe ect --teacher ideal", "--teacher ideal has no weights"),
    ("--recipe ect --teacher a.pt --teacher-steps 3", "--teacher-steps does not apply"),
    ("--recipe ect --teacher a.pt --net glyphs", "--net does not apply with --teacher a.pt"),
    ("--recipe ect --teacher a.pt --no-class-cond", "--class-cond does not apply with --teacher"),
    ("--objective continuous --teacher a.pt --net glyphs", "--net does not apply with --teacher"),
    ("--objective continuous --s0 10", "--s0 does not apply with --objective continuous"),
    ("--objective continuous --dist l2", "--dist does not apply with --objective continuous"),
    ("--objective continuous --weighting one", "--weighting does not apply with --objective"),
    ("--objective continuous --q 2", "--q does not apply"),
    ("--recipe ect --objective scm", "--objective scm does not apply with --recipe ect"),
    ("--recipe ict --objective scm", "--objective scm does not apply with --recipe ict"),
    ("--bandwidth 2", "--bandwidth does not apply with --objective discrete"),
    ("--objective continuous --warm-up 5", "--warm-up does not apply with --objective continuous"),
    ("--objective scm --mu0 0.9", "--mu0 does not apply with --objective scm"),
    ("--objective scm --teacher a.pt --net glyphs", "--net does not apply with --teacher a.pt"),
    ("--objective scm --teacher ideal", "--teacher ideal has no weights"),
])
def test_flags_that_do_not_apply(flags, message, monkeypatch):
    with pytest.raises(common.UserError) as error:
        parse(flags, monkeypatch)
    assert str(error.value).startswith(message)


def test_settings_that_apply(monkeypatch):
    grid, tuning = {"schedule", "s0", "s1", "mu0"}, {"q", "stages", "mapping"}
    ect = vars(parse("--recipe ect", monkeypatch))
    assert ect["teacher"] is None and tuning | {"teacher_steps", "net"} <= ect.keys()
    assert not ect.keys() & grid
    teacher = vars(parse("--recipe ect --teacher a.pt", monkeypatch))
    assert not teacher.keys() & {"net", "class_cond", "teacher_steps"}
    scratch = vars(parse("--recipe ect --teacher none --net glyphs", monkeypatch))
    assert "net" in scratch and "teacher_steps" not in scratch
    ict = vars(parse("--recipe ict --teacher none", monkeypatch))
    assert grid <= ict.keys() and not ict.keys() & tuning
    continuous = vars(parse("--objective continuous", monkeypatch))
    scm = {"r", "warm_up", "tangent_c", "lr_decay"}
    assert not continuous.keys() & (grid | tuning | scm | {"dist", "weighting"})
    ours = vars(parse("--objective scm --teacher none --net glyphs", monkeypatch))
    assert scm | {"bandwidth", "net"} <= ours.keys()
    assert not ours.keys() & (grid | tuning | {"dist", "weighting"})
    assert not vars(parse("", monkeypatch)).keys() & (scm | {"bandwidth"})


# ---- the script

PLAIN = ("--precision fp32 --device cpu --batch-size 8 --micro-batch 4 --total-steps 5 "
         "--log-every 1 --sample-every 0 --save-every 0").split()
TUNE = [*PLAIN, *"--recipe ect --dropout 0.3 --flip --stages 3 --q 3 --mapping 6 2".split()]
RUN = [*SMALL[:SMALL.index("--precision")], *TUNE, "--teacher-steps", 4]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run_script(*RUN, "--out-dir", "whole", "--sample-every", 5, cwd=folder, code=0)
    return folder / "whole"


def test_one_command_leaves_a_teacher_and_a_student(trained):
    teacher, student = last(trained / "teacher"), last(trained)
    assert (teacher["script"], teacher["step"]) == ("cd", 4)
    assert teacher["args"]["stage"] == "teacher"
    assert (student["script"], student["step"]) == ("ct", 5)
    assert student["args"]["teacher"] == "whole/teacher/last.pt" and student["target"] is None
    changed = dict(dropout=0.3, parametrisation="skip")
    assert student["model_args"] == teacher["model_args"] | changed
    assert (trained / "samples" / "000005.png").exists()


def test_the_loop_by_hand(trained):
    """From the teacher's average on: t, r and the loss anew, RAdam and EMA; 5 steps of 3 stages."""
    student, dataset = last(trained), glyph_set(16)
    args = argparse.Namespace(**student["args"])
    net = common.UNet(**student["model_args"])
    net.load_state_dict(last(trained / "teacher")["ema"])
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer, log = torch.optim.RAdam(net.parameters(), args.lr), records(trained)
    assert [r["stage"] for r in log] == [0, 0, 1, 1, 2]
    indices = iter(list(common.index_batches(len(dataset), args.seed, 0, 5, 8, 4)))
    for k, record in enumerate(log):
        losses = []
        for m in range(2):
            common.seed_everything(common.STEP, args.seed, k, m)
            x0, y = common.to_device(dataset.__getitems__(next(indices)), torch.device("cpu"), True)
            t = (args.p_t[0] + args.p_t[1] * torch.randn(4)).exp()
            r = torch.relu(t - t * (1 + 6 / (1 + (2 * t).exp())) / 3 ** (record["stage"] + 1))
            noise = torch.randn_like(x0)
            masks = net.draw_masks(4)
            outputs = []
            for time in (t, r):  # the same noise, the same units dropped out
                time = time.clamp(min=0.002)
                x = x0 + time.view(4, 1, 1, 1) * noise
                outputs.append(common.consistency(net, x, time, y, masks=masks))
            difference = outputs[0] - outputs[1].detach()
            losses.append(difference.square().sum((1, 2, 3)).sqrt() / (t - r))
        step_by_hand(record, net, optimizer, losses, {ema: args.ema_decay})
    assert_same(net.state_dict(), student["net"], 2e-5)
    assert_same(ema.state_dict(), student["ema"], 2e-5)


@pytest.mark.parametrize("where, part", [(STOP_AT_3, "teacher"), (IN_STUDENT, ".")],
                         ids=["in the teacher", "in the student"])
def test_stopped_and_resumed_is_the_same_run(trained, tmp_path, where, part):
    run_script(*RUN, "--out-dir", "run", cwd=tmp_path, prelude=where, code=128 + signal.SIGTERM)
    assert last(tmp_path / "run" / part)["step"] == 3
    assert (tmp_path / "run" / "last.pt").exists() == (part == ".")
    run_script(*RUN, "--out-dir", "run", cwd=tmp_path, code=0)
    assert_same(last(tmp_path / "run"), last(trained))
    assert [r["stage"] for r in records(tmp_path / "run")] == [0, 0, 1, 1, 2]


def test_two_processes_equal_one_from_a_teacher_that_is_there(trained, tmp_path):
    run_script(*TUNE, "--teacher", trained / "teacher" / "last.pt", "--out-dir", "run",
               cwd=tmp_path, ranks=2, code=0)
    assert_same(last(tmp_path / "run"), last(trained), 2e-6)


def first_net(folder, *flags):
    run_script(*PLAIN, *flags, "--total-steps", 1, "--lr", 0, "--out-dir", "run", cwd=folder,
               code=0)
    return last(folder / "run")


def test_from_scratch(tmp_path):
    state = first_net(tmp_path, *SMALL, "--recipe", "ect", "--teacher", "none")
    common.seed_everything(common.INIT, 0)
    assert_same(common.make_net(state["model_args"]).state_dict(), state["net"])


def test_continuous_training_starts_from_a_diffusion_model_too(trained, tmp_path):
    teacher = trained / "teacher" / "last.pt"
    state = first_net(tmp_path, "--objective", "continuous", "--teacher", teacher, "--bandwidth",
                      "inf")
    assert_same(state["net"], last(trained / "teacher")["ema"])


MISTAKES = {
    "a student to start from": ("--teacher student.pt", "was written by ct.py"),
    "teacher in the student's folder": ("--teacher run/last.pt --out-dir run",
                                        "--out-dir run holds the --teacher"),
    "another number of labels": ("--teacher run/last.pt --dataset one.npy", "knows 10 classes"),
    "one number for the mapping": ("--mapping 8", "--mapping"),
    "a stage that shrinks": ("--q 0.5", "--q"),
}


@pytest.fixture(scope="module")
def workplace(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "run").mkdir()
    torch.save(last(trained), folder / "student.pt")
    torch.save(last(trained / "teacher"), folder / "run" / "last.pt")
    np.save(folder / "one.npy", np.zeros((1, 16, 16, 3), np.uint8))
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line(workplace, mistake):
    flags, message = MISTAKES[mistake]
    assert_mistake(["--recipe", "ect", *flags.split()], message, "ct.py", workplace)
