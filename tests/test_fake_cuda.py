"""The scripts, unmodified, on fake CUDA tensors: every operand on the right device, and within a
micro-batch nothing but the batch itself moves between the devices."""
import argparse
import contextlib
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import common  # noqa: E402
import fake_cuda  # noqa: E402

NET = "--net glyphs base=32 mult=1,1 blocks=1 attention=8".split()
DATA = "--dataset data.npz --flip".split()
LOOP = "--batch-size 2 --micro-batch 2 --log-every 1 --save-every 0 --overwrite".split()
ON_CUDA = "--device cuda --no-compile".split()
ROUNDS = [*DATA, *LOOP, *ON_CUDA, "--sample-every", "0"]
TRAIN = [*ROUNDS, "--total-steps", "1"]
TEACHER = "--teacher teacher/last.pt".split()
SHORT = "--start-N 4 --end-N 2 --stage1-steps 1 --round-steps 1 --last-steps 1".split()


def case(script, *flags):
    """A command, under a name without what all have."""
    name = " ".join([script, *(flag for flag in flags if flag not in (*TRAIN, *NET, *ON_CUDA))])
    return pytest.param([f"{script}.py", *flags], id=name)


ONE_STEP = "--N", "3", "--max-steps", "1"
TURNS = "--total-steps", "2", "--disc-start", "0"  # the generator's, and the critic's
TRAININGS = [
    case("ct", *TRAIN, *NET, "--dropout", "0.1", "--dropout-size", "8"),
    case("ct", *TRAIN, *NET, "--precision", "tf32"),
    case("ct", *TRAIN, *NET, "--recipe", "ct"),
    case("ct", *TRAIN, "--recipe", "ect", *TEACHER),
    case("cd", *TRAIN, *NET, "--stage", "teacher", "--label-dropout", "0.1"),
    case("cd", *TRAIN, *TEACHER, "--w-max", "2", "--mu", "0.9", "--dropout", "0.1"),
    case("cd", *TRAIN, *TEACHER, "--objective", "scm", "--lr-decay", "1"),
    case("cd", *TRAIN, *TEACHER, "--objective", "continuous", "--no-stop-gradient"),
    case("cd", *TRAIN, *NET, "--teacher", "ideal"),
    case("ctm", *TRAIN, *ONE_STEP, *NET, "--teacher", "none", "--disc", "conv", *TURNS),
    case("ctm", *TRAIN, *ONE_STEP, *TEACHER, "--dist", "lpips", "--disc", "projected",
         *TURNS),
    case("guided_distill", *ROUNDS, *TEACHER, *SHORT),
    case("guided_distill", *LOOP, *ON_CUDA, *SHORT, *"--sample-every 0 --teacher diffusers:pipe "
         "--dataset latents.npz --gradient-checkpointing".split()),
    case("guided_distill", *LOOP, *ON_CUDA, *"--stage teacher --total-steps 1 --sample-every 0 "
         "--teacher diffusers:pipe --dataset latents.npz".split()),
]
DRAW = [*ON_CUDA, "--save", "drawn.png", "--sample", "2"]
EDIT = [*DRAW, "--sigmas", "80", "1", "--edit"]
LARGE = [*DATA, *"--total-steps 1 --save-every 0 --sample-every 0 --overwrite".split(), *ON_CUDA,
         *"--net glyphs base=64 mult=1,2 attention=8".split()]
SIZES = {  # two micro-batches of each
    ("ct.py", *LARGE): ("64", "128"),
    ("ct.py", *LARGE, "--dropout", "0.3"): ("64", "128"),
    ("ct.py", *LARGE, "--dropout", "0.3", "--dropout-size", "8"): ("64", "128"),
    ("ct.py", *LARGE, "--precision", "tf32"): ("64", "128"),
    ("ctm.py", *LARGE, "--teacher", "none", *ONE_STEP): ("64", "128"),
}
MEMORY = list(SIZES)
CHECKPOINTED = "ct.py", *LARGE, "--gradient-checkpointing"
SIZES[CHECKPOINTED] = "512", "1024"  # in small ones weights count more
USES = [
    case("cd", *DRAW, "--ckpt", "cd/last.pt", "--sigmas", "80", "1"),
    case("cd", *DRAW, "--ckpt", "teacher/last.pt", "--w", "1", "--N", "3", "--churn", "40"),
    case("cd", *EDIT, "inpaint", "--ckpt", "cd/last.pt", "--image", "x.png", "--labels", "1"),
    case("cd", *EDIT, "colorize", "--ckpt", "cd/last.pt", "--image", "x.png", "--labels", "1"),
    case("cd", *EDIT, "superres", "--ckpt", "cd/last.pt", "--image", "x.png", "--labels", "1"),
    case("cd", *EDIT, "denoise", "--ckpt", "cd/last.pt", "--image", "x.png", "--labels", "1"),
    case("cd", *EDIT, "interpolate", "--ckpt", "cd/last.pt"),
    case("ctm", *DRAW, "--ckpt", "ctm/last.pt", "--steps", "2", "--gamma", "0.5"),
    case("ctm", *DRAW, "--ckpt", "ctm/last.pt", "--heun", "3"),
    case("ctm", *EDIT, "stroke", "--ckpt", "ctm/last.pt", "--image", "x.png", "--labels", "1"),
    case("guided_distill", *DRAW, "--ckpt", "guided/N0002.pt"),
    case("guided_distill", *DRAW, "--edit", "img2img", "--ckpt", "guided/N0002.pt", "--image",
         "x.png", "--labels", "1"),
]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What happened in each case: {command: ...}. In a process of its own, for the guard."""
    reason = fake_cuda.why_not()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("fake_cuda")
    done = subprocess.run([sys.executable, __file__], cwd=folder, text=True, capture_output=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return {tuple(command): result for command, result in lines}


@pytest.mark.parametrize("command", TRAININGS)
def test_a_training_step_stays_on_the_device(seen, command):
    """The batch is copied to it, two tensors a micro-batch, of latents three, and nothing else,
    either way."""
    result = seen[tuple(command)]
    assert result["error"] is None, result["error"]
    rounds = command[0] == "guided_distill.py" and "--stage" not in command
    micro_batches = 1 + ("--disc" in command) + rounds
    tensors = 3 if "diffusers:pipe" in command else 2
    assert len(result["inside"]) == tensors * micro_batches, result["inside"]
    assert {operation for operation, _ in result["inside"]} == {"_to_copy"}
    assert result["peak"] > 1e6


@pytest.mark.parametrize("command", USES)
def test_sampling_and_editing_run_on_the_device(seen, command):
    result = seen[tuple(command)]
    assert result["error"] is None, result["error"]
    assert result["peak"] > 1e6


def bytes_found(seen, command):
    """What an image adds to the peak, by two micro-batches."""
    sizes = SIZES[command]
    first, second = (seen[(*command, "--batch-size", size, "--micro-batch", size)]
                     for size in sizes)
    assert first["error"] is second["error"] is None, first["error"] or second["error"]
    return (second["peak"] - first["peak"]) / (int(sizes[1]) - int(sizes[0]))


@pytest.mark.parametrize("command", MEMORY)
def test_memory_is_as_the_model_says(seen, command):
    """To 25%: common.bytes_an_image, whose constants are those of larger nets. CTM with a third
    graph alive, that of the denoising loss, would take half as much again."""
    script = command[0].removesuffix(".py")
    settings = common.net_settings("glyphs base=64 mult=1,2 attention=8".split())
    net = common.UNet(**settings, dropout=0.3 * ("--dropout" in command),
                      dropout_size=8 * ("--dropout-size" in command))
    dtype = torch.float32 if "tf32" in command else torch.bfloat16
    run = types.SimpleNamespace(compile=False, dtype=dtype, checkpointing=False)
    model = common.bytes_an_image(argparse.Namespace(dist="huber"), run, script, net)
    found = bytes_found(seen, command)
    assert abs(model / found - 1) < 0.25, (model, found)


def test_gradient_checkpointing_takes_less_memory(seen):
    assert bytes_found(seen, CHECKPOINTED) < 0.4 * bytes_found(seen, MEMORY[0])


# ---- what the one process does that runs them all

def prepare(folder):
    """Data and checkpoints, made on the CPU."""
    import test_guided_scripts
    from PIL import Image
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 16, 16, 3), np.uint8)
    np.savez(folder / "data.npz", images, np.arange(8) % 2)
    Image.fromarray(images[0]).save(folder / "x.png")
    test_guided_scripts.pipeline(folder)
    start = [*DATA, *LOOP, "--device", "cpu", "--sample-every", "0", "--out-dir"]
    one = "--total-steps", "1"
    teacher = "--stage", "teacher", "--label-dropout", "0.1"
    fake_cuda.run(["cd.py", *start, "teacher", *one, *NET, *teacher])
    fake_cuda.run(["cd.py", *start, "cd", *one, *TEACHER])
    fake_cuda.run(["ctm.py", *start, "ctm", *one, *TEACHER])
    fake_cuda.run(["guided_distill.py", *start, "guided", *TEACHER, *SHORT])


if __name__ == "__main__":
    import conftest  # noqa: F401
    with contextlib.redirect_stdout(sys.stderr):
        fake_cuda.load_guard()
        prepare(Path.cwd())
    commands = [parameters.values[0] for parameters in (*TRAININGS, *USES)]
    commands += [[*command, "--batch-size", size, "--micro-batch", size]
                 for command, sizes in SIZES.items() for size in sizes]
    for command in commands:
        with contextlib.redirect_stdout(sys.stderr):
            seen = fake_cuda.watch(command)
        print(json.dumps([command, seen]), flush=True)
