"""One run a folder, checkpoints that know what they are, and none of what has diverged."""
import copy
import json
import math
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

import common
import guided_distill
from test_common import RUN, settings
from test_scripts import BAD_LOSS, assert_same, records
from util import (ROOT, SMALL, TINY, assert_mistake, fill, last, run_script, start_script)

RUN_FLAGS = [*SMALL, *"--batch-size 4 --micro-batch 4 --total-steps 4 --log-every 1 --save-every 1 "
             "--sample-every 0 --workers 0 --out-dir run".split()]
TEACHER = ["--stage", "teacher"]
IDEAL = ["--teacher", "ideal", "--dataset", "images.npz", "--N", 4, "--dist", "l2"]


@pytest.fixture
def images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", pixels, np.arange(8) % 2)
    return pixels


# ---- two runs in one folder

FOREVER = [*RUN_FLAGS, "--total-steps", 100_000]


def start(folder, *flags, script="ct.py"):
    """A run that has saved a step, and stands still for now."""
    process = start_script([str(ROOT / script), *map(str, (*FOREVER, *flags))], folder)
    deadline = time.time() + 120
    while time.time() < deadline and not (folder / "run" / "last.pt").exists():
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGSTOP)
    return process


def end(process):
    process.kill()
    process.join()


def test_a_second_run_is_refused(tmp_path):
    """Of any script and number of processes, before anything is read or deleted."""
    process = start(tmp_path)
    try:
        for flags, script, ranks in ((FOREVER, "ct.py", 0), ([*FOREVER, "--overwrite"], "ct.py", 0),
                                     ([*RUN_FLAGS, "--teacher-steps", 2], "cd.py", 0),
                                     (FOREVER, "ct.py", 2)):
            done = run_script(*flags, script=script, cwd=tmp_path, ranks=ranks, timeout=100)
            assert done.returncode == 2, done.stderr
            line, = done.stderr.strip().splitlines()
            assert f"{script}: error: --out-dir run is in use by another run (process " in line
            assert process.is_alive() and str(process.pid) in line and os.uname().nodename in line
        assert (tmp_path / "run" / "last.pt").exists() and not (tmp_path / "run/teacher").exists()
    finally:
        end(process)
    run_script(*RUN_FLAGS, "--overwrite", cwd=tmp_path, code=0)  # the lock went with the process


def test_workers_that_outlive_a_run_do_not_keep_its_lock(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / f"{i}.png")
    process = start(tmp_path, "--dataset", "images", "--workers", 1)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        workers = [int(word) for word in file.read().split()]
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    end(process)
    try:
        assert workers and all(os.path.exists(f"/proc/{worker}/fd") for worker in workers)
        common.lock_folder(tmp_path / "run", RUN)  # that no one has now
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)


def lock_and_wait(folder, pipe):
    common.lock_folder(folder, RUN)
    pipe.send("locked")
    time.sleep(600)


def test_only_the_first_process_deletes_what_was_left_half_written(tmp_path):
    left = [".last.pt.0123abcd.tmp", ".N0004.pt.0123abcd.tmp", ".log.jsonl.0123abcd.tmp",
            ".last.pt.tmp", "samples/.000500.png.0123abcd.tmp"]
    others = [".mine.tmp", "last.pt", "samples/000500.png"]
    (tmp_path / "samples").mkdir()
    for name in left + others:
        (tmp_path / name).write_bytes(b"x")
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=lock_and_wait,
                                                          args=(tmp_path, theirs))
    process.start()
    try:
        assert ours.recv() == "locked"
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert {str(path.relative_to(tmp_path)) for path in files} == {".lock", *others}
        (tmp_path / left[0]).write_bytes(b"x")  # the other's, who is writing it
        with pytest.raises(common.UserError, match=f"process {process.pid} on"):
            common.lock_folder(tmp_path, RUN)
        assert (tmp_path / left[0]).exists()
    finally:
        end(process)


def test_no_locks_are_said(tmp_path, monkeypatch, capsys):
    """A file system without them is used all the same."""
    def fail(file, how):
        raise OSError(37, "No locks available")
    monkeypatch.setattr("fcntl.lockf", fail)
    (tmp_path / ".last.pt.0123abcd.tmp").write_bytes(b"")
    for _ in range(2):
        common.lock_folder(tmp_path, RUN)
    assert (tmp_path / ".last.pt.0123abcd.tmp").exists()  # another may be at it
    line, = capsys.readouterr().out.splitlines()
    assert "cannot be locked" in line and "No locks available" in line


def test_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "x"
    with common.atomic_file(path) as a, common.atomic_file(path) as b:
        a.write(b"a" * 9)
        b.write(b"b")
    assert path.read_bytes() == b"a" * 9 and list(tmp_path.iterdir()) == [path]


# ---- ema.pt

def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("net, classes", [
    (dict(image_size=24), 2), (dict(base=64), 2), (dict(base=64, head_channels=64), 2)])
def test_ema_pt_knows_what_it_is(tmp_path, images, net, classes):
    """A null label is none to draw; size, heads and width, which shapes do not tell, are right."""
    words = [f"{key}={value}" for key, value in net.items()]
    big = np.random.default_rng(0).integers(0, 256, (8, 24, 24, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", big, np.arange(8) % 2)
    flags = ["--net", "glyphs", *"mult=1,1 blocks=1".split(), *words]
    run_script(*RUN_FLAGS, *TEACHER, *flags, "--dataset", "images.npz", "--label-dropout", 0.5,
               script="cd.py", cwd=tmp_path, code=0)
    nets = []
    for name in ("last.pt", "ema.pt"):
        net, state = common.load_network(tmp_path / "run" / name, ("cd",))
        assert (state["script"], state["step"], state["args"]["stage"]) == ("cd", 4, "teacher")
        assert "data" in state and net.classes == net.null_y == 2
        nets.append(net)
    assert_same(nets[0].state_dict(), nets[1].state_dict())
    drawn = []
    for name in ("last.pt", "ema.pt"):
        done = run_script("--ckpt", f"run/{name}", "--sample", 3, "--N", 2, "--w", 1, "--save",
                          "x.npz", script="cd.py", cwd=tmp_path, code=0)
        assert "taken for" not in done.stdout
        drawn.append(np.load(tmp_path / "x.npz"))
    assert np.array_equal(drawn[0]["arr_0"], drawn[1]["arr_0"])
    assert drawn[1]["arr_1"].tolist() == [0, 1, 0]


def test_ema_pt_is_a_plain_state_dict_to_others(tmp_path):
    run_script(*RUN_FLAGS, cwd=tmp_path, code=0)
    state = load(tmp_path / "run" / "ema.pt")
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert list(state) == list(last(tmp_path / "run")["ema"])
    net = common.UNet(**last(tmp_path / "run")["model_args"])
    assert not any(net.load_state_dict(state, strict=True))
    net.load_state_dict(state, strict=True, assign=True)
    plain = load(tmp_path / "run" / "last.pt")["ema"]
    assert common.ABOUT not in plain._metadata


def test_what_a_student_of_a_round_knows(tmp_path, images):
    flags = "--total-steps 4 --start-N 4 --w-max 0 --round-steps 2 --last-steps 2".split()
    run_script(*RUN_FLAGS, *flags, "--teacher-steps", 2, script="guided_distill.py", cwd=tmp_path,
               code=0)
    for name, step, N in (("N0002.pt", 2, 2), ("N0001.pt", 4, 1), ("ema.pt", 4, 1)):
        _, state = common.load_network(tmp_path / "run" / name, ("guided_distill",))
        assert (state["step"], state["N"]) == (step, N) and "data" in state
        run_script("--ckpt", f"run/{name}", "--sample", 2, script="guided_distill.py", cwd=tmp_path,
                   code=0)


# ---- weights of others

WEIGHTS = fill(common.UNet(**TINY, classes=10)).state_dict()
OTHER = fill(common.UNet(**TINY, classes=10), offset=5).state_dict()


def named(prefix):
    return {prefix + name: value for name, value in WEIGHTS.items()}


FORMS = {
    "as they are": (WEIGHTS, ""),
    "ddp": (named("module."), "without 'module.'"),
    "compiled": (named("_orig_mod."), "without '_orig_mod.'"),
    "compiled in ddp": (named("module._orig_mod."), "without '_orig_mod.'"),
    "ddp in compiled": (named("_orig_mod.module."), "without 'module.'"),
    "state_dict": (dict(state_dict=WEIGHTS, epoch=3), "its 'state_dict'"),
    "model": (dict(model=WEIGHTS, optimizer=dict(state={})), "its 'model'"),
    "ema": (dict(model=OTHER, ema=WEIGHTS, step=torch.tensor(3)), "its 'ema'"),
    "params_ema": (dict(params=OTHER, params_ema=WEIGHTS), "its 'params_ema'"),
    "all": (dict(model=OTHER, ema=named("module."), state_dict=OTHER), "its 'ema', without 'mod"),
    "an empty average": (dict(ema={}, model=WEIGHTS), "its 'model'"),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_others_wrap_around_weights_is_taken_off_and_said(tmp_path, monkeypatch, capsys, form):
    monkeypatch.setitem(common.NETS, "imagenet64", TINY)
    state, said = FORMS[form]
    torch.save(state, tmp_path / "x.pt")
    net, _ = common.load_network(tmp_path / "x.pt", ("cd",))
    assert_same(net.state_dict(), WEIGHTS)
    line, = capsys.readouterr().out.splitlines()
    assert said in line and line.endswith(
        "16 pixels, heads of 32, 10 classes, none of them a null label")
    assert line.startswith(f"{tmp_path / 'x.pt'} does not say what it is, and is taken for imagen")
    monkeypatch.setenv("RANK", "1")
    common.load_network(tmp_path / "x.pt", ("cd",))
    assert not capsys.readouterr().out


def test_what_a_teacher_is_taken_for_is_said(tmp_path, images):
    net = fill(common.UNet(**TINY))
    torch.save(net.state_dict(), tmp_path / "teacher.pt")
    prelude = f"common.NETS.update(imagenet64={TINY})"
    flags = RUN_FLAGS[len(SMALL):] + ["--device", "cpu", "--teacher", "teacher.pt", *IDEAL[2:]]
    done = run_script(*flags, script="cd.py", cwd=tmp_path, prelude=prelude, code=0)
    assert "taken for imagenet64: 16 pixels, heads of 32, no labels\n" in done.stdout
    assert "--teacher teacher.pt is taken for a teacher\n" in done.stdout


@pytest.mark.parametrize("change, message", [
    (dict(base=64), "tensors differ: time_embed.0.weight 256x64, not 128x32; time_embed.0.bias"),
    (dict(attention=()), "where 38 tensors differ: input_blocks.3.1.norm.weight absent, not 64;")])
def test_the_nearest_network_is_named(tmp_path, monkeypatch, change, message):
    monkeypatch.setitem(common.NETS, "imagenet64", TINY)
    torch.save(common.UNet(**TINY | change).state_dict(), tmp_path / "x.pt")
    with pytest.raises(common.UserError) as error:
        common.load_network(tmp_path / "x.pt", ("cd",))
    text = str(error.value)
    assert "nearest is imagenet64, where " in text and "\n" not in text and len(text) < 600
    assert message in text, text


def test_weights_that_fit_two_networks_are_refused(tmp_path):
    """As many channels, other pixels: which, only last.pt says."""
    torch.save(common.UNet(**common.NETS["mnist"], classes=10).state_dict(), tmp_path / "x.pt")
    with pytest.raises(common.UserError, match="x.pt: these weights fit glyphs and mnist alike"):
        common.load_network(tmp_path / "x.pt", ("cd",))


def test_weights_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(common.NETS, "imagenet64", TINY)
    for bad in (math.nan, math.inf):
        state = copy.deepcopy(WEIGHTS)
        state["out.2.bias"][1] = bad
        whole = dict(script="cd", args={}, model_args=TINY | dict(classes=10), ema=state)
        for weights in (state, whole):
            torch.save(weights, tmp_path / "x.pt")
            with pytest.raises(common.UserError, match=r"are not finite \(out.2.bias\)"):
                common.load_network(tmp_path / "x.pt", ("cd",))


def test_a_flipped_bit_is_noticed(tmp_path):
    """torch.load would take another weight without a word."""
    torch.save(WEIGHTS, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[data.index(WEIGHTS["out.2.weight"].numpy().tobytes()) + 40] ^= 4
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(common.UserError, match="x.pt is no checkpoint, or is damaged: the check"):
        common.load_checkpoint(tmp_path / "x.pt")


# ---- divergence

@pytest.mark.parametrize("script, flags", [
    ("ct.py", []), ("cd.py", [*TEACHER, "--sample-every", 1]), ("cd.py", IDEAL),
    ("ctm.py", [*IDEAL, "--max-steps", 2, "--disc", "conv", "--disc-start", 2]),
    ("guided_distill.py", [*IDEAL[:4], *"--stage1-steps 2 --start-N 2 --w-max 0".split(),
                           "--last-steps", 2])])
def test_what_diverges_keeps_the_last_good_step(tmp_path, images, script, flags):
    """The loss overflows at once, or a step later; ct.py in two processes."""
    ranks = 2 if script == "ct.py" else 0
    done = run_script(*RUN_FLAGS, *flags, "--batch-size", 8, "--lr", 1e18, script=script,
                      cwd=tmp_path, ranks=ranks)
    assert done.returncode == 1, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr and f"{script}: ended while the loss or the" in line
    skipped = [record["skipped"] for record in records(tmp_path / "run")]
    good = skipped.count(0) - 1  # the weights of the last good step have no finite loss
    left = sorted(path.name for path in (tmp_path / "run").glob("*.pt"))
    if good == 0:
        assert left == [] and "run holds no checkpoint" in line
    else:
        assert left == ["ema.pt", "last.pt"] and f"run holds step {good};" in line
        assert last(tmp_path / "run")["step"] == good
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_the_last_step_is_checked_too(tmp_path):
    """Its loss was finite: that of the weights it made is not."""
    done = run_script(*RUN_FLAGS, "--total-steps", 1, "--lr", 1e30, cwd=tmp_path, code=1)
    assert [r["skipped"] for r in records(tmp_path / "run")] == [0]
    assert "holds no checkpoint" in done.stderr and not list((tmp_path / "run").glob("*.pt"))


def test_a_run_that_ends_in_a_bad_step(tmp_path):
    """Exit code 1; what had a finite loss is kept, from which it goes on as ever."""
    bad = BAD_LOSS.replace("BAD", "{5}")  # a trial, then a micro-batch a step
    done = run_script(*RUN_FLAGS, "--sample-every", 1, cwd=tmp_path, prelude=bad, code=1)
    assert "run holds step 2; start anew with a lower --lr" in done.stderr
    assert "step 4 is left out, its loss or gradient is not finite" in done.stdout + done.stderr
    grids = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert grids == ["000001.png", "000002.png", "000003.png"]
    run_script(*RUN_FLAGS, "--sample-every", 1, cwd=tmp_path, code=0)
    run_script(*RUN_FLAGS, "--out-dir", "whole", cwd=tmp_path, code=0)
    assert_same(last(tmp_path / "run"), last(tmp_path / "whole"))


def test_a_signal_in_a_bad_step_waits_for_a_good_one(tmp_path):
    """The weights are good: they are those of the step before."""
    bad = BAD_LOSS.replace("BAD", "{3}")  # step 2
    stop = """
import os, signal
log_step = common.Log.step
def step_and_signal(self, step, *a, **k):
    if step == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return log_step(self, step, *a, **k)
common.Log.step = step_and_signal
"""
    done = run_script(*RUN_FLAGS, "--save-every", 0, cwd=tmp_path, prelude=bad + stop, code=143)
    assert "step 2 is left out" in done.stdout + done.stderr
    assert last(tmp_path / "run")["step"] == 3 and last(tmp_path / "run")["skipped"] == 1


def test_a_grid_that_fails_does_not_take_the_checkpoint_with_it(tmp_path):
    (tmp_path / "run/samples/000002.png/x").mkdir(parents=True)
    done = run_script(*RUN_FLAGS, "--save-every", 2, "--sample-every", 2, cwd=tmp_path, code=2)
    assert "000002.png" in done.stderr and last(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_weight_that_no_loss_sees_is_not_saved(tmp_path, ranks):
    """That of a label that does not occur, say."""
    prelude = """
update = common.ema_update
def spoiled(average, net, decay):
    update(average, net, decay)
    net.label_emb.weight.data[-1] = float("inf")
common.ema_update = spoiled
"""
    np.savez(tmp_path / "x.npz", np.zeros((4, 16, 16, 3), np.uint8), [0, 0, 0, 0])
    flags = [*RUN_FLAGS, "--net", "glyphs"]
    labels = "labels = common.Images.__init__\ndef more(self, *a):\n    labels(self, *a)\n" \
             "    self.classes = 2\ncommon.Images.__init__ = more\n"
    done = run_script(*flags, "--dataset", "x.npz", cwd=tmp_path, prelude=labels + prelude, code=1,
                      ranks=ranks)
    assert "Traceback" not in done.stderr
    assert "step 4 is not saved: its weights are not finite (label_emb.weight)" in (
        done.stdout + done.stderr)
    assert not list((tmp_path / "run").glob("*.pt"))


def test_pictures_that_are_not_finite_are_not_drawn(tmp_path):
    run_script(*RUN_FLAGS, cwd=tmp_path, code=0)
    state = last(tmp_path / "run")
    # before a normalisation: on any processor its inf becomes nan, which no clipping hides
    state["ema"]["input_blocks.0.0.weight"].fill_(3e38)
    torch.save(state, tmp_path / "huge.pt")
    assert_mistake(["--ckpt", "huge.pt", "--device", "cpu", "--precision", "fp32"],
                   "the network draws what is not finite", "ct.py", tmp_path)


@pytest.mark.parametrize("bad, where", [(math.nan, "latents"), (math.inf, "embeddings"),
                                        (math.nan, "null")])
def test_a_latent_that_is_not_finite_is_named(tmp_path, bad, where):
    arrays = dict(latents=np.zeros((5, 4, 8, 8), np.float16), embeddings=np.zeros((5, 3, 6)),
                  null=np.zeros((3, 6)))
    arrays[where][2 if where != "null" else 0, 1] = bad
    np.savez(tmp_path / "x.npz", **arrays)
    sample = "sample 2, counted from 0" if where != "null" else "null"
    with pytest.raises(common.UserError, match=f"--dataset .*x.npz: {sample}.* holds inf or nan"):
        guided_distill.Latents(tmp_path / "x.npz").__getitems__(np.array([4, 2, 1]))


# ---- more steps

MORE = {
    "teacher": ("cd.py", TEACHER),
    "cd": ("cd.py", IDEAL),
    "ctm": ("ctm.py", [*IDEAL, "--max-steps", 2]),
    "one stage": ("ct.py", "--recipe ect --teacher none --stages 1 --q 2".split()),
    "continuous": ("ct.py", "--objective continuous --teacher none".split()),
}


@pytest.mark.parametrize("case", MORE)
def test_a_finished_run_goes_on(tmp_path, images, case):
    """To what it would have been from the start."""
    script, flags = MORE[case]
    flags = [*RUN_FLAGS, *flags]
    run_script(*flags, "--total-steps", 2, script=script, cwd=tmp_path, code=0)
    done = run_script(*flags, script=script, cwd=tmp_path, code=0)
    assert "note: --total-steps 4, and 2 until now: 2 more steps\n" in done.stdout
    run_script(*flags, "--out-dir", "whole", script=script, cwd=tmp_path, code=0)
    assert_same(last(tmp_path / "run"), last(tmp_path / "whole"))
    assert last(tmp_path / "run")["args"]["total_steps"] == 4
    assert_mistake([*flags, "--total-steps", 3], "the run in --out-dir run is at step 4; name more",
                   script, tmp_path)


ROUNDS = [*IDEAL[:4], *"--stage1-steps 2 --start-N 2 --w-max 0 --last-steps".split()]
SPANNED = {
    "ict": ("ct.py", [], []),
    "ect": ("ct.py", "--recipe ect --teacher none --stages 2 --q 2".split(), []),
    "rounds": ("guided_distill.py", [*ROUNDS, 2], [*ROUNDS, 4]),
}


@pytest.mark.parametrize("case", SPANNED)
def test_a_run_that_a_schedule_spans_does_not_go_on(tmp_path, images, case):
    script, flags, longer = SPANNED[case]
    run_script(*RUN_FLAGS, *flags, script=script, cwd=tmp_path, code=0)
    message = ("--total-steps 4 there, 6 now); its schedule spans all its steps, so a longer run "
               "has to start anew; use its own, choose another, or --overwrite it")
    assert_mistake([*RUN_FLAGS, *flags, *longer, "--total-steps", 6], message, script, tmp_path)


# ---- log.jsonl

def test_lines_that_are_no_records_are_dropped_and_said(tmp_path, capsys):
    lines = [b'{"step": 1}', b"null", b"3", b"[1]", b"text", b"\xff\xfe", b'{"step": null}', b"",
             b'{"step": "x"}', b'{"loss": 1}', b'{"step": 2}', b'{"step": NaN}', b'{"st']
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    common.start_run(settings(tmp_path), RUN, torch.nn.Linear(2, 2), 2, 0).close()
    common.ranks_differ = False
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in log] == [dict(step=1), dict(step=2)]
    assert f"note: 10 line(s) of {tmp_path / 'log.jsonl'} hold no step" in capsys.readouterr().out
