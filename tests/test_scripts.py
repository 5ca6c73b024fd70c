"""ct.py as a user runs it: training, resuming, several processes, accidents, samples, mistakes."""
import argparse
import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image

import common
import ct
from util import (KEPT, ROOT, SMALL, assert_mistake, close, free_port, glyph_set, gradient, last,
                  run_ranks, run_script, start_script, torchrun)

RUN = [*SMALL, *"--batch-size 8 --micro-batch 4 --total-steps 6 --dropout 0.3 --flip --log-every 1 "
       "--sample-every 0 --save-every 0".split()]
MU = ["--mu0", 0.9]
CPU = ["--device", "cpu", "--precision", "fp32"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
AFTER_STEP_2 = """
import os, signal
write = common.Log.write
def write_and_act(self, record):
    write(self, record)
    if record["step"] == 2:
        ACTION
common.Log.write = write_and_act
"""
STOP = "os.kill(os.getpid(), signal.SIGTERM)"
STOP_AT_3 = AFTER_STEP_2.replace("ACTION", STOP)  # the step under way is finished


def flat(state):
    """Every tensor and number of a checkpoint, by its path."""
    if isinstance(state, dict):
        return {(key, *path): value for key, part in state.items()
                for path, value in flat(part).items()}
    if isinstance(state, (list, tuple)):
        return flat(dict(enumerate(state)))
    return {(): state}


def assert_same(a, b, tolerance=0.0, ignore=("args",)):
    a, b = ({key: value for key, value in flat(state).items() if key[0] not in ignore}
            for state in (a, b))
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            difference = (value - b[key]).abs().max().item()
            assert difference <= tolerance * max(1, value.abs().max().item()), (key, difference)
        else:
            assert value == b[key], key


def records(out_dir):
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Six steps in one process; its target is an average: all kinds of state are in play."""
    folder = tmp_path_factory.mktemp("trained")
    run_script(*RUN, *MU, "--out-dir", "whole", "--sample-every", 3, cwd=folder, code=0)
    return folder / "whole"


# ---- training and resuming

def test_a_run_leaves_what_it_promises(trained):
    state = last(trained)
    assert (state["step"], state["images"], state["skipped"]) == (6, 48, 0)
    assert state["script"] == "ct"
    ema = torch.load(trained / "ema.pt", weights_only=True)
    assert_same(ema, state["ema"])
    assert ema.keys() == state["net"].keys()
    assert [r["step"] for r in records(trained)] == [1, 2, 3, 4, 5, 6]
    fields = set("loss loss_bins grad_norm N mu images_per_s peak_gb skipped".split())
    assert fields <= records(trained)[0].keys()
    for name in ("000003.png", "000006.png"):
        picture = Image.open(trained / "samples" / name)
        assert picture.size == (3 * (2 * 160 + 4), 3 * 128)
    assert not list(trained.rglob("*.tmp"))


def test_three_and_three_steps_equal_six_bit_for_bit(trained, tmp_path):
    flags = [*RUN, *MU, "--out-dir", tmp_path / "run"]
    run_script(*flags, cwd=tmp_path, prelude=STOP_AT_3, code=128 + signal.SIGTERM)
    assert last(tmp_path / "run")["step"] == 3
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 1}\n{"step": 5, "lo')  # what a killed run may leave
    run_script(*flags, cwd=tmp_path, code=0)
    assert_same(last(tmp_path / "run"), last(trained))
    a, b = ([(r["step"], r["loss"]) for r in records(run)] for run in (tmp_path / "run", trained))
    assert a == b and [step for step, _ in a] == [1, 2, 3, 4, 5, 6]


def test_a_run_killed_between_its_two_files_mends_them(trained, tmp_path):
    """Those of the last step, after which no other would."""
    flags = [*RUN, *MU, "--save-every", 3, "--out-dir", tmp_path / "run"]
    run_script(*flags, cwd=tmp_path, process=True, code=9, prelude="""
import os, common
replace, written = os.replace, []
def replace_and_die(source, target):
    replace(source, target)
    written.extend([target] if str(target).endswith(".pt") else [])
    if len(written) == 3:
        os._exit(9)
os.replace = replace_and_die
""")
    files = "ema.pt", "last.pt"
    steps = [common.load_checkpoint(tmp_path / "run" / name)["step"] for name in files]
    assert sorted(steps) == [3, 6]
    run_script(*flags, cwd=tmp_path, code=0)
    for name in files:
        mended, whole = (torch.load(run / name, weights_only=True)
                         for run in (tmp_path / "run", trained))
        assert_same(mended, whole)


# A thread of the process group that outlives it and wants the interpreter when that is gone aborts
# the process, now and then.
NAME_THREADS = """
import atexit, os, pathlib
if "RANK" in os.environ:
    def left():  # one write, or the processes' words may mix
        tasks = pathlib.Path("/proc/self/task").glob("*/comm")  # none where there is no /proc
        os.write(1, f"left: {[task.read_text() for task in tasks]}\\n".encode())
    atexit.register(left)
"""


def test_two_processes_equal_one(trained, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NAME_THREADS)
    done = run_script(*RUN, *MU, "--out-dir", "two", cwd=tmp_path, launcher=torchrun(2),
                      env=dict(PYTHONPATH=str(tmp_path)), code=0)
    assert done.stdout.count("left: ") == 2 and "gloo" not in done.stdout, done.stdout
    assert_same(last(tmp_path / "two"), last(trained), 1e-6)
    run_script(*RUN, *MU, "--out-dir", "mixed", cwd=tmp_path, prelude=STOP_AT_3,
               code=128 + signal.SIGTERM)
    run_script(*RUN, *MU, "--out-dir", "mixed", cwd=tmp_path, ranks=2, code=0)
    assert_same(last(tmp_path / "mixed"), last(trained), 1e-6)
    a, b = (records(folder) for folder in (tmp_path / "two", trained))
    for key in ("loss", "loss_bins", "grad_norm"):  # the log speaks of the global batch
        two, one = (np.array([r[key] for r in log], float) for log in (a, b))
        np.testing.assert_allclose(two, one, rtol=1e-4)  # no image in a bin: nan


def step_by_hand(record, net, optimizer, losses, decays, rtol=2e-4):
    """Loss and norm are those logged; step, and average the nets of `decays` (net: its decay)."""
    optimizer.zero_grad()
    loss = torch.cat(losses).mean()
    loss.backward()
    norm = gradient(net).double().norm().item()
    close([record["loss"], record["grad_norm"]], [loss.item(), norm], rtol, 0)
    optimizer.step()
    with torch.no_grad():
        for average, decay in decays.items():
            for p, p_average in zip(net.parameters(), average.parameters()):
                p_average.copy_(decay * p_average + (1 - decay) * p)


def test_the_loop_by_hand(trained):
    """All six steps anew: the loss of 8 images, RAdam, target and EMA by formula (CM Alg. 3)."""
    args = argparse.Namespace(**last(trained)["args"])
    dataset = glyph_set(16)
    common.seed_everything(common.INIT, args.seed)
    net = common.UNet(**last(trained)["model_args"])
    target, ema = (copy.deepcopy(net).requires_grad_(False) for _ in range(2))
    optimizer = torch.optim.RAdam(net.parameters(), args.lr)
    indices = list(common.index_batches(len(dataset), args.seed, 0, 6, 8, 4))
    for k, record in enumerate(records(trained)):
        N = (11, 11, 21, 21, 41, 41)[k]  # doubles every 6 / (log2(40 / 10) + 1) = 2 steps
        times, losses = common.karras_times(N), []
        for m in range(2):
            common.seed_everything(common.STEP, args.seed, k, m)
            batch = dataset.__getitems__(indices[2 * k + m])
            x0, y = common.to_device(batch, torch.device("cpu"), True)
            p = common.interval_probabilities(times, args.p_t)
            n = torch.multinomial(p, 4, replacement=True)
            noise = torch.randn_like(x0)
            masks = common.dropout_masks(net, 4)
            losses.append(ct.loss_fn(net, target, x0, noise, times[n], times[n + 1], y, masks,
                                     common.pseudo_huber, lambda t_n, t_n1: 1 / (t_n1 - t_n)))
        mu = 0.9 ** (10 / N)
        close(record["mu"], mu)
        step_by_hand(record, net, optimizer, losses, {target: mu, ema: args.ema_decay}, 1e-4)
    for module, key in ((net, "net"), (target, "target"), (ema, "ema")):
        assert_same(module.state_dict(), last(trained)[key], 1e-5)
    state = last(trained)
    assert not torch.equal(state["target"]["out.2.bias"], state["ema"]["out.2.bias"])


def wrapper(folder, code=""):
    """A script that runs ct.py after this code, for torchrun."""
    path = folder / "wrapper.py"
    path.write_text(f"""
import functools, os, runpy, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import common, util
common.glyphs = functools.partial(util.glyphs, folder={KEPT.name!r})
{code}
sys.argv[0] = {str(ROOT / 'ct.py')!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    return path


def test_two_nodes(trained, tmp_path):
    nodes, port = [], free_port()
    for rank in range(2):
        start = torchrun(1, "--nnodes=2", f"--node_rank={rank}", "--master_addr=127.0.0.1",
                         port=port)
        command = [*start, wrapper(tmp_path), *map(str, RUN + MU), "--out-dir", "nodes"]
        nodes.append(subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert_same(last(tmp_path / "nodes"), last(trained), 1e-6)


def test_a_killed_worker_is_restarted_and_resumes(trained, tmp_path):
    script = wrapper(tmp_path, """
seed = common.seed_everything
def seed_or_die(*key):
    first = os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and key[0] == common.STEP and key[2] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    seed(*key)
common.seed_everything = seed_or_die""")
    command = [*torchrun(2, "--max-restarts=2"), script, *map(str, RUN + MU), "--save-every",
               "1", "--overwrite", "--out-dir", str(tmp_path / "run")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed at step 3" in done.stdout  # that of 4 had no loss yet; --overwrite came before
    assert_same(last(tmp_path / "run"), last(trained), 1e-6)


def test_kill_9_leaves_a_loadable_checkpoint(tmp_path):
    flags = [*RUN, "--total-steps", 100_000, "--save-every", 1, "--out-dir", "run"]
    steps = [0]
    for delay in (0.0, 0.2):
        process = start_script([str(ROOT / "ct.py"), *map(str, flags)], tmp_path)
        deadline = time.time() + 120
        while time.time() < deadline and process.is_alive():  # until it has saved a step
            saved = (tmp_path / "run" / "last.pt").exists()
            if saved and last(tmp_path / "run")["step"] > steps[-1]:
                break
            time.sleep(0.02)
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        steps.append(last(tmp_path / "run")["step"])
    assert steps == sorted(set(steps)), steps  # every life resumed where the one before was killed


def disk_full_message(done, path):
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"ct.py: error: cannot write {path}"), done.stderr


def test_a_file_that_cannot_grow_leaves_the_previous_checkpoint(tmp_path):
    """A limit on the size of files stands in for a disk that fills up during the second save."""
    fill_up = AFTER_STEP_2.replace("ACTION", """import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))""")
    done = run_script(*RUN, "--save-every", 1, "--out-dir", tmp_path / "run", cwd=tmp_path,
                      prelude=fill_up, ranks=1)
    disk_full_message(done, tmp_path / "run" / "ema.pt")
    assert last(tmp_path / "run")["step"] == 1 and not list((tmp_path / "run").glob("*.tmp"))


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(disk)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        filler = AFTER_STEP_2.replace("ACTION", f"""
        with open({str(disk / 'filler')!r}, "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)): pass
            except OSError: pass""")
        done = run_script(*RUN, "--save-every", 1, "--log-every", 2, "--out-dir", disk / "run",
                          cwd=tmp_path, prelude=filler)
        disk_full_message(done, disk / "run" / "ema.pt")
        assert "No space left" in done.stderr and last(disk / "run")["step"] == 1
    finally:
        subprocess.run(["umount", str(disk)])


BAD_LOSS = """
import torch
calls, huber = [], common.pseudo_huber
def sometimes_bad(x, y):
    calls.append(0)
    return huber(x, y) * (float("nan") if len(calls) in BAD else 1)
common.pseudo_huber = sometimes_bad
"""


def test_a_step_with_a_bad_loss_is_left_out(tmp_path):
    bad = BAD_LOSS.replace("BAD", "{4}")  # after the trial and step 1: step 2, first half
    run_script(*RUN, "--out-dir", "run", cwd=tmp_path, prelude=bad, code=0)
    log, state = records(tmp_path / "run"), last(tmp_path / "run")
    assert [r["skipped"] for r in log] == [0, 1, 1, 1, 1, 1] and state["skipped"] == 1
    assert all(p.isfinite().all() for p in state["net"].values())
    assert int(state["optimizer"]["state"][0]["step"]) == 5


def test_ten_bad_steps_stop_the_run(tmp_path):
    bad = BAD_LOSS.replace("len(calls) in BAD", "len(calls) > 7")
    done = run_script(*RUN, "--total-steps", 50, "--save-every", 2, "--out-dir", "run",
                      cwd=tmp_path, prelude=bad, code=1)
    line = done.stderr.splitlines()[-1]
    assert "not finite 10 steps in a row" in line and "run holds step 2; start anew" in line
    state = last(tmp_path / "run")
    assert state["step"] == 2 and all(p.isfinite().all() for p in state["net"].values())


def test_images_with_workers_and_no_labels(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(5):
        Image.effect_noise((40, 30), 80).save(tmp_path / "images" / f"{i}.png")
    more = "--total-steps 2 --recipe ct --dist l2 --sample-every 2 --workers 2".split()
    run_script("--dataset", "images", *RUN, *more, cwd=tmp_path, code=0)
    state = last(tmp_path / "out" / "ct")
    assert state["model_args"]["classes"] == 0 and state["target"] is not None


# ---- the data of a run

def save_images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((16, 16), 80).save(folder / name)


SHORT = [*RUN, "--total-steps", 1, "--dataset", "set", "--out-dir", "run"]


def test_a_run_notices_other_data(tmp_path):
    """It says what they are, and refuses a renamed, an added or a moved class and a renamed image;
    more or fewer images it notes. Runs of before, which do not know their data, go on."""
    save_images(tmp_path / "set", "cat/1.png", "cat/2.png", "dog/1.png")
    for _ in range(2):
        done = run_script(*SHORT, cwd=tmp_path, code=0)
        assert "set: 3 images of 16x16 pixels, 2 classes: cat, dog\n" in done.stdout
    state = last(tmp_path / "run")
    assert state["data"]["names"] == ["cat", "dog"] and state["data"]["n"] == 3
    data, cat, dog = (tmp_path / "set" / name for name in (".", "cat", "dog"))
    changes = [
        (lambda: dog.rename(data / "hound"), "(classes only there: dog, only now: hound)"),
        (lambda: cat.rename(data / "zebra"), "only there: cat, dog, only now: hound, zebra"),
        (lambda: save_images(data, "ant/1.png"), "classes 2 there, 3 now; classes only there: ")]
    for change, words in changes:
        change()
        assert_mistake(SHORT, words, "ct.py", tmp_path)
    shutil.rmtree(data)
    save_images(data, "cat/1.png", "cat/2.png", "dog/2.png")
    assert_mistake(SHORT, "(other labels, or names of classes or files)", "ct.py", tmp_path)
    save_images(data, "dog/1.png")
    done = run_script(*SHORT, cwd=tmp_path, code=0)
    assert "note: 3 images until now, 4 from here on" in done.stdout
    del state["data"]
    torch.save(state, tmp_path / "run" / "last.pt")
    run_script(*SHORT, cwd=tmp_path, code=0)


def test_labels_that_occur_are_drawn(tmp_path):
    """In grids and by --sample; others by name."""
    labels = np.array([0, 217, 482, 491, 0])
    np.savez(tmp_path / "set.npz", np.zeros((5, 16, 16, 3), np.uint8), labels)
    watch = """
whole = common.draw_part
def draw_part(draw, part, y, *more):
    print("drawn:", *y.tolist())
    return whole(draw, part, y, *more)
common.draw_part = draw_part
"""
    flags = ["--dataset", "set.npz", "--total-steps", 1, "--sample-every", 1]
    done = run_script(*RUN, *flags, cwd=tmp_path, prelude=watch, code=0)
    assert "set.npz: 5 images of 16x16 pixels, 492 classes, of which 4 occur: 0, 217, 482, 491" in \
        done.stdout
    drawn = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("drawn:")]
    assert sum(drawn, [])[:32] == ["0", "217", "482", "491"] * 8
    assert Image.open(tmp_path / "out/ct/samples/000001.png").width == 3 * (2 * 4 * 16 + 4)
    sample = ["--ckpt", "out/ct/last.pt", *CPU, "--sample", 6, "--save", "x.npz"]
    for more, wanted in ([], [0, 217, 482, 491, 0, 217]), (["--labels", 5], [5] * 6):
        run_script(*sample, *more, cwd=tmp_path, code=0)
        assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == wanted
    assert_mistake([*sample, "--labels", 492], "labels 0 to 491", "ct.py", tmp_path)
    run_script(*sample[:-1], "x.png", cwd=tmp_path, code=0)
    assert Image.open(tmp_path / "x.png").size == (3 * 4 * 16, 3 * 2 * 16)  # a column a label
    run_script(*RUN, *flags, "--no-class-cond", "--out-dir", "plain", cwd=tmp_path, code=0)
    run_script("--ckpt", "plain/last.pt", *CPU, "--sample", 3, "--save", "y.npz", cwd=tmp_path,
               code=0)
    assert "arr_1" not in np.load(tmp_path / "y.npz")


# ---- sampling

@pytest.fixture
def draw(trained, tmp_path):
    """Sample with the trained net, image i of label 3 or 7 in turn; returns stdout."""
    def run(*flags, **more):
        return run_script("--ckpt", trained / "last.pt", *CPU, *flags, cwd=tmp_path, code=0,
                          **more).stdout
    return run


def saved(path):
    return np.load(path)["arr_0"].astype(int)


def test_samples(draw, tmp_path):
    six, two_steps = "--sample 6 --labels 3 7".split(), ["--sigmas", 80, 0.8]
    draw(*six, *two_steps, "--save", "a/b.npz")
    data = np.load(tmp_path / "a" / "b.npz")
    images, labels = data["arr_0"], data["arr_1"]
    assert images.shape == (6, 16, 16, 3) and images.dtype == np.uint8
    assert labels.tolist() == [3, 7] * 3
    draw("--sample", 2, "--labels", 3, 7, *two_steps, "--save", "folder")
    for i in range(2):  # an image does not depend on how many are drawn beside it
        picture = Image.open(tmp_path / "folder" / f"{i:06d}.png")
        assert np.array_equal(np.asarray(picture), images[i])
    assert "EMA" in draw()
    assert Image.open(tmp_path / "samples.png").size == (3 * 160, 3 * 112)
    assert "1 network call" in draw(*six, "--save", "one.npz")
    one_step = saved(tmp_path / "one.npz")
    assert not np.array_equal(one_step, images)
    watch = """
whole = common.draw_part
def draw_part(draw, part, *more):
    print("pass of", len(part))
    return whole(draw, part, *more)
common.draw_part = draw_part
"""
    few = draw(*six, "--micro-batch", 4, "--save", "few.npz", prelude=watch)
    assert "pass of 4\npass of 2\n" in few
    assert np.abs(saved(tmp_path / "few.npz") - one_step).max() <= 1


def test_levels_beside_the_last_grid_are_noted(draw, trained):
    N = records(trained)[-1]["N"]
    below, top = common.karras_times(N)[-2:].tolist()
    assert "note: " not in draw("--sample", 1, "--sigmas", 80, below)
    between = (below * top) ** 0.5
    assert f"learned {N} noise levels" in draw("--sample", 1, "--sigmas", 80, between)


def test_samples_use_the_ema(draw, trained, tmp_path):
    state = last(trained)
    net = common.UNet(**state["model_args"])
    net.load_state_dict(state["ema"])
    net.eval()
    x_T = 80 * common.SeededNoise(torch.arange(4), 5)(torch.zeros(4, 3, 16, 16))
    with torch.no_grad():
        expected = common.consistency(net, x_T, torch.full((4,), 80.0), torch.arange(4))
    draw("--sample", 4, "--seed", 5, "--save", "x.npz")
    expected = common.to_uint8(expected.clamp(-1, 1)).numpy()
    assert np.abs(saved(tmp_path / "x.npz") - expected.astype(int)).max() <= 1


def test_plain_weights_of_a_known_network(tmp_path):
    net = common.UNet(**common.NETS["cifar-small"], classes=10)
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    run_script("--ckpt", "weights.pt", "--sample", 1, "--save", "x.png", cwd=tmp_path, code=0)
    torch.save({"a": torch.zeros(3)}, tmp_path / "weights.pt")
    done = run_script("--ckpt", "weights.pt", cwd=tmp_path, code=2)
    assert "fit none of the networks" in done.stderr


# ---- mistakes

class Code:
    def __reduce__(self):
        return os.system, ("touch ran_code",)


TINY_NET = " ".join(SMALL)
MISTAKES = {
    "misspelt flag": ("--datset glyphs", "did you mean --dataset?"),
    "training with --ckpt": ("--ckpt run/last.pt --lr 1", "--lr does not apply with --ckpt"),
    "data-dir with a path": ("--dataset run --data-dir run", "--data-dir"),
    "missing data folder": ("--dataset imagenet64 --data-dir nowhere",
                            "--data-dir nowhere does not exist"),
    "no data folder": ("--dataset bedroom256", "needs --data-dir"),
    "missing path": ("--dataset nowhere", "--dataset nowhere does not exist"),
    "another script's checkpoint": ("--ckpt other.pt", "other.pt was written by cd.py"),
    "another script's run": ("--out-dir other", "holds a run of cd.py"),
    "other flags than the run's": (f"{TINY_NET} --lr 0.5 --out-dir run",
                                   "--lr 0.001 there, 0.5 now"),
    "missing checkpoint": ("--ckpt nowhere.pt", "nowhere.pt: No such file"),
    "truncated checkpoint": ("--ckpt short.pt", "short.pt"),
    "pickle with code": ("--ckpt code.pt", "could run code"),
    "old-style pickle with code": ("--ckpt old.pt", "could run code"),
    "unwritable out-dir": (f"{TINY_NET} --out-dir file/run", "--out-dir file/run: Not a directory"),
    "unknown net": ("--net resnet", "--net resnet"),
    "no labels": (f"--dataset images {TINY_NET} --class-cond", "has no labels"),
    "label out of range": ("--ckpt run/last.pt --labels 10", "labels 0 to 9"),
    "sigmas upside down": ("--ckpt run/last.pt --sigmas 1 80", "--sigmas"),
    "unknown picture": ("--ckpt run/last.pt --sample 1 --save x.jpg", "--save x.jpg"),
    "no interval at the start": ("--recipe ct --dist l2 --s0 1", "--s0 1 leaves no interval"),
    "p(t) outside the grid": ("--p-t 50 0.1", "--p-t 50.0 0.1: name MEAN STD"),
    "another network than the run's": (" ".join(map(str, RUN + MU)) + " --net glyphs base=32 "
                                       "mult=1,1 blocks=2 --out-dir run", "blocks 1 there, 2 now"),
    "weights without their run": (f"{TINY_NET} --out-dir half",
                                  "holds an ema.pt without last.pt"),
    "free form in continuous time": ("--objective continuous --parametrisation free",
                                     "--parametrisation does not apply with --objective"),
    "s1 below s0": ("--s0 10 --s1 5", "--s1 5 is below --s0 10"),
}


@pytest.fixture(scope="module")
def workplace(trained, tmp_path_factory):
    """A folder in which every mistake can be made."""
    folder = tmp_path_factory.mktemp("mistakes")
    state = last(trained)
    for name in ("run", "other", "images", "half"):
        (folder / name).mkdir()
    (folder / "half" / "ema.pt").write_text("")
    torch.save(state, folder / "run" / "last.pt")
    torch.save(state | {"script": "cd"}, folder / "other.pt")
    torch.save(state | {"script": "cd"}, folder / "other" / "last.pt")
    data = (folder / "run" / "last.pt").read_bytes()
    (folder / "short.pt").write_bytes(data[:len(data) // 2])
    torch.save({"model_args": Code()}, folder / "code.pt")
    (folder / "old.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    (folder / "file").write_text("")
    Image.new("RGB", (16, 16)).save(folder / "images" / "0.png")
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line(workplace, mistake):
    flags, message = MISTAKES[mistake]
    assert_mistake(flags.split(), message, "ct.py", workplace)


def test_a_broken_image_met_in_a_worker(tmp_path):
    (tmp_path / "images").mkdir()
    file = tmp_path / "images" / "broken.png"
    Image.new("RGB", (16, 16)).save(file)
    file.write_bytes(file.read_bytes()[:50])  # its header is whole
    done = run_script("--dataset", "images", *RUN, "--workers", 1, cwd=tmp_path, code=2)
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("ct.py: error: images/broken.png cannot be read as an image")


def test_an_error_of_another_rank_is_said(tmp_path):
    """One of 8 images is broken, of rank 1, which says so."""
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / f"{i}.png")
    order = np.concatenate(list(common.index_batches(8, 0, 0, 1, 8, 4)))
    for rank in range(2):
        broken = tmp_path / "images" / f"{order[4 * rank]}.png"
        good = broken.read_bytes()
        broken.write_bytes(good[:50])
        done = run_script("--dataset", "images", *RUN, "--workers", rank, cwd=tmp_path, ranks=2)
        who = "rank 1: " * rank
        message = f"ct.py: error: {who}images/{broken.name} cannot be read"
        assert done.returncode and message in done.stderr, done.stderr
        broken.write_bytes(good)


def test_nodes_that_do_not_share_the_folder(trained, tmp_path):
    (tmp_path / "1").mkdir()
    shutil.copytree(trained, tmp_path / "0" / "run")
    command = [str(ROOT / "ct.py"), *map(str, RUN + MU), "--out-dir", "run"]
    done = run_ranks(command, [tmp_path / "0", tmp_path / "1"], {})
    assert done.returncode and "is not the same folder on all nodes" in done.stderr, done.stderr


def test_mistakes_of_all_ranks_are_said_once(tmp_path):
    done = run_script("--dataset", "nowhere", cwd=tmp_path, ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("ct.py: error: --dataset nowhere does not exist") == 1


def test_help(tmp_path):
    done = run_script("--help", cwd=tmp_path, code=0)
    flags = ("dataset data-dir out-dir overwrite total-steps batch-size micro-batch lr seed "
             "log-every sample-every eval-every save-every ckpt sample eval inception sigmas "
             "labels save recipe objective schedule s0 s1 mu0 teacher teacher-steps q stages "
             "mapping dist p-t weighting parametrisation")
    for flag in flags.split():
        assert f"\n  --{flag}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert not os.listdir(tmp_path)


def test_lpips_without_its_weights(tmp_path):
    """They cannot be fetched: one line that says what to do."""
    nowhere = "http://127.0.0.1:9"
    offline = dict(https_proxy=nowhere, http_proxy=nowhere, TORCH_HOME=str(tmp_path / "none"))
    done = run_script(*RUN, "--dist", "lpips", cwd=tmp_path, env=offline, code=2)
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("ct.py: error: --dist lpips")
    assert "vgg16-397923af.pth" in line or "torchvision" in line


# ---- what the four scripts share

ONE_STEP = [*SMALL, *"--batch-size 4 --micro-batch 4 --sample-every 0 --save-every 0".split()]
SCRIPTS = {
    "ct.py": "--total-steps 1",
    "cd.py": "--total-steps 1 --teacher-steps 1",
    "ctm.py": "--total-steps 1 --teacher-steps 1",
    "guided_distill.py": "--teacher-steps 1 --w-max 0 --start-N 2 --last-steps 1",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_largest_maps_that_drop_out(tmp_path, script):
    run_script(*ONE_STEP, *SCRIPTS[script].split(), "--dropout", 0.3, "--dropout-size", 8,
               "--out-dir", "run", script=script, cwd=tmp_path, code=0)
    state = last(tmp_path / "run")
    assert state["model_args"]["dropout"] == 0.3 and state["model_args"]["dropout_size"] == 8
    net = common.make_net(state["model_args"])
    assert [mask is None for mask in net.draw_masks(1)] == [
        size > 8 for _, _, size in net.block_shapes]


def test_a_first_teacher_of_before_the_ramp_is_kept(tmp_path):
    """It had no --lr-ramp; where its recipe has one now, the run still goes on."""
    flags = [*ONE_STEP, *"--recipe ect --total-steps 1 --teacher-steps 1 --out-dir run".split()]
    ramp = "import cd\ncd.TEACHERS['glyphs'] = cd.TEACHERS['glyphs'] | dict(lr_ramp=99)"
    run_script(*flags, cwd=tmp_path, code=0)
    before = last(tmp_path / "run" / "teacher")
    run_script(*flags, cwd=tmp_path, prelude=ramp, code=0)
    assert_same(last(tmp_path / "run" / "teacher"), before)
    run_script(*flags, "--overwrite", cwd=tmp_path, prelude=ramp, code=0)
    assert last(tmp_path / "run" / "teacher")["args"]["lr_ramp"] == 99
