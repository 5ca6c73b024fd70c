"""ctm.py as a user runs it: training, every turn by hand, resuming, sampling, editing, mistakes."""
import argparse
import collections
import copy
import functools
import hashlib
import math
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import ctm
from test_released import random_weights
from test_scripts import assert_same, records
from util import ROOT, SMALL, assert_mistake, fill, last, run_script, torchrun

MACHINE = "--device cpu --precision fp32 "
NET = "--net glyphs base=32 mult=1,1 blocks=1 image_size=8 "
PLAIN = MACHINE + ("--batch-size 12 --micro-batch 4 --log-every 1 --sample-every 0 --save-every 0 "
                   "--flip --lr 0.03 --mu 0.9 --ema-decay 0.8 ")
BOTH = PLAIN + NET + "--teacher-steps 4 --total-steps 2 "
TEACHER = "--teacher teacher.pt "
GAME = PLAIN + TEACHER + ("--total-steps 8 --lr 0.2 --dropout 0.3 --dist l2 --disc conv "
                          "--disc-start 2 --disc-weight 0.7 --disc-lr 0.05 ")
CRITICS = [4, 6, 8]  # whose steps these are, counted from 1
VARIANTS = {
    "published": TEACHER + "--lr 0",
    "zero": TEACHER + "--lr 0 --s-init zero --sample-every 2",
    "local": TEACHER + "--matching local",
    "no-dsm": TEACHER + "--dsm-weight 0 --dropout 0.3",
    "little-dsm": TEACHER + "--dsm-weight 0.3 --disc conv --disc-start 0 --disc-weight 0.7",
    "global": TEACHER + "--matching global --disc conv --disc-start 0",
    "many-steps": TEACHER + "--N 9 --max-steps 8 --dist l1 --s-init zero",
    "scratch": NET + "--teacher none --no-class-cond --lr 0.1",
    "scratch-heun": NET + "--teacher none --solver heun --lr 0.1",
}
IDEAL = MACHINE + (
    "--teacher ideal --dataset four.npz --no-flip --batch-size 16 --total-steps 200 --lr 4e-3 "
    "--ema-decay 0.97 --log-every 50 --sample-every 0 --out-dir ideal "
    "--net glyphs base=32 mult=1 blocks=1 image_size=8")

STOPS = {"teacher/teacher": 2, "generator": 2, "critic": 3}  # the step after which they stop
WATCH = f"""
import os, signal
write, save_checkpoint = common.Log.write, common.save_checkpoint
def write_and_stop(self, record):
    write(self, record)
    if record["step"] == {STOPS}.get(str(self.path.parent)):
        os.kill(os.getpid(), signal.SIGTERM)
def save_and_keep(path, state, later=None):
    save_checkpoint(path, state, later)
    if path.name == "last.pt":
        save_checkpoint(path.with_name(f"{{state['step']}}.pt"), state)
common.Log.write, common.save_checkpoint = write_and_stop, save_and_keep
"""
glyphs = functools.cache(lambda: common.load_dataset("glyphs", None, 8))


def noise_of(images, seed):
    return common.SeededNoise(torch.arange(images), seed)


def save_net(path, script="ctm", stage=None, net=NET.split()[1:], offset=0.0, plain=False):
    """A checkpoint that draws something without having been trained, or its weights alone."""
    model_args = common.net_settings(net) | dict(classes=10, dropout=0.0, cond=script == "ctm")
    state = fill(common.UNet(**model_args), offset).state_dict()
    args = dict(stage=stage) if stage else {}
    whole = dict(script=script, args=args, model_args=model_args, ema=state)
    torch.save(state if plain else whole, path)


def four_images():
    """(4,8,8,3), of two classes: patterns of black and white quarters."""
    quarters = [[0, 1], [0, 1]], [[1, 0], [1, 0]], [[0, 0], [1, 1]], [[1, 1], [0, 0]]
    images = [np.kron(np.array(q)[..., None], np.ones((4, 4, 3))) for q in quarters]
    return np.stack(images).astype(np.uint8) * 200 + 27


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with its state kept after every step, the same stopped and resumed, the variants."""
    folder = tmp_path_factory.mktemp("trained")
    save_net(folder / "teacher.pt", "cd", "teacher")
    shutil.copy(folder / "teacher.pt", folder / "moved.pt")
    save_net(folder / "changed.pt", "cd", "teacher", offset=0.01)
    np.savez(folder / "four.npz", arr_0=four_images(), arr_1=np.array([0, 0, 1, 1]))
    commands = {"both": BOTH + "--sample-every 4 --out-dir both",
                "game": GAME + "--sample-every 4 --save-every 1 --out-dir game",
                "other flags": BOTH + "--mu 0.5 --out-dir both",
                "named": PLAIN + "--total-steps 2 --teacher both/teacher/last.pt --out-dir both",
                "ideal": IDEAL}
    for where, flags in dict(teacher=BOTH, generator=GAME, critic=GAME).items():
        for part in ("stopped", "resumed"):
            commands[where, part] = flags + f"--out-dir {where}"
    for name, flags in VARIANTS.items():
        commands[name] = PLAIN + f"{flags} --total-steps 2 --out-dir {name}"
    for teacher in ("moved.pt", "changed.pt"):
        commands[teacher] = commands["local"] + f" --teacher {teacher}"
    return folder, run_each(folder, commands, WATCH)


def run_each(folder, commands, prelude=None):
    return {name: run_script(*flags.split(), script="ctm.py", cwd=folder, prelude=prelude)
            for name, flags in commands.items()}


def ended(done, name, code=0):
    """The folder, after a look at the exit code of the command."""
    folder, commands = done
    assert commands[name].returncode == code, commands[name]
    return folder


# ---- training

def test_one_command_leaves_a_teacher_and_a_student(trained):
    folder = ended(trained, "both") / "both"
    teacher, student = last(folder / "teacher"), last(folder)
    args = student["args"]
    assert teacher.items() >= dict(script="cd", step=4).items()
    assert teacher["args"].items() >= dict(
        stage="teacher", batch_size=32, micro_batch=4, lr=2e-3).items()
    assert [student[key] for key in ("script", "step", "images", "skipped")] == ["ctm", 2, 24, 0]
    assert args["teacher"] == "both/teacher/last.pt"
    assert not args.keys() & {"net", "class_cond"} and args.get("teacher_steps") is None
    digest = hashlib.sha256((folder / "teacher" / "last.pt").read_bytes()).hexdigest()
    assert args["teacher_digest"] == digest[:12]
    assert {**student["model_args"], "null": False} == teacher["model_args"] | dict(cond=True)
    for part in (folder, folder / "teacher"):
        assert_same(torch.load(part / "ema.pt", weights_only=True), last(part)["ema"])
        assert Image.open(part / "samples" / f"{last(part)['step']:06d}.png").height == 6 * 64
    assert not list(folder.rglob("*.tmp"))


def test_both_stages_are_found_again(trained):
    """With its teacher named the run is the same; with another flag it is refused, and stays."""
    ended(trained, "other flags", 2)
    assert "--mu 0.9 there, 0.5 now" in trained[1]["other flags"].stderr.splitlines()[-1]
    folder = ended(trained, "named") / "both"
    assert "resumed at step 2" in trained[1]["named"].stdout and last(folder)["args"]["mu"] == 0.9


def test_the_log_says_what_it_promises(trained):
    names = set("step images loss loss_bins loss_dsm lambda_dsm k grad_norm lr images_per_s "
                "peak_gb skipped".split())
    for step, record in enumerate(records(ended(trained, "game") / "game"), 1):
        assert record["step"] == step and record["images"] == 12 * step and record["k"] in (1, 2, 3)
        critics = ["loss_gan", "lambda_gan"] * (step > 2) + ["loss_disc"] * (step > 3)
        assert record.keys() == names.union(critics)


def start(args, model_args, origin):
    """The student before its first step."""
    common.seed_everything(common.INIT, args.seed)
    net = common.UNet(**model_args)
    if args.s_init == "published":
        for block in [block for block in net.modules() if isinstance(block, common.ResBlock)]:
            block.emb_layers_s[1].reset_parameters()
    if origin is not None:
        net.load_state_dict(origin.state_dict(), strict=False)
    return net


def renew_by_hand(critic):
    for layer in critic.modules():
        if hasattr(layer, "parametrizations"):
            W = layer.parametrizations.weight.original.detach().flatten(1)
            norm = layer.parametrizations.weight[0]
            norm._u.copy_(F.normalize(W @ norm._v, dim=0))
            norm._v.copy_(F.normalize(W.T @ norm._u, dim=0))


def bins_by_hand(of_images):
    bins = [[loss for t, loss in of_images if low < t <= high]
            for low, high in ((0, 0.1), (0.1, 1), (1, 10), (10, 80.1))]
    return [sum(losses) / len(losses) if losses else math.nan for losses in bins]


def by_hand(args, model_args, origin):
    """A run anew: after each step what its line of the log and its checkpoint should hold.

    Formulas are ctm's; what is drawn when and from which seed, whose turn it is, sums and averages
    are written here a second time.
    """
    dataset, times, B, b = glyphs(), common.karras_times(args.N), args.batch_size, args.micro_batch
    net = start(args, model_args, origin)
    target, ema = (copy.deepcopy(net).requires_grad_(False) for _ in range(2))
    critic, disc_start = None, math.inf
    optimizers = dict(optimizer=torch.optim.RAdam(net.parameters(), args.lr))
    if args.disc == "conv":
        common.seed_everything(common.INIT, args.seed, 1)
        critic, disc_start = ctm.ConvCritic(8).eval(), args.disc_start
        optimizers["critic_optimizer"] = torch.optim.RAdam(
            critic.parameters(), args.disc_lr, betas=(0.5, 0.9))
    last_layer = net.get_parameter(
        f"output_blocks.{len(net.output_blocks) - 1}.0.out_layers.3.weight")
    dist = dict(l1=common.l1, l2=common.l2, huber=common.pseudo_huber)[args.dist]

    def D(x, t, y):
        if origin is None:
            return common.denoise(target, x, t, y, 250 * t.log())
        return common.denoise(origin, x, t, y)

    def solve(x, i, k, y):
        if args.solver == "jump":
            return ctm.G(target, x, times[i], times[i - k], y)
        for done in range(k):
            x = common.heun_step(lambda x, t: D(x, t, y), x, times[i - done], times[i - done - 1])
        return x

    batches = common.index_batches(len(dataset), args.seed, 0, args.total_steps, B, b)
    for step in range(args.total_steps):
        steps = np.arange(1, args.max_steps + 1)
        rng = np.random.default_rng((common.SOLVER, args.seed, step))
        k = int(rng.choice(steps, p=steps / steps.sum()))
        adversarial = step >= disc_start
        critics_turn = adversarial and (step - disc_start) % 2 == 1
        sums, of_images = collections.defaultdict(float), []
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=False)
        if critics_turn:
            renew_by_hand(critic)
        for m in range(B // b):
            common.seed_everything(common.STEP, args.seed, step, m)
            batch = dataset.__getitems__(next(batches))
            x0, y = common.to_device(batch, torch.device("cpu"), args.flip)
            y, noise = y if model_args["classes"] else None, torch.randn_like(x0)
            i, j = ctm.draw_indices(b, args.N, k, "cpu")
            if args.matching == "global":
                j = i - k
            if critics_turn:
                with torch.no_grad():
                    x_t = x0 + common.bcast(times[i], x0) * noise
                    x_s = ctm.G(net, x_t, times[i], times[j], y)
                    fake = ctm.G(target, x_s, times[j], torch.full((b,), 0.002), y)
                real_loss = (1 - critic(x0)).clamp(min=0).mean()
                total = real_loss + (1 + critic(fake)).clamp(min=0).mean()
                terms = dict(loss_disc=total)
            else:
                terms = {}
                if args.dsm_weight:
                    t = ctm.dsm_times(b, args.p_t, "cpu")
                    x_t = x0 + common.bcast(t, x0) * torch.randn_like(x0)
                    dsm = (ctm.g(net, x_t, t, t, y) - x0).square().mean((1, 2, 3))
                    terms["dsm"] = ((1 / t**2 + 4) * dsm).mean()
                losses, x_est = ctm.loss_fn(net, target, solve, x0, noise, times, i, j, k, y, dist)
                of_images += zip(times[i].tolist(), losses.tolist())
                if adversarial:
                    terms["gan"] = -critic(x_est).mean()

                def strength(loss):
                    return torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
                total, told = losses.mean(), dict(loss=losses.mean())
                for name, term in terms.items():
                    weight = strength(told["loss"]) / (strength(term) + 1e-4)
                    low, high = dict(dsm=(0, 1e4), gan=(0.01, 10))[name]
                    told |= {f"loss_{name}": term, f"lambda_{name}": weight.clamp(low, high)}
                    factor = dict(dsm=args.dsm_weight, gan=vars(args).get("disc_weight"))[name]
                    total = total + factor * told[f"lambda_{name}"] * term
                terms = told
            (total * b / B).backward()
            for key, value in terms.items():
                sums[key] += value.item() * b / B
        optimizers["critic_optimizer" if critics_turn else "optimizer"].step()
        if not critics_turn:
            grad_norm = sum(p.grad.square().sum() for p in net.parameters()).sqrt().item()
            sums |= dict(k=k, grad_norm=grad_norm, loss_bins=bins_by_hand(of_images))
            with torch.no_grad():
                for average, decay in ((target, args.mu), (ema, args.ema_decay)):
                    for p, p_average in zip(net.parameters(), average.parameters()):
                        p_average.copy_(decay * p_average + (1 - decay) * p)
        parts = dict(net=net, target=target, ema=ema) | (dict(critic=critic) if critic else {})
        yield sums, {key: part.state_dict() for key, part in (parts | optimizers).items()}


def moments(state):
    """Of an optimizer, on the scale of the gradients; or any other state as it is."""
    if "param_groups" not in state:
        return state
    return {(i, key): value.sqrt() if key == "exp_avg_sq" else value
            for i, values in state["state"].items() for key, value in values.items()}


def assert_by_hand(folder, kept, teacher):
    """The log says, and the checkpoints in `kept`, by step, hold what they should."""
    state = last(folder)
    origin = None if teacher is None else common.load_network(teacher, ("cd",))[0]
    run = by_hand(argparse.Namespace(**state["args"]), state["model_args"], origin)
    for step, (sums, parts) in enumerate(run, 1):
        record = records(folder)[step - 1]
        for key, value in sums.items():
            found = np.array(record[key], float)
            np.testing.assert_allclose(found, value, 3e-4, 1e-6, err_msg=f"{key} of step {step}")
        for key, part in parts.items() if step in kept else ():
            # Rounding may take a leaky ReLU to its other side.
            tolerance = 5e-4 if "critic" in key else 3e-6
            assert_same(moments(kept[step][key]), moments(part), tolerance)
    assert step == state["step"]


@pytest.fixture(scope="module")
def kept(trained):
    folder = ended(trained, "game") / "game"
    return {step: torch.load(folder / f"{step}.pt", weights_only=True) for step in range(1, 9)}


def test_every_turn_by_hand(trained, kept):
    assert_by_hand(trained[0] / "game", kept, trained[0] / "teacher.pt")
    for record in records(trained[0] / "game")[2:]:
        assert 0.01 < record["lambda_gan"] < 10  # no bound of it hides its formula


def test_in_each_turn_the_other_player_rests(kept):
    for step in range(2, 9):
        before, after = kept[step - 1], kept[step]
        mine, others = ("net", "target", "ema", "optimizer"), ("critic", "critic_optimizer")
        if step in CRITICS:
            mine, others = others, mine
        for key in others:
            assert_same(dict(part=before[key]), dict(part=after[key]))
        for key in mine:
            with pytest.raises(AssertionError):
                assert_same(dict(part=before[key]), dict(part=after[key]))
    assert not kept[3]["critic_optimizer"]["state"]
    assert kept[8]["critic_optimizer"]["state"][0]["step"] == len(CRITICS)
    before, after = (kept[step]["critic"] for step in (3, 4))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed >= {name for name in after if name.endswith("original")}
    assert {"_u", "_v"} < {name.split(".")[-1] for name in changed}


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("published", "zero")])
def test_variants_by_hand(trained, name):
    folder = ended(trained, name) / name
    teacher = None if "scratch" in name else trained[0] / "teacher.pt"
    assert_by_hand(folder, {last(folder)["step"]: last(folder)}, teacher)
    assert last(folder)["model_args"]["classes"] == (0 if name == "scratch" else 10)
    losses = {record["loss"] for record in records(folder)}
    with_critic = last(folder)["args"]["disc"] == "conv"  # its is the second step
    assert len(losses) == 1 + (not with_critic)


def test_without_the_denoising_loss_the_log_has_none(trained):
    folder = ended(trained, "no-dsm") / "no-dsm"
    for record in records(folder):
        assert "loss" in record and not record.keys() & {"loss_dsm", "lambda_dsm"}
    assert "p_t" not in last(folder)["args"]


@pytest.mark.parametrize("weight, code", [("1", 0), ("0.5", 2)])
def test_a_run_of_before_the_weight_is_resumed(trained, tmp_path, weight, code):
    """Its denoising loss had weight 1."""
    state = last(ended(trained, "game") / "game")
    del state["args"]["dsm_weight"]
    (tmp_path / "old").mkdir()
    torch.save(state, tmp_path / "old" / "last.pt")
    shutil.copy(trained[0] / "teacher.pt", tmp_path)
    done = run_script(*GAME.split(), "--dsm-weight", weight, "--out-dir", "old", script="ctm.py",
                      cwd=tmp_path, code=code)
    assert ("resumed at step 8" in done.stdout) == (code == 0)
    assert ("--dsm-weight 1.0 there, 0.5 now" in done.stderr) == (code == 2)


@pytest.mark.parametrize("name", ["published", "zero"])
def test_the_student_begins_as_its_recipe_says(trained, name):
    """With a learning rate of 0 it stays that."""
    state = last(ended(trained, name) / name)
    teacher, _ = common.load_network(trained[0] / "teacher.pt", ("cd",))
    begun = start(argparse.Namespace(**state["args"]), state["model_args"], teacher).state_dict()
    for key in ("net", "target", "ema"):
        assert_same(state[key], begun, 1e-6)
    added = [value for key, value in begun.items() if "emb_layers_s" in key]
    assert added and all(value.any() == (name == "published") for value in added)


@torch.no_grad()
def test_begun_at_zero_it_jumps_as_its_teachers_euler_steps(trained):
    """In one step, two and four: the grids of samples, side by side."""
    path = ended(trained, "zero") / "zero" / "samples" / "000002.png"
    picture = np.asarray(Image.open(path))[::6, ::6].astype(int)
    assert picture.shape == (64, 3 * 80 + 2 * 4, 3)
    D = common.net_denoiser(common.load_network(trained[0] / "teacher.pt", ("cd",))[0])
    grids = [80], [80, 2.51522], [80, 17.5278, 2.51522, 0.169753]  # CTM's
    for block, levels in enumerate(grids):
        x = 80 * noise_of(80, 0)(torch.zeros(80, 3, 8, 8))
        for t, s in zip(levels, [*levels[1:], 0.002]):
            denoised = D(x, torch.full((80,), float(t)), torch.arange(80) % 10)
            x = x + (s - t) / t * (x - denoised)
        wanted = common.to_uint8(x.clamp(-1, 1)).reshape(8, 10, 8, 8, 3)
        wanted = wanted.permute(0, 2, 1, 3, 4).reshape(64, 80, 3).numpy().astype(int)
        found = picture[:, 84 * block:84 * block + 80]
        assert np.abs(found - wanted).max() <= 1 and wanted.std() > 20


def test_a_changed_teacher_is_noticed(trained):
    """And the same one elsewhere is no other."""
    ended(trained, "moved.pt")
    assert "resumed at step 2" in trained[1]["moved.pt"].stdout
    ended(trained, "changed.pt", 2)
    assert "--teacher-digest" in trained[1]["changed.pt"].stderr.splitlines()[-1]


def test_ideal_teacher_on_a_handful_of_images(trained):
    """From the exact denoiser of four images: one step draws those of the class asked for."""
    net, _ = common.load_network(ended(trained, "ideal") / "ideal" / "last.pt", ("ctm",))
    y = torch.arange(64) % 2
    data = torch.from_numpy(four_images()).permute(0, 3, 1, 2) / 127.5 - 1
    x_T = 80 * noise_of(64, 0)(torch.zeros(64, 3, 8, 8))
    drawn = ctm.sample(net, [80.0], 0.0, y, lambda x: x_T / 80, x_T.shape)
    nearest, which = (drawn[:, None] - data).abs().mean((2, 3, 4)).min(1)
    D = common.ideal_denoiser(data, torch.tensor([0, 0, 1, 1]))
    solved = common.heun_sample(lambda x, t: D(x, t, y), x_T, 40)
    led_to = (solved[:, None] - data).abs().mean((2, 3, 4)).argmin(1)
    difference = data[2 * y] - data[2 * y + 1]
    clear = (difference * x_T / 80).sum((1, 2, 3)).abs() > 6  # far from the border between the two
    assert clear.sum() > 40 and nearest.median() < 0.2 and len(set(which.tolist())) == 4
    assert (which // 2 == y).float().mean() > 0.95
    assert (which == led_to)[clear].float().mean() > 0.85


# ---- stopping, resuming, several processes

def assert_same_log(a, b, rtol=0.0):
    """Line by line, what does not depend on the machine, nor was said by a line before."""
    assert len(a) == len(b)
    for one, other in zip(a, b):
        for key in one.keys() - {"images_per_s", "peak_gb"}:
            values = [np.array(record[key], float) for record in (one, other)]
            np.testing.assert_allclose(*values, rtol, err_msg=f"{key} of {one}")


@pytest.mark.parametrize("where, whole, parts", [
    ("teacher", "both", ["teacher", "."]), ("generator", "game", ["."]), ("critic", "game", ["."])])
def test_stopped_and_resumed_is_the_same_run(trained, where, whole, parts):
    """To the last bit: generator, target, critic, its spectral norms' vectors, both optimizers."""
    ended(trained, (where, "stopped"), 128 + signal.SIGTERM)
    folder, whole = ended(trained, (where, "resumed")) / where, trained[0] / whole
    step = 4 if where == "critic" else 3
    saved = {path.stem for path in (folder / parts[0]).glob("[0-9].pt")}
    assert saved == {f"{step}", f"{last(whole / parts[0])['step']}"}
    assert f"resumed at step {step}" in trained[1][where, "resumed"].stdout
    assert len(list(folder.glob("[0-9].pt"))) == 3 - len(parts)
    for part in parts:
        assert_same(last(folder / part), last(whole / part))
        assert_same_log(records(folder / part), records(whole / part))
        assert records(folder / part)[-1].keys() == records(whole / part)[-1].keys()
    if where != "teacher":
        assert {"_u", "_v", "original"} < {name.split(".")[-1] for name in last(folder)["critic"]}


def test_two_processes_equal_one_and_go_on_as_one(trained, tmp_path):
    """Of three micro-batches one has two. The signal reaches one; both finish the critic's step."""
    whole = ended(trained, "game") / "game"
    shutil.copy(trained[0] / "teacher.pt", tmp_path)
    (tmp_path / "watched.py").write_text(f"""
import sys, runpy
sys.path.insert(0, {str(ROOT)!r})
import common
{WATCH}
sys.argv[0] = {str(ROOT / 'ctm.py')!r}
runpy.run_path(sys.argv[0], run_name='__main__')""")
    flags = (GAME + "--sample-every 4 --out-dir critic").split()
    run_script(*flags, script=tmp_path / "watched.py", cwd=tmp_path, launcher=torchrun(2), code=1)
    folder = tmp_path / "critic"
    assert_same(last(folder), torch.load(whole / "4.pt", weights_only=True), 2e-6)
    assert_same_log(records(folder), records(whole)[:4], 1e-4)
    a, b = (np.asarray(Image.open(run / "samples" / "000004.png")).astype(int)
            for run in (folder, whole))
    assert np.abs(a - b).max() <= 1  # each rank drew its part
    run_script(*flags, script="ctm.py", cwd=tmp_path, code=0)
    assert_same(last(folder), last(whole), 2e-6)


# ---- sampling

DRAW = "--ckpt ctm.pt --sample 4 --labels 3 7 --seed 5 "
SAMPLES = {  # flags: levels, gamma
    "": ([80], 0),
    "--sigmas 80 1.6": ([80, 1.6], 0),
    "--sigmas 80 1.6 --gamma 1": ([80, 1.6], 1),
    "--sigmas 50 9 1.6 --gamma 0.4": ([50, 9, 1.6], 0.4),
    "--steps 2 --gamma 0": ([80, 2.5152159], 0),
    "--steps 4 --gamma 0.3": ([80, 17.527834, 2.5152159, 0.16975361], 0.3),
}
PICTURES = {
    "inpaint": "--edit inpaint --image a.png --labels 3",
    "superres": "--edit superres --factor 4 --image a.png b.png --labels 3 7 --sample 2",
    "strokes": "--edit stroke --image a.png --labels 3 --sigmas 5 2",
    "interpolate": "--edit interpolate --labels 3 7 --sample 5",
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """All that is sampled."""
    folder = tmp_path_factory.mktemp("drawn")
    save_net(folder / "ctm.pt", net=SMALL[1:5])
    save_net(folder / "small.pt", net=["cifar-small"], plain=True)
    grey = common.glyphs(2, 0)[0] // 2 + 64  # far from black and white, where bytes are cut off
    for name, image in zip("ab", grey):
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{name}.png")
    torch.save(random_weights(imagenet64(), cheap=True), folder / "released.pt")
    commands = {}
    for flags in (*SAMPLES, "--heun 5", "--sample 7 --steps 2"):
        commands[flags] = DRAW + flags
    for name, flags in PICTURES.items():
        commands[name] = "--ckpt ctm.pt " + flags
    for name in ("small", "released"):
        commands[name] = f"--ckpt {name}.pt --sample 1"
    commands = {name: MACHINE + f"{flags} --save {file_of(name)}"
                for name, flags in commands.items()}
    return folder, run_each(folder, commands)


def file_of(name):
    return "of" + name.replace(" ", "_") + ".npz"


def images(drawn, name):
    return np.load(ended(drawn, name) / file_of(name))["arr_0"].astype(int)


def network(drawn):
    return common.load_network(drawn[0] / "ctm.pt", ("ctm",))[0]


def G(net, x, t, s, y):
    """CTM Sec. 3 with EDM's scalings."""
    t, s = (torch.full((len(x),), float(level)) for level in (t, s))
    T = t.view(-1, 1, 1, 1)
    root = (T**2 + 0.25).sqrt()
    g = 0.25 / root**2 * x + 0.5 * T / root * net(x / root, 250 * t.log(), y, 250 * s.log())
    return (s / t).view(-1, 1, 1, 1) * x + (1 - s / t).view(-1, 1, 1, 1) * g


@torch.no_grad()
def sample_by_hand(net, levels, gamma, y, seed=5):
    noise = noise_of(len(y), seed)
    x = levels[0] * noise(torch.zeros(len(y), 3, net.image_size, net.image_size))
    for t, t_next in zip(levels, [*levels[1:], 0.002]):
        s = (1 - gamma**2) ** 0.5 * (t_next - 0.002) + 0.002
        x = G(net, x, t, s, y)
        if gamma and t_next > 0.002:
            x = x + (t_next**2 - s**2) ** 0.5 * noise(x)
    return common.to_uint8(x.clamp(-1, 1)).numpy().astype(int)


@pytest.mark.parametrize("flags", SAMPLES)
def test_samples_by_hand(drawn, flags):
    wanted = sample_by_hand(network(drawn), *SAMPLES[flags], torch.tensor([3, 7, 3, 7]))
    assert np.abs(images(drawn, flags) - wanted).max() <= 1 and wanted.std() > 20
    said = f"4 samples, {len(SAMPLES[flags][0])} network call(s) each"
    assert said in drawn[1][flags].stdout
    assert np.load(drawn[0] / file_of(flags))["arr_1"].tolist() == [3, 7, 3, 7]


def test_gamma_and_levels_tell(drawn):
    found = [images(drawn, flags) for flags in SAMPLES]
    assert all(np.abs(a - b).max() > 5 for i, a in enumerate(found) for b in found[:i])


def test_heun_samples_the_denoiser(drawn):
    net, y = network(drawn), torch.tensor([3, 7, 3, 7])
    x_T = 80 * noise_of(4, 5)(torch.zeros(4, 3, 16, 16))

    def D(x, t):
        c_skip, c_out, c_in = (common.bcast(c, x) for c in common.edm_scalings(t))
        return c_skip * x + c_out * net(c_in * x, 250 * t.log(), y, 250 * t.log())
    with torch.no_grad():
        wanted = common.to_uint8(common.heun_sample(D, x_T, 5).clamp(-1, 1)).numpy().astype(int)
    assert np.abs(images(drawn, "--heun 5") - wanted).max() <= 1 and wanted.std() > 20
    assert "9 network call(s) each" in drawn[1]["--heun 5"].stdout


def test_an_image_does_not_depend_on_those_beside_it(drawn):
    seven, four = images(drawn, "--sample 7 --steps 2"), images(drawn, "--steps 2 --gamma 0")
    assert np.abs(seven[:4] - four).max() <= 1


# ---- editing

def test_edits_keep_what_is_known(drawn):
    a, b = (np.asarray(Image.open(drawn[0] / f"{name}.png")).astype(int) for name in "ab")
    hole = np.zeros((16, 16), bool)
    hole[4:12, 4:12] = True
    found = images(drawn, "inpaint")
    change = np.abs(found - a)
    assert found.shape == (4, 16, 16, 3)
    assert change[:, ~hole].max() <= 1 and change[:, hole].max() > 50
    assert np.abs(found[0] - found[1])[hole].max() > 5  # several ways to fill it

    patches = lambda x: x.reshape(len(x), 4, 4, 4, 4, 3).mean((2, 4))
    found, whole = images(drawn, "superres"), np.stack([a, a, b, b])
    uncut = patches((found > 0) & (found < 255)) == 1  # nothing cut off at black or white
    difference = patches(found - whole)
    assert uncut.mean() > 0.2 and np.abs(difference * uncut).max() <= 0.51
    assert np.abs(found - whole).mean() > 3


@torch.no_grad()
def test_edits_jump_to_t_min(drawn):
    net = network(drawn)
    pixels = np.asarray(Image.open(drawn[0] / "a.png")) / np.float32(127.5) - 1
    x0 = torch.from_numpy(pixels).permute(2, 0, 1)
    y, noise = torch.full((4,), 3), noise_of(4, 0)
    x = G(net, x0 + 5 * noise(torch.zeros(4, 3, 16, 16)), 5, 0.002, y).clamp(-1, 1)
    x = G(net, x + (2**2 - 0.002**2) ** 0.5 * noise(x), 2, 0.002, y).clamp(-1, 1)
    wanted = common.to_uint8(x).numpy().astype(int)
    assert np.abs(images(drawn, "strokes") - wanted).max() <= 1


def test_interpolation_goes_from_sample_to_sample(drawn):
    ends = sample_by_hand(network(drawn), [80], 0, torch.tensor([3, 3, 7, 7]), seed=0)
    found = images(drawn, "interpolate").reshape(2, 5, 16, 16, 3)
    assert np.abs(found[:, [0, 4]] - ends.reshape(2, 2, 16, 16, 3)).max() <= 1
    assert np.abs(np.diff(found, axis=1)).mean((2, 3, 4)).min() > 1


# ---- released weights

def imagenet64():
    with torch.device("meta"):
        net = common.UNet(**common.NETS["imagenet64"], classes=1000, cond=True)
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


def test_the_key_set_is_that_of_the_released_model():
    lines = sorted(f"{name} {list(shape)}" for name, shape in imagenet64().items())
    assert len(lines) == 617
    assert sum(math.prod(shape) for shape in imagenet64().values()) == 324_100_611
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "0e877bc0386c810858249de99bc9c2c6dde3a3e39fe8b66ec4a7c5bf311daa0d"


def test_the_released_model_loads_and_samples(drawn):
    found = images(drawn, "released")
    assert found.shape == (1, 64, 64, 3) and found.std() > 5
    net, state = common.load_network(drawn[0] / "released.pt", ("ctm",))
    model_args = common.NETS["imagenet64"] | dict(classes=1000, cond=True)
    assert state == dict(script=None, args={}, model_args=model_args)
    for name, value in torch.load(drawn[0] / "released.pt").items():
        of_each_row = slice(None), *[0] * (value.ndim - 1)
        assert torch.equal(net.state_dict()[name][of_each_row], value[of_each_row])


def test_plain_weights_of_a_known_network_draw_as_they_should(drawn):
    net = common.UNet(**common.NETS["cifar-small"], classes=10, cond=True)
    net.load_state_dict(torch.load(drawn[0] / "small.pt"))
    wanted = sample_by_hand(net.eval(), [80], 0, torch.tensor([0]), seed=0)
    assert np.abs(images(drawn, "small") - wanted).max() <= 1 and wanted.std() > 20


# ---- mistakes

JUMP = "--solver jump applies to --teacher none only"
FURTHER = "trajectory.pt has one more input"
MISTAKES = [
    ("--teacher teacher.pt --teacher-steps 5", "--teacher-steps does not apply with --teacher"),
    ("--teacher none --teacher-steps 5", "--teacher-steps does not apply with --teacher none"),
    ("--teacher teacher.pt --net glyphs", "--net does not apply with --teacher teacher.pt"),
    ("--teacher teacher.pt --no-class-cond", "--class-cond does not apply with --teacher"),
    ("--teacher teacher.pt --solver jump", JUMP),
    ("--solver jump", JUMP),
    ("--teacher ideal --solver jump", JUMP),
    ("--teacher none --matching global --solver jump", "--matching global needs --solver heun"),
    ("--teacher none --matching global", "--matching global needs --solver heun"),
    ("--N 5 --max-steps 5", "--max-steps 5: a grid of --N 5 levels has 4 steps"),
    ("--matching local --max-steps 2", "--max-steps does not apply with --matching local"),
    ("--disc-start 5", "--disc-start does not apply with --disc none"),
    ("--disc none --disc-weight 0.5", "--disc-weight does not apply with --disc none"),
    ("--dataset cifar10 --disc none --disc-lr 1", "--disc-lr does not apply with --disc none"),
    ("--disc conv --disc-start 9 --total-steps 9", "--disc-start 9: with --total-steps 9 the"),
    ("--disc projected --disc-start 1", "--disc projected needs timm"),
    ("--p-t 1 2 3", "--p-t 1.0 2.0 3.0: name MEAN STD"),
    ("--p-t uniform", "--p-t uniform: the denoising loss draws"),
    ("--dsm-weight 0 --p-t 0 1", "--p-t does not apply without --dsm-weight"),
    ("--teacher none --dsm-weight 0", "--dsm-weight 0: with --teacher none it is the denoising"),
    ("--dsm-weight -1", "--dsm-weight"),
    ("GAME --dsm-weight 0.5 --out-dir run", "--dsm-weight 1.0 there, 0.5 now"),
    ("--ckpt ctm.pt --dsm-weight 1", "--dsm-weight does not apply with --ckpt"),
    ("--teacher student/last.pt --out-dir student", "--out-dir student holds the --teacher"),
    ("--teacher student.pt", "--teacher student.pt holds a student"),
    ("--teacher ctm.pt", "ctm.pt was written by ctm.py"),
    ("--teacher trajectory.pt", FURTHER),
    ("--teacher nowhere.pt", "nowhere.pt: No such file"),
    ("GAME --mu 0.5 --out-dir run", "--mu 0.9 there, 0.5 now"),
    ("PLAIN --teacher teacher.pt --out-dir run", "--disc conv there, none now"),
    ("--teacher teacher.pt --out-dir student", "--out-dir student holds a run of cd.py"),
    ("--sigmas 80 1", "--sigmas does not apply without --ckpt"),
    ("--gamma 0.5", "--gamma does not apply without --ckpt"),
    ("--steps 2", "--steps does not apply without --ckpt"),
    ("--edit inpaint", "--edit does not apply without --ckpt"),
    ("--ckpt ctm.pt --gamma 0.5", "--gamma says what happens between jumps"),
    ("--ckpt ctm.pt --gamma 0 --heun 5", "--gamma does not apply with --heun"),
    ("--ckpt ctm.pt --gamma 1 --edit interpolate", "--gamma does not apply with --edit"),
    ("--ckpt ctm.pt --gamma 1 --sigmas 80 --edit interpolate", "--gamma does not apply with"),
    ("--ckpt ctm.pt --gamma 1.1", "--gamma"),
    ("--ckpt ctm.pt --steps 2 --sigmas 80", "--steps does not apply with --sigmas"),
    ("--ckpt ctm.pt --heun 5 --sigmas 80", "--heun does not apply with --sigmas"),
    ("--ckpt ctm.pt --steps 2 --heun 5", "--heun does not apply with --steps"),
    ("--ckpt ctm.pt --steps 2 --edit interpolate", "--steps does not apply with --edit"),
    ("--ckpt ctm.pt --heun 5 --edit interpolate", "--heun does not apply with --edit"),
    ("--ckpt ctm.pt --image a.png", "--image does not apply without --edit"),
    ("--ckpt ctm.pt --edit colorize --image a.png --mask a.png", "--mask does not apply with"),
    ("--ckpt ctm.pt --labels 10", "labels 0 to 9"),
    ("--ckpt ctm.pt --matching local", "--matching does not apply with --ckpt"),
    ("--ckpt student.pt", "student.pt was written by cd.py"),
    ("--ckpt consistency.pt", "consistency.pt holds no CTM"),
]
OF_CD = [  # what cd.py says to what ctm.py wrote
    ("--ckpt trajectory.pt", FURTHER),
    ("--ckpt ctm.pt", "ctm.pt was written by ctm.py"),
    ("--teacher trajectory.pt", FURTHER),
]


@pytest.fixture(scope="module")
def mistaken(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    for name, script, stage in (("teacher", "cd", "teacher"), ("student", "cd", "distill"),
                                ("ctm", "ctm", None)):
        save_net(folder / f"{name}.pt", script, stage)
    for name, script in (("consistency", "cd"), ("trajectory", "ctm")):
        save_net(folder / f"{name}.pt", script, net=["cifar-small"], plain=True)
    for path in (trained[0] / "game" / "last.pt", folder / "student.pt"):
        run = folder / ("run" if path.stem == "last" else "student")
        run.mkdir()
        shutil.copy(path, run / "last.pt")
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    return folder


@pytest.mark.parametrize("flags, message", MISTAKES)
def test_mistakes_end_in_one_line(mistaken, flags, message):
    flags = flags.replace("GAME ", GAME).replace("PLAIN ", PLAIN).split()
    prelude = "sys.modules['timm'] = None" if "projected" in flags else None
    assert_mistake(flags, message, "ctm.py", mistaken, prelude)


@pytest.mark.parametrize("flags, message", OF_CD)
def test_what_cd_says_to_a_trajectory_model(mistaken, flags, message):
    assert_mistake(flags.split(), message, "cd.py", mistaken)


def test_the_teacher_is_cds(trained):
    folder = ended(trained, "both")
    flags = MACHINE + "--ckpt both/teacher/last.pt --sample 2 --N 3 --save two.npz"
    run_script(*flags.split(), script="cd.py", cwd=folder, code=0)
    assert np.load(folder / "two.npz")["arr_0"].shape == (2, 8, 8, 3)


def test_help(tmp_path):
    shown = run_script("--help", script="ctm.py", cwd=tmp_path, code=0).stdout
    assert set(re.findall(r"\n  --([\w-]+)", shown)) == set(
        "teacher teacher-steps N max-steps matching solver dist mu s-init dsm-weight p-t disc "
        "disc-start disc-weight disc-lr dataset data-dir class-cond flip net dropout workers "
        "out-dir cache-dir overwrite total-steps batch-size micro-batch lr ema-decay seed "
        "log-every sample-every eval-every save-every gradient-checkpointing ckpt sample eval "
        "inception sigmas labels save device precision compile steps gamma heun edit "
        "image mask factor noise-level noisy dropout-size".split())
    assert max(map(len, shown.splitlines())) <= 100
