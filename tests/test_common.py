"""The machine room: totals of a step, resuming and saving, the log, seeds, grids of samples."""
import argparse
import copy
import json
import math
import signal
import sys
import types

import numpy as np
import pytest
import torch
import torch._dynamo
from PIL import Image

import common
from util import TINY, fill

RUN = types.SimpleNamespace(rank=0, world=1, main=True, restarted=False, device=torch.device("cpu"),
                            dtype=torch.float32, compile=False, checkpointing=False, data=None)
STOP = types.SimpleNamespace(number=0)


def settings(folder, **changes):
    return argparse.Namespace(**dict(
        out_dir=str(folder), overwrite=False, total_steps=20, batch_size=8,
        micro_batch=4, log_every=1, eval_every=0, lr=0.1, seed=3, p_t=[-1.1, 2.0],
        dist="l2") | changes)


def rank(r, world):
    return types.SimpleNamespace(**vars(RUN) | dict(rank=r, world=world, main=r == 0))


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---- what the ranks sum

def fill_totals(totals, t, losses, share=1.0):
    totals.add(share, loss=losses.sum(), kl=2 * losses.sum())
    totals.bin(t, losses)


def test_totals_of_a_step():
    """Numbers by their names, shares of them, losses between 0.1, 1 and 10; zero() forgets."""
    totals = common.Totals(RUN, "loss", "kl")
    t, losses = torch.tensor([0.05, 0.5, 0.7, 20.0]), torch.tensor([1.0, 2.0, 4.0, 8.0])
    for _ in range(2):
        totals.zero()
        fill_totals(totals, t, losses.requires_grad_(), 0.25)
        totals.add(0.5, kl=torch.tensor(10.0))
        assert common.sum_over_ranks(RUN, STOP, torch.zeros(3), totals) is False
        assert (totals["loss"], totals["kl"]) == (15 / 4, 15 / 2 + 5)
        bins = totals.loss_bins()
        assert bins[:2] == [1.0, 3.0] and math.isnan(bins[2]) and bins[3] == 8.0


@pytest.mark.parametrize("stopped", [0, 1])
def test_ranks_sum_gradients_and_totals_and_stop_together(monkeypatch, stopped):
    ranks, sums = [], []
    for r in range(2):
        gradients, totals = torch.full((3,), 1.0 + r), common.Totals(RUN, "loss", "kl")
        fill_totals(totals, torch.tensor([0.5, 5.0]), torch.tensor([1.0, 2.0]) + r)
        ranks.append((gradients, totals))
        sums.append([gradients.clone(), totals.buffer.clone()])
    sums[1][1][-1] = float(stopped)  # the other rank got a signal
    calls = iter(sums[1])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(next(calls)))
    gradients, totals = ranks[0]
    assert common.sum_over_ranks(rank(0, 2), STOP, gradients, totals) == bool(stopped)
    assert gradients.tolist() == [3.0] * 3 and next(calls, None) is None
    assert (totals["loss"], totals["kl"]) == (3 + 5, 2 * (3 + 5))
    assert np.isnan(totals.loss_bins()[0]) and totals.loss_bins()[1:3] == [1.5, 2.5]


def test_a_signal_stops_after_the_step_and_a_second_one_at_once():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        stop, totals = common.StopSignal(), common.Totals(RUN, "loss")
        assert not common.sum_over_ranks(RUN, stop, torch.zeros(1), totals)
        signal.raise_signal(signal.SIGTERM)
        assert common.sum_over_ranks(RUN, stop, torch.zeros(1), totals) is True
        for given, code in ((None, 0), (stop, 128 + signal.SIGTERM)):
            with pytest.raises(SystemExit) as end:
                common.finish(RUN, given)
            assert end.value.code == code
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_micro_batches_are_shared_out_in_turn():
    args = settings("x", batch_size=10, micro_batch=2)
    assert [list(common.micro_batches(args, rank(r, 2))) for r in range(2)] == [[0, 2, 4], [1, 3]]
    assert [step for step in range(7) if common.due(3, step)] == [0, 3, 6]
    assert [step for step in range(7) if common.due(3, step, step == 5)] == [0, 3, 5, 6]
    assert not any(common.due(0, step, last) for step in range(7) for last in (False, True))


# ---- resuming and saving

def new_parts(seed):
    torch.manual_seed(seed)
    net = common.UNet(**TINY, cond=True)
    ema, target = copy.deepcopy(net), fill(copy.deepcopy(net), seed)
    optimizer = torch.optim.RAdam(net.parameters(), 0.1)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return dict(net=net, ema=ema, optimizer=optimizer, target=target, critic=None)


MODEL_ARGS = TINY | dict(cond=True, classes=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    parts = new_parts(0)
    log = types.SimpleNamespace(skipped=2, sound=True, written=None)
    common.save_run(settings(folder), RUN, "ct", 7, log, MODEL_ARGS, parts, round=3)
    common.save_run(settings(folder / "none"), rank(1, 2), "ct", 7, log, MODEL_ARGS, parts)
    return folder, parts


def test_what_a_checkpoint_holds(saved):
    folder, parts = saved
    state = common.load_checkpoint(folder / "last.pt")
    assert {key: state[key] for key in ("script", "step", "images", "skipped", "round")} == dict(
        script="ct", step=7, images=56, skipped=2, round=3)
    assert state["args"] == vars(settings(folder)) and state["model_args"] == MODEL_ARGS
    ema = torch.load(folder / "ema.pt", weights_only=True)
    assert all(torch.equal(ema[name], p) for name, p in parts["ema"].state_dict().items())
    assert sorted(path.name for path in folder.iterdir()) == ["ema.pt", "last.pt"]  # rank 0's


@pytest.mark.parametrize("old", [False, True])
def test_resume_loads_every_part(saved, tmp_path, old):
    """Of a checkpoint from before too, in which p_t was called times, and cond extra."""
    folder, parts = saved
    state = torch.load(folder / "last.pt", weights_only=True)
    if old:
        state["args"]["times"] = state["args"].pop("p_t")
        state["model_args"]["extra"] = state["model_args"].pop("cond")
        state["args"]["mu"] = 0.9  # and settings were kept that do not apply
    torch.save(state, tmp_path / "last.pt")
    again = new_parts(1)
    args = settings(tmp_path, log_every=9, teacher="elsewhere")  # what may change
    assert common.resume(args, RUN, "ct", MODEL_ARGS, again) == (7, 2)
    for key in ("net", "ema", "target"):
        for name, value in parts[key].state_dict().items():
            assert torch.equal(again[key].state_dict()[name], value), (key, name)
    for p, q in zip(parts["net"].parameters(), again["net"].parameters()):
        moments, loaded = parts["optimizer"].state[p], again["optimizer"].state[q]
        assert all(torch.equal(moments[key], loaded[key]) for key in moments)
        assert loaded["exp_avg"].stride() == q.stride()
    net, trained = common.load_network(tmp_path / "last.pt", ("ct",))
    assert net.cond and trained["args"]["p_t"] == [-1.1, 2.0]


@pytest.mark.parametrize("script, changes, model, message", [
    ("cd", {}, {}, "holds a run of ct.py; choose another, or --overwrite it"),
    ("ct", dict(lr=0.5), {}, "other settings (--lr 0.1 there, 0.5 now)"),
    ("ct", dict(p_t=["uniform"]), {}, "(--p-t -1.1,2.0 there, uniform now)"),
    ("ct", dict(mu=0.9), {}, "(--mu none there, 0.9 now)"),
    ("ct", dict(teacher_digest="abc"), {}, "(--teacher-digest none there, abc now)"),
    ("ct", dict(teacher="ideal"), {}, "(--teacher none there, ideal now)"),
    ("ct", dict(precision="tf32"), {}, "(--precision none there, tf32 now)"),
    ("ct", dict(dropout_size=8), {}, "(--dropout-size 0 there, 8 now)"),
    ("ct", {}, dict(dropout_size=8), "(dropout_size 0 there, 8 now)"),
    ("cd", dict(lr_ramp=50), {}, "holds a run of ct.py"),
    ("ct", dict(lr_ramp=50), {}, "(--lr-ramp 0 there, 50 now)"),
    ("ct", {}, dict(blocks=2), "(blocks 1 there, 2 now)")])
def test_another_run_is_not_resumed(saved, script, changes, model, message):
    folder, _ = saved
    args, parts = settings(folder, **changes), dict(net=None)
    with pytest.raises(common.UserError) as error:
        common.resume(args, RUN, script, MODEL_ARGS | model, parts)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert (folder / "last.pt").exists()


def test_a_run_without_younger_settings_is_resumed(saved):
    """Where these are what it did: all blocks drop out, and the learning rate begins as it is."""
    folder, parts = saved
    args = settings(folder, dropout_size=0, lr_ramp=0)
    found = common.resume(args, RUN, "ct", MODEL_ARGS | dict(dropout_size=0), parts)
    assert found == (7, 2)


def test_no_run_half_a_run_and_overwrite(saved, tmp_path):
    folder, parts = saved
    assert common.resume(settings(tmp_path), RUN, "ct", MODEL_ARGS, parts) == (0, 0)
    (tmp_path / "ema.pt").write_bytes(b"")
    with pytest.raises(common.UserError, match="holds an ema.pt without last.pt"):
        common.resume(settings(tmp_path), RUN, "ct", MODEL_ARGS, parts)
    for path in ("last.pt", "samples/1.png", "samples/mine.txt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((folder / "last.pt").read_bytes())
    args = settings(tmp_path, overwrite=True)
    restarted = types.SimpleNamespace(**vars(RUN) | dict(restarted=True))
    state = common.load_checkpoint(tmp_path / "last.pt")  # a restarted run has obeyed already
    assert state["step"] == 7
    with pytest.raises(common.UserError, match="--overwrite it"):
        common.resume(args, restarted, "cd", MODEL_ARGS, parts)
    assert common.resume(args, RUN, "cd", MODEL_ARGS, parts) == (0, 0)
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == [".lock", "mine.txt"]


@pytest.mark.parametrize("batch_size, limit, world, wanted", [
    (12, 8, 1, 6), (7, 8, 1, 7), (32, 32, 1, 32),
    (512, 128, 8, 64), (256, 128, 8, 32), (128, 128, 8, 16), (2048, 64, 8, 64),  # all have work
    (96, 64, 8, 12), (100, 64, 8, 5), (512, 128, 3, 64), (536, 64, 8, 4), (4, 128, 8, 1)])
def test_default_micro_batch(tmp_path, batch_size, limit, world, wanted):
    """At most the recipe's and batch / world; of the larger ones, what is best for the busiest."""
    args = settings(tmp_path, batch_size=batch_size, micro_batch=None, micro_batch_limit=limit)
    found = common.default_micro_batch(args, rank(0, world), "ct", dict(net=None))
    assert found == wanted and batch_size % found == 0


# What was counted operation by operation, by others, GB at a micro-batch: compiled, eager.
COUNTED = {
    ("ct", "imagenet64", 64): (20, 32), ("ct lpips", "imagenet64", 64): (31, 43),
    ("ct", "cifar10", 128): (8, 15), ("ct lpips", "cifar10", 128): (31, 38),
    ("ct", "lsun256", 8): (28, 44), ("cd lpips", "lsun256", 8): (32, 49),
    ("ctm lpips", "imagenet64", 64): (51, None), ("ctm lpips", "cifar10", 128): (36, None),
    ("ctm lpips projected", "imagenet64", 64): (67, None),  # with the DSM graph alive: eager more
    ("ctm lpips projected", "cifar10", 128): (68, None)}


@pytest.mark.parametrize("what, name, micro_batch", COUNTED)
def test_memory_is_as_counted(what, name, micro_batch):
    """To 16%: weights, gradient and average; a target and a teacher, where there is LPIPS."""
    script, *more = what.split()
    args = argparse.Namespace(dist="lpips" if "lpips" in more else "l2",
                              disc="projected" if "projected" in more else "none")
    with torch.device("meta"):
        net = common.UNet(**common.NETS[name], cond=script == "ctm")
    size = sum(p.numel() for p in net.parameters())
    copies = {"ct": 3, "ct lpips": 4, "cd lpips": 5}.get(what, 5)  # ctm: target and teacher too
    for compiled, counted in zip((True, False), COUNTED[what, name, micro_batch]):
        run = types.SimpleNamespace(compile=compiled, checkpointing=False, dtype=torch.bfloat16)
        total = size * (4 * copies + common.bytes_a_weight(args, script))
        total += micro_batch * common.bytes_an_image(args, run, script, net)
        assert counted is None or abs(total / 1e9 / counted - 1) < 0.16, (total, counted)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_full_gradient_takes_more_memory(compiled):
    """Two passes in float32, whatever the precision: 279 MB an image of cifar10's net where one in
    bf16 takes 103, as counted on fake CUDA tensors."""
    with torch.device("meta"):
        net = common.UNet(**common.NETS["imagenet64"])
    one = 0.18e9 if compiled else 0.36e9
    for dtype in (torch.bfloat16, torch.float32):
        run = types.SimpleNamespace(compile=compiled, checkpointing=False, dtype=dtype)
        for stop_gradient, wanted in ((False, one * 279 / 103), (True, one * dtype.itemsize / 2)):
            args = argparse.Namespace(stop_gradient=stop_gradient)
            assert abs(common.bytes_an_image(args, run, "cd", net) / wanted - 1) < 0.02


def test_masks_take_memory_where_they_are_drawn():
    """A byte a unit of imagenet64's net: 3 or 4 blocks a level, and those that resample."""
    args, run = argparse.Namespace(), types.SimpleNamespace(
        compile=False, checkpointing=False, dtype=torch.float32)
    total = {}
    for dropout, size in ((0, 0), (0.2, 0), (0.2, 16)):
        with torch.device("meta"):
            net = common.UNet(**common.NETS["imagenet64"], dropout=dropout, dropout_size=size)
        total[dropout, size] = common.bytes_an_image(args, run, "ct", net)
    all_units = sum(math.prod(shape) for shape in net.block_shapes)
    # 16 pixels: down from 32, 3 and 4 blocks of 3 * 192; 8: down, 3, 2, 4, and up to 16
    small = 192 * (16**2 * (2 + 3 * 3 + 3 * 4 + 4) + 8**2 * (3 + 4 * 3 + 4 * 2 + 4 * 4))
    assert total[0.2, 0] - total[0, 0] == all_units
    assert total[0.2, 16] - total[0, 0] == small


@pytest.mark.parametrize("free, dtype, compiled, wanted", [
    (80e9, torch.bfloat16, True, 64), (24e9, torch.bfloat16, True, 64),
    (24e9, torch.bfloat16, False, 32), (24e9, torch.float32, False, 16),
    (8e9, torch.bfloat16, True, 16), (3e9, torch.bfloat16, True, 1)])
def test_a_micro_batch_fits_into_the_memory(free, dtype, compiled, wanted, monkeypatch, capsys):
    """ImageNet-64's net on a GPU of so much free memory: 0.9 free = 296 M * 10.3 + micro * E * K,
    E = 12,423,168 and K = 14.5, or 29 eager, twice that in float32."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), 0))
    full = common.torch.tensor
    monkeypatch.setattr(common.torch, "tensor", lambda value, device=None: full(value))
    with torch.device("meta"):
        net = common.UNet(**common.NETS["imagenet64"])
    assert sum(math.prod(shape) for shape in net.block_shapes) == 12_423_168
    run = types.SimpleNamespace(**vars(RUN) | dict(
        device=torch.device("cuda"), dtype=dtype, compile=compiled))
    args = settings("x", batch_size=2048, micro_batch=None, micro_batch_limit=64)
    assert common.default_micro_batch(args, run, "ct", dict(net=net)) == wanted
    limit = (0.9 * free - 10.3 * 296e6) / (12_423_168 * (14.5 if compiled else 29))
    limit /= dtype.itemsize / 2
    assert wanted <= max(limit * 1.01, 1) and (2 * wanted > 0.99 * limit or wanted == 64)
    said = capsys.readouterr().out
    assert ("images at most fit into the GPU's free memory" in said) == (wanted < 64)


def test_a_resumed_run_keeps_its_micro_batch(saved, tmp_path, capsys):
    """On any number of processes; another is taken if it is asked for, and that is said."""
    folder, parts = saved
    args = settings(folder, micro_batch=None, micro_batch_limit=1)
    assert common.resume(args, RUN, "ct", MODEL_ARGS, parts)[0] == 7
    assert args.micro_batch == 4 and "micro_batch_limit" not in args
    assert not capsys.readouterr().out
    args = settings(folder, micro_batch=2)
    assert common.resume(args, RUN, "ct", MODEL_ARGS, parts)[0] == 7 and args.micro_batch == 2
    assert capsys.readouterr().out == ("note: --micro-batch 2, and 4 until now: what is random "
                                       "differs from here on\n")
    args = settings(tmp_path, micro_batch=None, micro_batch_limit=4)
    assert common.resume(args, RUN, "ct", MODEL_ARGS, parts) == (0, 0) and args.micro_batch == 4


def test_an_optimizers_counters_are_where_this_device_wants_them(tmp_path):
    """A checkpoint of a GPU, whose counters are tensors of it, goes on here, and the other way."""
    net = torch.nn.Linear(2, 2)
    here, there = (torch.optim.RAdam(net.parameters(), 0.1, capturable=on) for on in (False, True))
    net(torch.ones(1, 2)).sum().backward()
    here.step()
    state = here.state_dict()
    for optimizer, other in ((there, True), (here, False)):
        state["param_groups"][0]["capturable"] = not other
        common.load_optimizer(optimizer, copy.deepcopy(state))
        assert optimizer.param_groups[0]["capturable"] == other
    here.step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_counters_on_a_gpu_change_little():
    """RAdam with its counters on the device or the CPU: 20 steps, past the first rectified one."""
    ends = []
    for capturable in (False, True):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(1000, device="cuda"))
        optimizer = torch.optim.RAdam([p], 0.1, foreach=True, capturable=capturable)
        for _ in range(20):
            p.grad = torch.randn_like(p)
            optimizer.step()
        ends.append(p.detach())
    assert (ends[0] - ends[1]).norm() < 1e-2 * ends[0].norm()


# ---- the steps of a run

class Counted:
    """A data set whose images are numbers."""
    def __len__(self):
        return 10

    def __getitems__(self, indices):
        return torch.tensor(indices), torch.zeros(len(indices))


def test_a_trial_leaves_room_for_what_the_optimizer_will_hold(tmp_path, monkeypatch):
    """Two numbers a parameter, of a linear layer's 6, until it holds them."""
    taken, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *n, **more: taken.append(n[0]) or empty(*n, **more))
    list(steps_of(tmp_path, 1, dict(a=1)))
    assert taken.count(12) == 1


def test_tf32_is_switched_as_allowed(monkeypatch):
    """On a GPU, for convolutions and matrix products, one way and the other."""
    switches = []
    monkeypatch.setattr(common, "choose_device", lambda name, local: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **more: True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", switches.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    args = argparse.Namespace(device="cuda", precision="auto", compile=None, eval=None)
    for precision, tf32, dtype in (("auto", True, "bfloat16"), ("fp32", False, "float32"),
                                   ("bf16", True, "bfloat16"), ("tf32", True, "float32")):
        args.precision = precision
        run = common.setup(args)
        assert torch.backends.cudnn.allow_tf32 is tf32 and run.dtype is getattr(torch, dtype)
    assert switches == ["high", "highest", "high", "high"]


@pytest.mark.parametrize("device, young, switch, dtype, wanted", [
    ("cuda", True, "high", torch.float32, "cuda, TF32, the rest float32\n"),
    ("cuda", False, "high", torch.float32, "cuda, float32\n"),  # a V100 has none
    ("cuda", True, "highest", torch.float32, "cuda, float32\n"),
    ("cuda", True, "high", torch.bfloat16, "cuda, bfloat16, the rest TF32\n"),
    ("cuda", True, "highest", torch.bfloat16, "cuda, bfloat16\n"),
    ("cpu", True, "high", torch.float32, "cpu, float32\n"),
    ("cpu", True, "highest", torch.bfloat16, "cpu, bfloat16\n")])
def test_what_a_run_computes_in_is_said(device, young, switch, dtype, wanted, monkeypatch, tmp_path,
                                        capsys):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: switch)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: young)
    run = types.SimpleNamespace(**vars(RUN) | dict(device=torch.device(device), dtype=dtype))
    common.start_run(settings(tmp_path), run, torch.nn.Linear(2, 2), 0, 0)
    assert f"1 process(es) on {wanted}" in capsys.readouterr().out


def test_tf32_elsewhere_is_float32():
    """On a CPU that knows bf16 too."""
    args = argparse.Namespace(device="cpu", precision="tf32", compile=None)
    assert common.setup(args).dtype is torch.float32


def steps_of(folder, step, kinds, **more):
    args = settings(folder, total_steps=3, workers=0)
    run = types.SimpleNamespace(**vars(RUN) | more)
    net = torch.nn.Linear(2, 2)
    log = common.start_run(args, run, net, step, 0)
    optimizer = torch.optim.RAdam(net.parameters())
    totals = common.Totals(run, "loss")
    for k, batches, trial in common.steps(args, run, log, totals, Counted(), step, kinds,
                                           [optimizer]):
        yield k, [(m, batch[0].tolist()) for m, batch in batches], trial


def test_each_kind_of_step_is_tried_before_the_first(tmp_path, monkeypatch):
    """With one micro-batch, that takes none away from the steps that count."""
    found = list(steps_of(tmp_path, 1, dict(a=1, b=2)))
    first = [(0, [0, 1, 2, 3])]
    assert found[:2] == [(1, first, True), (2, first, True)]
    indices = common.index_batches(10, 3, 1, 3, 8, 4)
    wanted = [(k, [(m, next(indices).tolist()) for m in (0, 1)], False) for k in (1, 2)]
    assert found[2:] == wanted
    assert list(steps_of(tmp_path, 3, dict(a=3))) == []  # nothing is left to do, or to try
    assert [k for k, _, trial in steps_of(tmp_path, 1, dict(a=1, b=3)) if trial] == [1]
    monkeypatch.setattr(common, "any_rank", lambda run, flag: flag)
    of_one = list(steps_of(tmp_path, 2, dict(a=2), rank=1, world=2, main=False))
    assert [m for m, _ in of_one[1][1]] == [1]


def test_what_is_compiled_is_said(tmp_path, capsys):
    list(steps_of(tmp_path, 1, dict(generator=1, critic=2)))
    assert "tried" not in capsys.readouterr().out
    list(steps_of(tmp_path, 1, dict(generator=1, critic=2), compile=True))
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0] == "compiling each network at its first call: minutes, in all"
    for line, name in zip(lines[1:], ("generator", "critic")):
        assert line.startswith(f"tried {name}: 0 s, at most ") and line.endswith(" GB so far")


def test_trials_are_not_counted_into_the_speed(tmp_path, monkeypatch):
    clock = iter([0.0, 100.0, 102.0, 102.0])
    monkeypatch.setattr(common, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    log = common.start_run(settings(tmp_path), RUN, torch.nn.Linear(2, 2), 0, 0)
    log.restart_clock()  # at 100 seconds
    log.step(1, True, False, loss=1.0)
    log.close()
    assert records(tmp_path)[0]["images_per_s"] == 8 / 2


@pytest.mark.parametrize("flags, wanted", [
    ({}, True), (dict(precision="bf16"), True), (dict(precision="fp32"), False),
    (dict(precision="tf32"), True),
    (dict(objective="continuous"), False), (dict(objective="scm"), False),
    (dict(objective="discrete"), True),
    (dict(eval=50), False)])
def test_where_tf32_is_allowed(flags, wanted):
    args = argparse.Namespace(**dict(precision="auto", eval=None) | flags)
    assert common.allows_tf32(args) is wanted


@pytest.mark.parametrize("flags, message", [
    (dict(objective="scm"), "with --objective scm, whose derivatives are differences in fp32"),
    (dict(objective="continuous"), "with --objective continuous, whose derivatives"),
    (dict(eval=50), "with --eval 50: what is measured is drawn and seen in bf16 or fp32")])
def test_where_tf32_is_refused(flags, message):
    args = argparse.Namespace(**dict(precision="tf32", device="cpu", compile=None) | flags)
    with pytest.raises(common.UserError, match=f"--precision tf32 does not apply {message}"):
        common.setup(args)


def test_learning_rates():
    """EDM's: images before the step over 10 million, not above 1; sCM's decay; both."""
    args = argparse.Namespace(lr=1e-3, batch_size=512)
    assert [common.learning_rate(args, k) for k in (0, 1, 10**6)] == [1e-3] * 3
    args.lr_ramp = 10_000_000
    found = [common.learning_rate(args, k) for k in (0, 1, 9766, 19_531, 19_532, 10**6)]
    wanted = [0, 512e-10, 9766 * 512e-10, 19_531 * 512e-10, 1e-3, 1e-3]
    assert found == pytest.approx(wanted, rel=1e-12) and found[-1] == 1e-3
    args.lr_decay = 10_000
    found = [common.learning_rate(args, k) for k in (1, 10_000, 19_600, 40_000)]
    assert found == pytest.approx([512e-10, 5.12e-4, 1e-3 / 1.4, 5e-4], rel=1e-12)


@pytest.mark.parametrize("kind, message", [
    (torch.OutOfMemoryError, "out of memory, lower --micro-batch: CUDA is full\n"),
    (torch._dynamo.exc.TorchDynamoException,
     "torch.compile fails, --no-compile does without: Failed to find C compiler\n")])
def test_what_the_machine_lacks_is_one_line(kind, message, capsys, monkeypatch):
    monkeypatch.setattr(common, "bars", [])
    error = kind("CUDA is full\nand more")
    error.inner_exception = RuntimeError("Failed to find C compiler\nand more")
    with pytest.raises(SystemExit) as leave:
        common.one_line_errors(type(error), error, None)
    said = capsys.readouterr().err
    assert leave.value.code == 2 and message in said and said.count("\n") == 1


def test_a_new_network_is_seeded_and_begins_as_its_teacher():
    args, args_4 = settings("x"), settings("x", seed=4)
    a, b, c = (common.new_network(s, RUN, MODEL_ARGS) for s in (args, args, args_4))
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name])
    assert not torch.equal(a.input_blocks[0][0].weight, c.input_blocks[0][0].weight)
    teacher = fill(common.UNet(**TINY))
    student = common.new_network(args, RUN, MODEL_ARGS, teacher).state_dict()
    assert student.keys() > teacher.state_dict().keys()
    for name, value in student.items():
        assert torch.equal(value, teacher.state_dict().get(name, a.state_dict()[name])), name


def test_only_what_is_there_is_compiled_and_once():
    class Module(torch.nn.Module):
        def compile(self):
            compiled.append(self)
    a, b, compiled = Module(), Module(), []
    common.compile_in_place(RUN, a)
    assert not compiled
    common.compile_in_place(types.SimpleNamespace(compile=True), a, None, b, a)
    assert len(compiled) == 2 and set(compiled) == {a, b}


# ---- the log

@pytest.fixture
def log(tmp_path):
    log = common.start_run(settings(tmp_path, log_every=3), RUN, torch.nn.Linear(2, 2), 0, 0)
    yield log
    log.close()
    common.ranks_differ = False


def test_lines_of_the_log(tmp_path, log):
    """When due, and at the end; with what was passed last, and null for what is no number."""
    for step in range(1, 6):
        values = dict(loss=step / 2, bins=[1.0, math.nan], **dict(N=11) if step == 1 else {})
        log.step(step, finite=step != 2, last=step == 5, **values)
    first, second = records(tmp_path)
    assert (first["step"], first["images"], first["loss"], first["N"]) == (3, 24, 1.5, 11)
    assert (second["step"], second["images"], second["loss"], second["N"]) == (5, 40, 2.5, 11)
    assert first["bins"] == [1.0, None] and first["lr"] == 0.1 and first["skipped"] == 1
    assert first["images_per_s"] > 0 and first["peak_gb"] > 0 and log.skipped == 1
    assert log.bar.n == 5


def test_a_resumed_log_drops_what_came_after(tmp_path):
    lines = ['{"step": 1}', '{"step": 2}', '{"step": 3}', '{"st']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    log = common.start_run(settings(tmp_path), RUN, torch.nn.Linear(2, 2), 2, 5)
    log.step(3, True, False, loss=1.0)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]
    assert records(tmp_path)[-1]["skipped"] == 5 and log.bar.initial == 2
    common.append_record(tmp_path / "log.jsonl", dict(step=4))
    log.close()
    common.start_run(settings(tmp_path), RUN, torch.nn.Linear(2, 2), 0, 0).close()
    assert not records(tmp_path)  # a new run


@pytest.mark.parametrize("process", [RUN, rank(1, 2)])
def test_ten_bad_steps_in_a_row_stop_the_run(tmp_path, monkeypatch, process):
    """Of one player: those of another do not count, a good one begins anew. Alike on all ranks."""
    monkeypatch.setattr(sys, "argv", ["/x/ct.py"])
    log = common.start_run(settings(tmp_path), process, torch.nn.Linear(2, 2), 0, 0)
    for step in range(1, 10):
        log.step(step, False, False, loss=math.nan)
    log.step(10, True, False, player=1)
    log.step(11, False, False, player=1)
    log.step(12, True, False)
    for step in range(13, 22):
        log.step(step, False, False, loss=math.nan)
    with pytest.raises(SystemExit) as end:
        log.step(22, False, False, loss=math.nan, grad_norm=1.0)
    message = str(end.value.code)
    assert message.startswith("ct.py: stopped at step 22: the loss or its gradient was not finite")
    assert "--lr" in message and "\n" not in message and log.skipped == 20
    assert (tmp_path / "log.jsonl").exists() == process.main


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = common.start_run(settings(tmp_path / "x"), rank(1, 2), torch.nn.Linear(2, 2), 0, 0)
    log.step(1, True, True, loss=1.0)
    log.close()
    assert not (tmp_path / "x").exists() and not any(capsys.readouterr())


def test_more_processes_than_micro_batches_are_noted(tmp_path, capsys):
    common.start_run(settings(tmp_path), rank(0, 3), torch.nn.Linear(2, 2), 4, 0).close()
    out = capsys.readouterr().out
    assert "note: 3 processes share 2 micro-batches" in out and "resumed at step 4" in out
    assert "p_t=-1.1,2.0" in out and "overwrite=false" in out


# ---- seeds and samples

def test_seeds_of_different_uses_differ():
    def draw(*key):
        common.seed_everything(*key)
        return torch.rand(2).tolist()
    step = common.STEP
    keys = [(common.INIT, 0), (step, 0, 1, 2), (step, 0, 2, 1), (step, 1, 1, 2)]
    drawn = [draw(*key) for key in keys]
    assert len({tuple(numbers) for numbers in drawn}) == 4
    assert [draw(*key) for key in keys] == drawn
    assert len({common.INIT, common.STEP, common.SAMPLE, common.SOLVER}) == 4


def test_noise_of_an_image_is_its_own():
    whole = common.SeededNoise(torch.arange(5), 7)
    part = common.SeededNoise(torch.tensor([3, 1]), 7)
    x = torch.zeros(5, 3, 4, 4)
    first, second = whole(x), whole(x)
    assert torch.equal(part(x[:2]), first[[3, 1]]) and torch.equal(part(x[:2]), second[[3, 1]])
    assert part.indices.tolist() == [3, 1] and not torch.equal(first, second)
    assert len({tuple(image.flatten()[:3].tolist()) for image in first}) == 5
    assert not torch.equal(common.SeededNoise(torch.arange(5), 8)(x), first)
    assert abs(first.std() - 1) < 0.2
    net = torch.nn.Linear(1, 1)
    again = common.SeededNoise(torch.arange(5), 7)
    assert torch.equal(common.initial_noise(net, again, x.shape, 80.0), 80 * first)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_images_do_not_depend_on_batches_nor_ranks(monkeypatch, world):
    sizes = []

    def draw(y, noise, shape):
        sizes.append(len(noise.indices))
        assert len(y) == shape[0] == sizes[-1]
        x = noise(torch.zeros(shape)).clamp(-1, 1)
        return x / 4 + common.bcast(y / 20, x)
    n, y, shape = 8, torch.arange(8) % 5, (3, 4, 4)
    whole = common.to_uint8(draw(y, common.SeededNoise(torch.arange(n), 2), (n, *shape))).numpy()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    parts = [common.draw_many(rank(r, world), draw, n, y, shape, 2, batch=3) for r in range(world)]
    assert np.array_equal(sum(parts), whole) and sorted(sizes) == [2, 3, 3, 8]


@pytest.mark.parametrize("classes, columns", [(0, 8), (3, 3), (100, 10)])
def test_grid_of_samples(tmp_path, classes, columns):
    """8 rows, a column a class, a block for each way to draw; the same noise every time."""
    seen = []

    def draw(y, noise, shape):
        seen.append((y, noise.indices))
        return noise(torch.zeros(shape)).clamp(-1, 1)
    args = settings(tmp_path, micro_batch=64)
    log = common.start_run(args, RUN, torch.nn.Linear(2, 2), 0, 0)
    for step in (1, 2):
        common.sample_grid(args, RUN, step, log, [draw, draw], classes, (3, 16, 16), name="_x")
    log.close()
    pictures = [np.asarray(Image.open(tmp_path / "samples" / f"00000{s}_x.png")) for s in (1, 2)]
    assert np.array_equal(*pictures)
    assert pictures[0].shape == (3 * 8 * 16, 3 * (2 * 16 * columns + 4), 3)
    block = 3 * 16 * columns
    assert np.array_equal(pictures[0][:, :block], pictures[0][:, -block:])
    indices = torch.cat([part for _, part in seen])
    assert indices.tolist() == list(range(8 * columns)) * 4
    if classes:
        labels = torch.cat([y for y, _ in seen])[:8 * columns]
        assert labels.tolist() == [i % classes for i in range(8 * columns)]
    else:
        assert seen[0][0] is None


def test_labels_to_draw():
    net = types.SimpleNamespace(classes=3)
    draw = common.labels_to_draw
    assert draw(argparse.Namespace(labels=None), net, 5, "cpu").tolist() == [0, 1, 2, 0, 1]
    assert draw(argparse.Namespace(labels=[2, 0]), net, 3, "cpu").tolist() == [2, 0, 2]
    assert draw(argparse.Namespace(labels=None), types.SimpleNamespace(classes=0), 3, "cpu") is None
    with pytest.raises(common.UserError, match="--labels 3: this network has the labels 0 to 2"):
        draw(argparse.Namespace(labels=[3]), net, 3, "cpu")
    with pytest.raises(common.UserError, match="--labels 0: this network has no labels"):
        draw(argparse.Namespace(labels=[0]), types.SimpleNamespace(classes=0), 3, "cpu")


def test_checkpoints_of_others_and_halves(saved, tmp_path):
    folder, parts = saved
    halves = dict(args=None, model_args=None), dict(script="ct", args={}, model_args=TINY)
    for half, message in zip(halves, ("written by another tool", "holds no network")):
        torch.save(half, tmp_path / "half.pt")
        with pytest.raises(common.UserError, match=message):
            common.load_network(tmp_path / "half.pt", ("ct",))
    state = common.load_checkpoint(folder / "last.pt")
    del state["optimizer"]
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(common.UserError, match="last.pt cannot be resumed: 'optimizer'"):
        common.resume(settings(tmp_path), RUN, "ct", MODEL_ARGS, parts)


def test_pixels_are_rounded_and_clipped():
    levels = torch.tensor([-3.0, 0.4, 0.6, 127.4, 254.6, 300.0])
    pixels = common.to_uint8((levels / 127.5 - 1).view(1, 1, 1, 6))  # (1,C,H,W) -> (1,H,W,C)
    assert pixels.shape == (1, 1, 6, 1) and pixels.flatten().tolist() == [0, 0, 1, 127, 255, 255]
