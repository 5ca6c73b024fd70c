"""Kill runs at random moments; damage the files they read. See what comes of it. No part of the
suite: 2 cores need some ten minutes for each.

    python tests/torture.py kill [--n 100] [--seed 0]
    python tests/torture.py damage [--n 200] [--seed 0] [--kinds png zip ..]

kill: `kill -9` to a run with --save-every 1, n times; then n times to it and to a second process
that was started in the same folder. After each its checkpoint must be readable and no older than
before, and the weights in the end must be, to the last bit, those of a run that nobody disturbed.

damage: flips bytes of a good file, or cuts off its tail, and reads it as a user would. Outcomes:
    right      the result is that of the good file
    said       one line: an error with exit code 2, or a note
    untold     another result, and no format or reader can know: nothing is there to check against
    silent     another result, and nothing said, though the format has checksums
    traceback, hang, crash (a signal)
Exit code 1 if a run was spoilt, or an outcome was one of the last four.
"""
import argparse
import collections
import contextlib
import hashlib
import json
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import common  # noqa: E402
import conftest  # noqa: E402, F401 - for packages that another torch was built for
from test_scripts import STOP_AT_3  # noqa: E402
from util import FORKS, ROOT, SMALL, exit_code, redirected, start_script  # noqa: E402

RUN = [*SMALL, *"--batch-size 8 --micro-batch 8 --log-every 1 --sample-every 0 --save-every 1 "
       "--workers 0 --no-flip --out-dir run".split()]


def digest(*values):
    """Of arrays, tensors, and what JSON knows."""
    sha = hashlib.sha256()
    for value in values:
        if isinstance(value, (np.ndarray, torch.Tensor)):
            array = np.ascontiguousarray(value)
            sha.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
        else:
            sha.update(json.dumps(value).encode())
    return sha.hexdigest()


def tensors_of(state):
    """All tensors in nested dictionaries and lists, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    return [tensor for part in state for tensor in tensors_of(part)] if isinstance(
        state, (list, tuple)) else []


def outcome_of_run(out_dir):
    """A digest of weights, averages and optimizer in last.pt, and those of ema.pt."""
    parts = [torch.load(Path(out_dir, name), weights_only=True) for name in ("last.pt", "ema.pt")]
    return digest(*tensors_of(parts))


def some_images(n=8, size=16, seed=0):
    """(n,size,size,3) uint8: smooth, so that each format compresses them, and noisy."""
    rng = np.random.default_rng(seed)
    slopes = rng.uniform(-4, 4, (n, 2, 1, 1, 3))
    places = np.arange(size)
    smooth = slopes[:, 0] * places[:, None, None] + slopes[:, 1] * places[:, None]
    return (128 + smooth + rng.normal(0, 5, smooth.shape)).clip(0, 255).astype(np.uint8)


# ---- kill -9

def start(folder, steps, prelude=None):
    command = [str(ROOT / "ct.py"), *RUN, "--dataset", "data.npz", "--total-steps", str(steps)]
    return start_script(command, folder, prelude=prelude)


def finish(folder, steps, prelude=None, code=0):
    process = start(folder, steps, prelude)
    process.join()
    assert process.exitcode == code, f"a run ended with {process.exitcode}: see {folder}"


def new_folder(place, name):
    folder = Path(place, name)
    folder.mkdir()
    np.savez(folder / "data.npz", some_images(), np.arange(8))
    return folder


def disturb(folder, steps, second, rng):
    """Start a run, or two, and kill each at a random moment. Returns how many were alive then."""
    killed, processes, last = 0, [], folder / "run" / "last.pt"
    before = last.stat().st_mtime_ns if last.exists() else 0
    for _ in range(1 + second):
        processes.append(start(folder, steps))
        time.sleep(second * rng.uniform(0, 1))
    if rng.random() < 0.8:  # while it trains and saves; else while it begins, perhaps
        while not last.exists() or last.stat().st_mtime_ns == before:
            if not any(process.is_alive() for process in processes):
                break
            time.sleep(0.001)
    for process in rng.permutation(processes):
        process.join(rng.uniform(0, 0.5))
        killed += process.is_alive()
        process.kill()
        process.join()
    return killed


def kill_runs(place, n, steps, second, seed):
    """Kill a run, or two in a folder, n times. Prints a line, and returns whether all went well."""
    rng = np.random.default_rng(seed)
    title = "with a second process" if second else "alone"
    whole = new_folder(place, f"{title}, whole")
    finish(whole, steps)
    counts, folder = collections.Counter(), None
    while counts["kills"] < n or folder:
        if folder is None:
            folder = new_folder(place, f"{title} {counts['runs']}")
            counts["runs"] += 1
            step = 0
        if counts["kills"] < n:
            counts["kills"] += disturb(folder, steps, second, rng)
        else:
            finish(folder, steps)
        last = folder / "run" / "last.pt"
        try:
            found = common.load_checkpoint(last)["step"] if last.exists() else 0
            assert found >= step, f"step {found} after step {step}"
        except (common.UserError, AssertionError) as error:
            print(f"{title}, kill {counts['kills']}: {error}")
            counts["spoilt checkpoints"] += 1
            folder = None
            continue
        counts["that saved nothing new"] += found == step
        step = found
        if step == steps:
            same = outcome_of_run(folder / "run") == outcome_of_run(whole / "run")
            counts["runs that ended as the undisturbed one"] += same
            counts["spoilt runs"] += not same
            folder = None
    print(f"kill -9, {title}: " + ", ".join(f"{count} {what}" for what, count in counts.items()),
          flush=True)
    return not counts["spoilt checkpoints"] and not counts["spoilt runs"]


# ---- damage. Each kind: how its good file is made, how it is read, and whether it has checksums

def script(name, *flags):
    """Run a script in this process, of which nothing else is asked afterwards."""
    sys.argv = [str(ROOT / f"{name}.py"), *map(str, flags)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def train(dataset, steps=2):
    def read():
        script("ct", *RUN, "--dataset", dataset, "--total-steps", steps, "--overwrite")
    return read, lambda: outcome_of_run("run")


def resume():
    read = lambda: script("ct", *RUN, "--dataset", "data.npz", "--total-steps", 4)
    return read, lambda: outcome_of_run("run")


def log_after_resuming():
    read, weights = resume()

    def outcome():
        keys = "step", "images", "lr", "loss", "loss_bins", "grad_norm", "skipped"
        lines = map(json.loads, Path("run/log.jsonl").read_text().splitlines())
        return digest(weights(), [[line.get(key) for key in keys] for line in lines])
    return read, outcome


def draw(name):
    def read():
        script("ct", "--ckpt", f"run/{name}", "--sample", 4, "--save", "drawn.npz", "--device",
               "cpu", "--precision", "fp32")
    return read, lambda: digest(*np.load("drawn.npz").values())


def edit():
    def read():
        script("cd", "--ckpt", "run/last.pt", "--edit", "superres", "--image", "images/0.png",
               "--labels", 1, "--save", "drawn.npz", "--device", "cpu", "--precision", "fp32")
    return read, lambda: digest(*np.load("drawn.npz").values())


def statistics():
    found = []

    def read():
        import evaluate
        found.append(evaluate.load_statistics(Path("statistics.npz"), 6))
        if found[0] is None:  # it holds images, then
            common.load_dataset("statistics.npz", None, 16)
    return read, lambda: digest(*found[0])


def latent():
    found = []

    def read():
        import guided_distill
        run = argparse.Namespace(device=torch.device("cpu"), dtype=torch.float32, main=True,
                                 checkpointing=False)
        found.append(guided_distill.LatentModel("diffusers:pipe", "latents.npz", True, run))
    return read, lambda: digest(*tensors_of(found[0].teacher.state_dict()))


CHECKED, UNCHECKED = True, False
KINDS = {  # name: (file to damage, how it is read, whether its format has checksums)
    "png": ("images/0.png", train("images"), CHECKED),
    "jpeg": ("photos/0.jpg", train("photos"), UNCHECKED),
    "zip": ("images.zip", train("images.zip"), CHECKED),
    "npz": ("data.npz", train("data.npz"), UNCHECKED),  # mapped: to check it is to read it all
    "compressed": ("small.npz", train("small.npz"), CHECKED),
    "npy": ("data.npy", train("data.npy"), UNCHECKED),
    "dataset.json": ("listed/dataset.json", train("listed"), UNCHECKED),
    "last.pt": ("run/last.pt", resume(), CHECKED),
    "ema.pt": ("run/ema.pt", draw("ema.pt"), CHECKED),
    "log.jsonl": ("run/log.jsonl", log_after_resuming(), UNCHECKED),
    "statistics": ("statistics.npz", statistics(), CHECKED),
    "image": ("images/0.png", edit(), CHECKED),
    "safetensors": ("pipe/unet/diffusion_pytorch_model.safetensors", latent(), UNCHECKED),
}


def make_good_files(folder):
    """All good files, in `folder`."""
    images, labels, large = some_images(), np.arange(8), some_images(size=48)
    np.savez(folder / "data.npz", images, labels)
    np.savez_compressed(folder / "small.npz", images, labels)
    np.save(folder / "data.npy", images)
    for place, suffix in (("images", "png"), ("listed", "png"), ("photos", "jpg")):
        (folder / place).mkdir()
        for i, image in enumerate(large if suffix == "jpg" else images):
            Image.fromarray(image).save(folder / place / f"{i}.{suffix}")
    index = json.dumps({"labels": [[f"{i}.png", i] for i in range(8)]})
    (folder / "listed" / "dataset.json").write_text(index)
    shutil.make_archive(folder / "images", "zip", folder / "listed")
    x = np.random.default_rng(0).normal(size=(20, 6))
    np.savez(folder / "statistics.npz", mu=x.mean(0), sigma=np.cov(x.T))
    finish(folder, 4, STOP_AT_3, 128 + signal.SIGTERM)


def make_latent_model(folder):
    """What diffusers:PATH reads. Returns whether the package is there."""
    import pytest
    from test_guided_scripts import pipeline
    streams = [tempfile.TemporaryFile("w+") for _ in range(2)]
    with redirected(streams), contextlib.suppress(pytest.skip.Exception):
        pipeline(folder, "v_prediction")
    return (folder / "pipe").exists()


def damaged(content, rng):
    """A copy with one, two or eight bytes changed, or without its tail; and what was done."""
    size = len(content)
    if rng.random() < 1 / 3:
        lost = int(rng.integers(1, rng.choice([16, size]) + 1))
        return content[:-lost], f"the last {lost} of {size} bytes cut off"
    content = np.frombuffer(content, np.uint8).copy()
    places = rng.choice(size, rng.choice([1, 2, 8]), replace=False)
    content[places] ^= rng.integers(1, 256, len(places), dtype=np.uint8)
    return content.tobytes(), f"of {size} bytes {sorted(places.tolist())} changed"


def read_in_a_process(kind, folder):
    """What the process does that reads a case: its outcome goes to files in `folder`."""
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = str(folder)
    sys.argv = ["torture.py"]
    sys.excepthook = common.one_line_errors
    read, outcome = KINDS[kind][1]
    code = exit_code(read)
    if code == 0:
        Path("outcome").write_text(outcome())
    sys.exit(code)


def read_case(kind, folder, patience):
    """Read the file of a case. Returns "hang", "crash", "traceback", "said", or the digest."""
    process = FORKS.Process(target=read_in_a_process, args=(kind, folder))
    process.start()
    process.join(patience)
    if process.is_alive():
        process.kill()
        process.join()
        return "hang"
    errors = (folder / "stderr").read_text(errors="replace")
    if process.exitcode < 0:
        return "crash"
    if "Traceback" in errors or "outcome" not in os.listdir(folder) and not process.exitcode:
        return "traceback"
    if process.exitcode:
        return "said" if ": error: " in errors.strip().splitlines()[-1] else "traceback"
    return (folder / "outcome").read_text()


def notes(folder):
    """What a case said, that may be told of its data; without what differs from run to run."""
    lines = (folder / "stdout").read_text(errors="replace").splitlines()
    return {line for line in lines if line.startswith("note: ")}


def judge(outcome, digest, new_notes, checked):
    """The column of an outcome of `read_case`, where the good file's is `digest`."""
    if len(outcome) < len(digest):
        return outcome
    if outcome == digest:
        return "right"
    if new_notes:
        return "said"
    return "silent" if checked else "untold"


def damage_files(place, n, kinds, seed, patience=60):
    """Damage n files in turn. Prints the table, and returns whether all were read well."""
    good = Path(place, "good")
    good.mkdir()
    make_good_files(good)
    if "safetensors" in kinds and not make_latent_model(good):
        kinds = [kind for kind in kinds if kind != "safetensors"]
        print("safetensors: not without diffusers")
    counts, wanted = collections.defaultdict(collections.Counter), {}
    for kind in kinds:
        folder = Path(place, f"{kind}, good")
        shutil.copytree(good, folder)
        wanted[kind] = read_case(kind, folder, patience), notes(folder)
        assert len(wanted[kind][0]) == 64, f"{kind}: the good file: {wanted[kind][0]}: {folder}"
    rng = np.random.default_rng(seed)
    for i in range(n):
        kind = kinds[i % len(kinds)]
        name, _, checked = KINDS[kind]
        folder = Path(place, f"{i}")
        shutil.copytree(good, folder)
        content, what = damaged((folder / name).read_bytes(), rng)
        (folder / name).write_bytes(content)
        digest, usual_notes = wanted[kind]
        outcome = read_case(kind, folder, patience)
        outcome = judge(outcome, digest, notes(folder) - usual_notes, checked)
        counts[kind][outcome] += 1
        if outcome in ("right", "said", "untold"):
            shutil.rmtree(folder)
        else:
            print(f"{kind} {outcome}: {what}: {folder}", flush=True)
    return report(counts)


def report(counts):
    columns = "right", "said", "untold", "silent", "traceback", "hang", "crash"
    counts["all"] = sum(counts.values(), collections.Counter())
    print(f"{'':16}" + "".join(f"{column:>10}" for column in columns))
    for kind, found in counts.items():
        print(f"{kind:16}" + "".join(f"{found[column]:10}" for column in columns), flush=True)
    return not any(counts["all"][column] for column in columns[3:])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "damage"))
    parser.add_argument("--n", type=int, help="how often (default 100; damage 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40, help="kill: of a run (default 40)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--keep", action="store_true", help="keep the files of all cases")
    args = parser.parse_args()
    place = tempfile.mkdtemp(prefix="torture-")
    if args.what == "kill":
        well = [kill_runs(place, args.n or 100, args.steps, second, args.seed)
                for second in (False, True)]
        well = all(well)
    else:
        well = damage_files(place, args.n or 200, args.kinds, args.seed)
    if well and not args.keep:
        shutil.rmtree(place)
    return not well


if __name__ == "__main__":
    sys.exit(main())
