"""The script as a user runs it: training, resuming, several processes, accidents, sampling, and mistakes on the command line."""
import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import common
from util import ROOT, SMALL, assert_mistake, free_port, last, run_script, torchrun

RUN = [*SMALL, "--batch-size", 8, "--micro-batch", 4, "--total-steps", 6, "--dropout", 0.3, "--flip", "--log-every", 1,
       "--sample-every", 0, "--save-every", 0]
AFTER_STEP_2 = """
import os, signal
write = common.Log.write
def write_and_act(self, record):
    write(self, record)
    if record["step"] == 2:
        ACTION
common.Log.write = write_and_act
"""
STOP_AT_3 = AFTER_STEP_2.replace("ACTION", "os.kill(os.getpid(), signal.SIGTERM)")  # the step under way is finished


def flat(state):
    """Every tensor and number of a checkpoint, by its path."""
    if isinstance(state, dict):
        return {(key, *path): value for key, part in state.items() for path, value in flat(part).items()}
    if isinstance(state, (list, tuple)):
        return flat(dict(enumerate(state)))
    return {(): state}


def assert_same(a, b, tolerance=0.0, ignore=("args",)):
    a, b = ({key: value for key, value in flat(state).items() if key[0] not in ignore} for state in (a, b))
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
    """Six steps of a small net in one process, with a moving-average target so that every kind of state is in play."""
    folder = tmp_path_factory.mktemp("trained")
    run_script(*RUN, "--mu0", 0.9, "--out-dir", "whole", "--sample-every", 3, cwd=folder, code=0)
    return folder / "whole"


# ---- training and resuming

def test_a_run_leaves_what_it_promises(trained):
    state = last(trained)
    assert state["step"] == 6 and state["images"] == 48 and state["script"] == "ct" and state["skipped"] == 0
    ema = torch.load(trained / "ema.pt", weights_only=True)
    assert all(torch.equal(ema[name], value) for name, value in state["ema"].items()) and ema.keys() == state["net"].keys()
    assert [r["step"] for r in records(trained)] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "loss_bins", "grad_norm", "N", "mu", "images_per_s", "peak_gb", "skipped"} <= records(trained)[0].keys()
    for name in ("000003.png", "000006.png"):
        picture = Image.open(trained / "samples" / name)
        assert picture.size == (3 * (2 * 160 + 4), 3 * 128)
    assert not list(trained.rglob("*.tmp"))


def test_three_and_three_steps_equal_six_bit_for_bit(trained, tmp_path):
    flags = [*RUN, "--mu0", 0.9, "--out-dir", tmp_path / "run"]
    run_script(*flags, cwd=tmp_path, prelude=STOP_AT_3, code=128 + signal.SIGTERM)
    assert last(tmp_path / "run")["step"] == 3
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 1}\n{"step": 5, "lo')  # what a killed run may leave
    run_script(*flags, cwd=tmp_path, code=0)
    assert_same(last(tmp_path / "run"), last(trained))
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in records(tmp_path / "run")] == [r["loss"] for r in records(trained)]


def test_two_processes_equal_one(trained, tmp_path):
    run_script(*RUN, "--mu0", 0.9, "--out-dir", "two", cwd=tmp_path, launcher=torchrun(2), code=0)
    assert_same(last(tmp_path / "two"), last(trained), 1e-6)
    run_script(*RUN, "--mu0", 0.9, "--out-dir", "mixed", cwd=tmp_path, prelude=STOP_AT_3, code=128 + signal.SIGTERM)
    run_script(*RUN, "--mu0", 0.9, "--out-dir", "mixed", cwd=tmp_path, launcher=torchrun(2), code=0)
    assert_same(last(tmp_path / "mixed"), last(trained), 1e-6)
    a, b = (records(folder) for folder in (tmp_path / "two", trained))
    for key in ("loss", "loss_bins", "grad_norm"):  # the log speaks of the global batch
        np.testing.assert_allclose(*(np.array([r[key] for r in log], float) for log in (a, b)), rtol=1e-4)  # no image in a bin: nan


def test_the_loop_by_hand(trained):
    """All six steps anew: the loss of the 8 images at once, RAdam, then target and EMA by their formulas (CM Alg. 3)."""
    import ct
    args = common.argparse.Namespace(**last(trained)["args"])
    dataset = common.load_dataset("glyphs", None, 16)
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
            x0, y = common.to_device(dataset.__getitems__(indices[2 * k + m]), torch.device("cpu"), True)
            n = torch.multinomial(common.interval_probabilities(times, args.times), 4, replacement=True)
            losses.append(ct.loss_fn(net, target, x0, torch.randn_like(x0), times[n], times[n + 1], y, common.pseudo_huber,
                                     lambda t_n, t_n1: 1 / (t_n1 - t_n)))
        optimizer.zero_grad()
        loss = torch.cat(losses).mean()
        loss.backward()
        norm = sum(p.grad.square().sum() for p in net.parameters()).sqrt()
        np.testing.assert_allclose([record["loss"], record["grad_norm"], record["mu"]], [loss.item(), norm.item(), 0.9 ** (10 / N)], 1e-4)
        optimizer.step()
        with torch.no_grad():
            for p, p_target, p_ema in zip(net.parameters(), target.parameters(), ema.parameters()):
                p_target.copy_(0.9 ** (10 / N) * p_target + (1 - 0.9 ** (10 / N)) * p)
                p_ema.copy_(args.ema_decay * p_ema + (1 - args.ema_decay) * p)
    for module, key in ((net, "net"), (target, "target"), (ema, "ema")):
        assert_same(module.state_dict(), last(trained)[key], 1e-5)
    assert not torch.equal(last(trained)["target"]["out.2.bias"], last(trained)["ema"]["out.2.bias"])


def test_two_nodes(trained, tmp_path):
    port = free_port()
    nodes = [subprocess.Popen([*torchrun(1, "--nnodes=2", f"--node_rank={rank}", "--master_addr=127.0.0.1", port=port),
                               str(ROOT / "ct.py"), *map(str, RUN), "--mu0", "0.9", "--out-dir", str(tmp_path / "nodes")],
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
             for rank in range(2)]
    for node in nodes:
        output, _ = node.communicate(timeout=300)
        assert node.returncode == 0, output.decode()
    assert_same(last(tmp_path / "nodes"), last(trained), 1e-6)


def test_a_killed_worker_is_restarted_and_resumes(trained, tmp_path):
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import common
seed = common.seed_everything
def seed_or_die(*key):
    if key[0] == common.STEP and key[2] == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    seed(*key)
common.seed_everything = seed_or_die
sys.argv[0] = {str(ROOT / 'ct.py')!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    done = subprocess.run([*torchrun(2, "--max-restarts=2"), str(wrapper),
                           *map(str, RUN), "--mu0", "0.9", "--save-every", "1", "--overwrite", "--out-dir", str(tmp_path / "run")],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed at step 4" in done.stdout  # --overwrite did not make the restart begin anew
    assert_same(last(tmp_path / "run"), last(trained), 1e-6)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts the threads of a process, which takes /proc")
def test_no_thread_of_the_process_group_outlives_it(tmp_path):
    """One that does may want the interpreter when that is gone, and then aborts the process, now and then."""
    (tmp_path / "sitecustomize.py").write_text("""
import atexit, os, pathlib
if "RANK" in os.environ:
    def left():  # one write, or the processes' words may mix
        os.write(1, f"left: {[p.read_text() for p in pathlib.Path('/proc/self/task').glob('*/comm')]}\\n".encode())
    atexit.register(left)
""")
    done = run_script(*RUN, "--out-dir", "run", cwd=tmp_path, launcher=torchrun(2), env=dict(PYTHONPATH=str(tmp_path)), code=0)
    assert done.stdout.count("left: ") == 2 and "gloo" not in done.stdout, done.stdout


def test_kill_9_leaves_a_loadable_checkpoint(tmp_path):
    flags = [*RUN, "--total-steps", 100_000, "--save-every", 1, "--out-dir", tmp_path / "run"]
    steps = [0]
    for delay in (0.0, 0.13, 0.31):
        process = subprocess.Popen([sys.executable, str(ROOT / "ct.py"), *map(str, flags)], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.time() + 120
        while time.time() < deadline and process.poll() is None:  # until it has saved a step of its own
            if (tmp_path / "run" / "last.pt").exists() and last(tmp_path / "run")["step"] > steps[-1]:
                break
        time.sleep(delay)
        process.kill()
        process.wait()
        steps.append(last(tmp_path / "run")["step"])
    assert steps == sorted(set(steps)), steps  # every life resumed where the one before was killed


def disk_full_message(done, path):
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith(f"ct.py: error: cannot write {path}"), done.stderr


def test_a_file_that_cannot_grow_leaves_the_previous_checkpoint(tmp_path):
    """The file-size limit of the process stands in for a disk that fills up during the second save."""
    fill_up = AFTER_STEP_2.replace("ACTION", "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))")
    done = run_script(*RUN, "--save-every", 1, "--out-dir", tmp_path / "run", cwd=tmp_path, prelude=fill_up)
    disk_full_message(done, tmp_path / "run" / "last.pt")
    assert last(tmp_path / "run")["step"] == 1 and not list((tmp_path / "run").glob(".*"))


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.name != "posix" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        filler = AFTER_STEP_2.replace("ACTION", f"""
        with open({str(disk / 'filler')!r}, "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)): pass
            except OSError: pass""")
        done = run_script(*RUN, "--save-every", 1, "--log-every", 2, "--out-dir", disk / "run", cwd=tmp_path, prelude=filler)
        disk_full_message(done, disk / "run" / "last.pt")
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
    run_script(*RUN, "--out-dir", "run", cwd=tmp_path, prelude=BAD_LOSS.replace("BAD", "{3}"), code=0)  # step 2, first half
    log = records(tmp_path / "run")
    assert [r["skipped"] for r in log] == [0, 1, 1, 1, 1, 1] and last(tmp_path / "run")["skipped"] == 1
    assert all(p.isfinite().all() for p in last(tmp_path / "run")["net"].values())
    assert int(last(tmp_path / "run")["optimizer"]["state"][0]["step"]) == 5


def test_ten_bad_steps_stop_the_run(tmp_path):
    done = run_script(*RUN, "--total-steps", 50, "--save-every", 2, "--out-dir", "run", cwd=tmp_path,
                      prelude=BAD_LOSS.replace("len(calls) in BAD", "len(calls) > 4"), code=1)
    assert "not finite 10 steps in a row" in done.stderr.splitlines()[-1]
    state = last(tmp_path / "run")
    assert state["step"] <= 12 and all(p.isfinite().all() for p in state["net"].values())


def test_images_with_workers_and_no_labels(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(5):
        Image.effect_noise((40, 30), 80).save(tmp_path / "images" / f"{i}.png")
    run_script("--dataset", "images", *RUN, "--total-steps", 2, "--recipe", "ct", "--dist", "l2", "--sample-every", 2, "--workers", 2,
               cwd=tmp_path, code=0)
    state = last(tmp_path / "out" / "ct")
    assert state["model_args"]["classes"] == 0 and state["target"] is not None


# ---- sampling

def test_samples(trained, tmp_path):
    flags = ["--ckpt", trained / "last.pt", "--device", "cpu", "--precision", "fp32"]
    run_script(*flags, "--sample", 6, "--labels", 3, 7, "--sigmas", 80, 0.8, "--save", "a/b.npz", cwd=tmp_path, code=0)
    data = np.load(tmp_path / "a" / "b.npz")
    assert data["arr_0"].shape == (6, 16, 16, 3) and data["arr_0"].dtype == np.uint8 and data["arr_1"].tolist() == [3, 7] * 3
    run_script(*flags, "--sample", 2, "--labels", 3, 7, "--sigmas", 80, 0.8, "--save", "folder", cwd=tmp_path, code=0)
    for i in range(2):  # an image does not depend on how many are drawn beside it
        assert np.array_equal(np.asarray(Image.open(tmp_path / "folder" / f"{i:06d}.png")), data["arr_0"][i])
    done = run_script(*flags, cwd=tmp_path, code=0)
    assert Image.open(tmp_path / "samples.png").size == (3 * 160, 3 * 112) and "EMA" in done.stdout
    one_step = run_script(*flags, "--sample", 6, "--labels", 3, 7, "--save", "one.npz", cwd=tmp_path, code=0)
    assert "1 network call" in one_step.stdout and not np.array_equal(np.load(tmp_path / "one.npz")["arr_0"], data["arr_0"])
    watch = "whole = common.draw_part; common.draw_part = lambda draw, part, *more: (print('pass of', len(part)), whole(draw, part, *more))[1]"
    few = run_script(*flags, "--sample", 6, "--labels", 3, 7, "--micro-batch", 4, "--save", "few.npz", cwd=tmp_path, prelude=watch, code=0)
    assert "pass of 4\npass of 2\n" in few.stdout
    assert np.abs(np.load(tmp_path / "few.npz")["arr_0"].astype(int) - np.load(tmp_path / "one.npz")["arr_0"]).max() <= 1


def test_samples_use_the_ema(trained, tmp_path):
    state = last(trained)
    net = common.UNet(**state["model_args"])
    net.load_state_dict(state["ema"])
    net.eval()
    x_T = 80 * common.seeded_noise(range(4), 5)(torch.zeros(4, 3, 16, 16))
    with torch.no_grad():
        expected = common.consistency(net, x_T, torch.full((4,), 80.0), torch.arange(4)).clamp(-1, 1)
    run_script("--ckpt", trained / "last.pt", "--sample", 4, "--seed", 5, "--save", "x.npz", "--device", "cpu", "--precision", "fp32",
               cwd=tmp_path, code=0)
    assert np.abs(np.load(tmp_path / "x.npz")["arr_0"].astype(int) - common.to_uint8(expected).numpy().astype(int)).max() <= 1


def test_plain_weights_of_a_known_network(tmp_path):
    torch.save(common.UNet(**common.NETS["glyphs"], classes=10).state_dict(), tmp_path / "weights.pt")
    run_script("--ckpt", "weights.pt", "--sample", 1, "--save", "x.png", cwd=tmp_path, code=0)
    torch.save({"a": torch.zeros(3)}, tmp_path / "weights.pt")
    done = run_script("--ckpt", "weights.pt", cwd=tmp_path, code=2)
    assert "fit none of the networks" in done.stderr


# ---- mistakes

class Code:
    def __reduce__(self):
        return os.system, ("touch ran_code",)


MISTAKES = {
    "misspelt flag": (["--datset", "glyphs"], "did you mean --dataset?"),
    "bad value": (["--batch-size", "-3"], "--batch-size"),
    "flag for training with --ckpt": (["--ckpt", "run/last.pt", "--lr", "1"], "--lr does not apply"),
    "flag for sampling without --ckpt": (["--labels", "3"], "--labels applies to sampling only"),
    "data-dir with a path": (["--dataset", "run", "--data-dir", "run"], "--data-dir"),
    "missing data folder": (["--dataset", "imagenet64", "--data-dir", "nowhere"], "--data-dir nowhere does not exist"),
    "no data folder": (["--dataset", "bedroom256"], "needs --data-dir"),
    "missing path": (["--dataset", "nowhere"], "--dataset nowhere does not exist"),
    "another script's checkpoint": (["--ckpt", "other.pt"], "other.pt was written by cd.py"),
    "another script's run": (["--out-dir", "other"], "holds a run of cd.py"),
    "other flags than the run found": ([*SMALL, "--lr", "0.5", "--out-dir", "run"], "--lr 0.001 there, 0.5 now"),
    "missing checkpoint": (["--ckpt", "nowhere.pt"], "nowhere.pt: No such file"),
    "truncated checkpoint": (["--ckpt", "short.pt"], "short.pt"),
    "pickle with code": (["--ckpt", "code.pt"], "could run code"),
    "old-style pickle with code": (["--ckpt", "old.pt"], "could run code"),
    "batch that does not divide": (["--batch-size", "10", "--micro-batch", "4"], "not a multiple of --micro-batch 4"),
    "unwritable out-dir": ([*SMALL, "--out-dir", "file/run"], "--out-dir file/run: Not a directory"),
    "unknown net": (["--net", "resnet"], "--net resnet"),
    "unknown key of net": (["--net", "glyphs", "depth=3"], "--net depth=3"),
    "bad value of net": (["--net", "glyphs", "mult=a"], "--net mult=a"),
    "net that does not fit": (["--net", "glyphs", "image_size=18"], "--net: image size 18"),
    "no labels": (["--dataset", "images", *SMALL, "--class-cond"], "has no labels"),
    "label out of range": (["--ckpt", "run/last.pt", "--labels", "10"], "labels 0 to 9"),
    "sigmas upside down": (["--ckpt", "run/last.pt", "--sigmas", "1", "80"], "--sigmas"),
    "unknown picture": (["--ckpt", "run/last.pt", "--sample", "1", "--save", "x.jpg"], "--save x.jpg"),
    "no interval at the start": (["--recipe", "ct", "--dist", "l2", "--s0", "1"], "--s0 1 leaves no interval"),
    "times outside the grid": (["--times", "50", "0.1"], "--times 50.0 0.1: name a mean"),
    "words for times": (["--times", "abc"], "--times"),
    "another network than the run found": ([*RUN, "--mu0", "0.9", "--net", "glyphs", "base=32", "mult=1,1", "blocks=2",
                                           "--out-dir", "run"], "blocks 1 there, 2 now"),
    "weights without their run": ([*SMALL, "--out-dir", "half"], "holds an ema.pt without its last.pt"),
    "bad law of times": (["--times", "1.0"], "--times 1.0: name a mean"),
    "s1 below s0": (["--s0", "10", "--s1", "5"], "--s1"),
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
    assert_mistake(*MISTAKES[mistake], "ct.py", workplace)


def test_a_broken_image_met_in_a_worker(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"not a picture")
    done = run_script("--dataset", "images", *RUN, "--workers", 1, cwd=tmp_path, code=2)
    assert done.stderr.strip().splitlines()[-1].startswith("ct.py: error: images/broken.png cannot be read as an image")


def test_an_error_of_another_rank_is_said(tmp_path):
    """One of 8 images is broken; whichever rank meets it says so."""
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / f"{i}.png")
    order = np.concatenate(list(common.index_batches(8, 0, 0, 1, 8, 4)))
    for rank in range(2):
        broken = tmp_path / "images" / f"{order[4 * rank]}.png"
        good = broken.read_bytes()
        broken.write_bytes(b"not a picture")
        done = run_script("--dataset", "images", *RUN, cwd=tmp_path, launcher=torchrun(2))
        who = "rank 1: " * rank
        assert done.returncode and f"ct.py: error: {who}images/{broken.name} cannot be read" in done.stderr, done.stderr
        broken.write_bytes(good)


def test_nodes_that_do_not_share_the_folder(trained, tmp_path):
    port = free_port()
    (tmp_path / "0").mkdir()
    shutil.copytree(trained, tmp_path / "0" / "run")
    (tmp_path / "1").mkdir()
    nodes = [subprocess.Popen([*torchrun(1, "--nnodes=2", f"--node_rank={rank}", "--master_addr=127.0.0.1", port=port),
                               str(ROOT / "ct.py"), *map(str, RUN), "--mu0", "0.9", "--out-dir", "run"], cwd=tmp_path / str(rank),
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
             for rank in range(2)]
    outputs = [node.communicate(timeout=300)[0].decode() for node in nodes]
    assert all(node.returncode for node in nodes) and "is not the same folder on all nodes" in outputs[0], outputs


def test_mistakes_under_torchrun_are_said_once(tmp_path):
    done = run_script("--dataset", "nowhere", cwd=tmp_path, launcher=torchrun(2))
    assert done.returncode != 0 and done.stderr.count("ct.py: error: --dataset nowhere does not exist") == 1


def test_help(tmp_path):
    done = run_script("--help", cwd=tmp_path, code=0)
    for flag in ("dataset data-dir out-dir overwrite total-steps batch-size micro-batch lr seed log-every sample-every save-every "
                 "ckpt sample eval inception sigmas labels save recipe schedule s0 s1 mu0 teacher teacher-steps q stages mapping dist times "
                 "weighting").split():
        assert f"\n  --{flag}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert not os.listdir(tmp_path)


def test_lpips_without_its_weights(tmp_path):
    """No network here, or none of its weights: one line that says what to do. Where they can be had there is nothing to test."""
    offline = dict(https_proxy="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9", TORCH_HOME=str(tmp_path / "none"))
    done = run_script(*RUN, "--dist", "lpips", cwd=tmp_path, env=offline, code=2)
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("ct.py: error: --dist lpips") and ("vgg16-397923af.pth" in line or "torchvision" in line)
