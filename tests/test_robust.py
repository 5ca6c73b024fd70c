"""What happens to a run and its samples: a small /dev/shm, dead workers, Ctrl-C, old samples."""
import collections
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import mutants
import torture
from util import ROOT, SMALL, end_workers, run_script

CPU = torch.device("cpu")
RUN = [*SMALL, "--batch-size", 4, "--micro-batch", 4, "--total-steps", 1, "--sample-every", 0]
DRAW = ["--ckpt", "run/last.pt", "--sample", 3, "--labels", 7, 2, "--device", "cpu", "--precision",
        "fp32"]


def error_line(done, script="ct.py"):
    """The only line of an error."""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{script}: error: "), done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robust")
    run_script(*RUN, "--out-dir", "run", cwd=folder, code=0)
    return folder


# ---- workers

def some_images(n=64, size=16):
    images = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return common.ArrayImages([images], None, size, "x")


def loader_of(dataset, workers=2, batches=20):
    return common.make_loader(dataset, iter([np.arange(4)] * batches), workers, CPU)


def test_a_full_shared_memory_is_an_error_of_the_worker(monkeypatch):
    """It used to be one of a thread, that lost the batch; the main process waited for ever."""
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(common.UserError) as error:
        next(loader_of(some_images()))
    end_workers()
    last_line = str(error.value).strip().splitlines()[-1]
    assert "--workers 0 does without" in last_line and "--shm-size" in last_line
    assert next(loader_of(some_images(), workers=0))[0].shape == (4, 3, 16, 16)


def test_a_small_dev_shm(tmp_path):
    """A container's, but of 100 kB."""
    mount = "mount -t tmpfs -o size=100k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    np.save(tmp_path / "x.npy", np.zeros((8, 64, 64, 3), np.uint8))
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import numpy as np, torch, common
sys.excepthook = common.one_line_errors
dataset = common.load_dataset("x.npy", None, 64)
next(common.make_loader(dataset, iter([np.arange(8)] * 9), 1, torch.device("cpu")))
"""
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c"]
    done = subprocess.run([*command, code], cwd=tmp_path, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 2 and "--shm-size" in error_line(done, "-c")


def test_a_killed_worker_is_noticed_where_its_batch_is_waited_for(monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    before = set(multiprocessing.active_children())
    loader = loader_of(some_images(), batches=100)
    next(loader), next(loader)
    for worker in set(multiprocessing.active_children()) - before:
        os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.3)  # torch's handler of the signal would raise a RuntimeError here
    with pytest.raises(common.UserError, match="killed a process of --workers: for want of memory"):
        list(loader)
    end_workers()


def test_a_run_whose_worker_is_killed_ends_in_one_line(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((8, 16, 16, 3), np.uint8))
    more = "--workers 1 --dataset x.npy --total-steps 40 --out-dir run".split()
    done = run_script(*RUN, *more, cwd=tmp_path, code=2, process=True, prelude="""
import os, signal, torch
monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
main, calls, read = os.getpid(), [], common.ArrayImages.__getitems__
def killed(dataset, indices):
    calls.append(indices)
    if os.getpid() != main and len(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(dataset, indices)
common.ArrayImages.__getitems__ = killed""")
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("ct.py: error: the system killed a process of")


# ---- what a launcher says

@pytest.mark.parametrize("names", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "RANK WORLD_SIZE",
                                   "RANK WORLD_SIZE MASTER_ADDR"])
def test_what_is_left_over_of_a_launcher(tmp_path, names):
    env = {name: "2" for name in names.split()}
    done = run_script(*RUN, cwd=tmp_path, env=env, code=2)
    line = error_line(done)
    assert "start with torchrun, or unset them" in line and "WORLD_SIZE" in line
    assert not list(tmp_path.iterdir())


def test_an_empty_word_of_the_launcher_counts_nothing(trained):
    env = dict.fromkeys(("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), "")
    run_script(*RUN, "--out-dir", "run", cwd=trained, env=env, code=0)


def test_processes_that_do_not_come(tmp_path):
    alone = """
import torch.distributed
def rendezvous(url, timeout):
    assert timeout.total_seconds() <= 600
    raise torch.distributed.DistStoreError("Timed out after 601 seconds waiting for clients")
monkeypatch.setattr(torch.distributed, "rendezvous", rendezvous)"""
    env = dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="9")
    done = run_script(*RUN, cwd=tmp_path, env=env, code=2, prelude=alone)
    assert "WORLD_SIZE=2: the other processes do not come" in error_line(done)


# ---- Ctrl-C

INTERRUPT = """
import os, signal
calls = iter(range(1000))
WRAPPED = common.NAME
def interrupted(*values, **more):
    if next(calls) >= FIRST:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    return WRAPPED(*values, **more)
common.NAME = interrupted
"""


def interrupt(name, first=0):
    return INTERRUPT.replace("NAME", name).replace("FIRST", str(first))


@pytest.mark.parametrize("what, name, first", [
    ("a.png", "draw_part", 0), ("b.npz", "atomic_file", 0), ("c", "atomic_file", 2),
    ("d", "atomic_file", 3)])
def test_ctrl_c_while_drawing_or_saving(trained, what, name, first):
    """Nothing half-written: of a folder no image is left."""
    done = run_script(*DRAW, "--save", what, cwd=trained, code=130,
                      prelude=interrupt(name, first))
    assert error_line(done) == "ct.py: error: interrupted"
    left = [path for path in trained.rglob("*") if path.stem in ("a", "b")]
    assert not left and not list(trained.glob(".*")) and not list(trained.glob("[cd]/*"))


def test_ctrl_c_while_an_image_is_written(trained):
    """As above, with the file open."""
    done = run_script(*DRAW, "--save", "e", cwd=trained, code=130, prelude="""
import os
sync, calls = os.fsync, iter(range(9))
def interrupted(file):
    if next(calls) == 1:
        raise KeyboardInterrupt
    sync(file)
monkeypatch.setattr(os, "fsync", interrupted)""")
    assert error_line(done) == "ct.py: error: interrupted" and not list(trained.glob("e/*"))


def test_ctrl_c_while_data_are_read(tmp_path):
    done = run_script(*RUN, cwd=tmp_path, code=130, prelude=interrupt("load_dataset"))
    assert error_line(done) == "ct.py: error: interrupted" and not list(tmp_path.iterdir())


def test_ctrl_c_as_the_terminal_sends_it(trained):
    """The interpreter itself ends with 130, and not by the signal."""
    done = run_script(*DRAW, "--save", "f.png", cwd=trained, code=130, process=True,
                      prelude=interrupt("draw_part"))
    assert error_line(done) == "ct.py: error: interrupted"


# ---- samples in a folder

def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_folder_of_samples_is_a_data_set(trained):
    run_script(*DRAW, "--save", "set", cwd=trained, code=0)
    run_script(*DRAW, "--save", "same.npz", cwd=trained, code=0)
    dataset = common.load_dataset(str(trained / "set"), None, 16)
    images, labels = dataset.__getitems__(np.arange(3))
    with np.load(trained / "same.npz") as same:
        assert labels.tolist() == same["arr_1"].tolist() == [7, 2, 7]
        assert np.array_equal(images.permute(0, 2, 3, 1), same["arr_0"])
    index = json.loads((trained / "set" / "dataset.json").read_text())
    assert index == {"labels": [["000000.png", 7], ["000001.png", 2], ["000002.png", 7]]}


def test_old_samples_do_not_stay_among_new_ones(trained):
    folder = trained / "twice"
    run_script(*DRAW, "--save", "twice", cwd=trained, code=0)
    old = files_of(folder)
    done = run_script(*DRAW, "--save", "twice", cwd=trained, code=2)
    assert "--save twice holds " in error_line(done) and "--overwrite" in error_line(done)
    assert files_of(folder) == old
    (folder / "notes.txt").write_text("mine")
    two = [2 if value == 3 else value for value in DRAW]
    run_script(*two, "--seed", 1, "--save", "twice", "--overwrite", cwd=trained, code=0)
    new = files_of(folder)
    assert sorted(new) == ["000000.png", "000001.png", "dataset.json", "notes.txt"]
    assert new["000000.png"] != old["000000.png"]
    assert len(common.load_dataset(str(folder), None, 16)) == 2


@pytest.mark.parametrize("name", ["cat.png", "kitten.png", "0001/x.jpg", "dataset.json", "1.png"])
def test_others_images_are_not_deleted(trained, tmp_path, name):
    """A folder that holds others' images, or their index, is refused, with --overwrite too."""
    folder = tmp_path / "others"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(b"theirs")
    more = ["--save", folder, "--overwrite"]
    if "/" in name:
        run_script(*DRAW, *more, cwd=trained, code=0)
    else:
        done = run_script(*DRAW, *more, cwd=trained, code=2)
        assert f" holds {name}," in error_line(done) and len(files_of(folder)) == 1
    assert (folder / name).read_bytes() == b"theirs"


def test_a_disk_that_fills_up_leaves_no_part_of_a_folder(trained):
    run_script(*DRAW, "--save", "disk", cwd=trained, code=2, prelude="""
import errno, os
calls, sync = iter(range(9)), os.fsync
def full(file):
    if next(calls) == 2:
        raise OSError(errno.ENOSPC, "No space left on device")
    sync(file)
monkeypatch.setattr(os, "fsync", full)""")
    assert not files_of(trained / "disk")


def test_overwrite_does_not_apply_to_measuring(trained):
    done = run_script("--ckpt", "run/last.pt", "--eval", 10, "--overwrite", cwd=trained, code=2)
    assert "--overwrite does not apply with --eval 10" in error_line(done)


# ---- the harness that kills runs and damages files, in little

def test_three_kills(tmp_path, capsys):
    assert torture.kill_runs(tmp_path, 3, 6, True, 0)
    said = capsys.readouterr().out
    assert "runs that ended as the undisturbed one" in said and "0 spoilt runs" in said


def test_three_damaged_files(tmp_path, capsys):
    kinds = ["png", "npy", "dataset.json"]
    assert torture.damage_files(tmp_path, 3, kinds, 0)
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in table[1:]] == [*kinds, "all"]
    assert sum(map(int, table[-1][1:])) == 3


def test_the_faults_can_still_be_made():
    """No mutant runs this file, in whose tree a text is another."""
    for file, faults in mutants.MUTANTS.items():
        for old, new, tests in faults:
            assert mutants.broken(file, old, new) != (ROOT / file).read_text()
            for name in tests.split():
                assert name != "robust" and (ROOT / f"tests/test_{name}.py").exists()


def test_what_the_harness_calls_bad(tmp_path, capsys):
    good, other = "a" * 64, "b" * 64
    judged = [torture.judge(good, good, set(), True), torture.judge(other, good, {"note"}, True),
              torture.judge(other, good, set(), False), torture.judge("hang", good, set(), True),
              torture.judge(other, good, set(), True)]
    assert judged == ["right", "said", "untold", "hang", "silent"]
    for outcome, well in zip(judged, (True, True, True, False, False)):
        counts = collections.defaultdict(collections.Counter)
        counts["png"][outcome] += 1
        assert torture.report(counts) == well
    states = [dict(net=dict(w=torch.ones(2)), step=3), dict(net=dict(w=torch.zeros(2)), step=3)]
    assert torture.digest(*torture.tensors_of(states[0])) != torture.digest(
        *torture.tensors_of(states[1]))
