"""What others read and call: diffusers, TensorBoard, ADM's evaluator, a user's own code."""
import ast
import importlib.util
import inspect
import json
import math
import re
import runpy
import struct
import subprocess
import sys
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import common
import ct
from util import ROOT, SMALL, fill, run_script

needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None,
                                       reason="tensorboard is not installed")
LABELS = [0, 5, 999, 3]
TWO_STEPS = [80, common.karras_times(40)[39 - 22].item()]  # diffusers' 22 counts from the largest


# ---- diffusers

SETTINGS = {  # "test" is what diffusers' conversion calls so; it knows imagenet64 and lsun256 too
    "test": dict(image_size=32, base=32, mult=(1, 2), blocks=2, attention=(16,), head_channels=8,
                 classes=1000),
    "like lsun256": dict(image_size=32, base=32, mult=(1, 1, 2), blocks=1, attention=(16, 8),
                         head_channels=32, classes=0, scale_shift=False),
    "glyphs": common.NETS["glyphs"] | dict(classes=10),
}


def diffusers_unet(settings):
    """diffusers' UNet2DModel of our settings."""
    import diffusers
    resample, plain = ("resnet", "Resnet{}sampleBlock2D")
    if not settings.get("resblock_updown", True):
        resample, plain = ("conv", "{}Block2D")
    sides = [settings["image_size"] >> i for i in range(len(settings["mult"]))]
    names = ["Attn{}Block2D" if side in settings["attention"] else plain for side in sides]
    return diffusers.UNet2DModel(
        sample_size=settings["image_size"], layers_per_block=settings["blocks"],
        block_out_channels=[settings["base"] * m for m in settings["mult"]],
        attention_head_dim=settings["head_channels"], num_class_embeds=settings["classes"] or None,
        down_block_types=[name.format("Down") for name in names],
        up_block_types=[name.format("Up") for name in names[::-1]],
        resnet_time_scale_shift="scale_shift" if settings.get("scale_shift", True) else "default",
        attn_norm_num_groups=32, downsample_type=resample, upsample_type=resample)


LAYERS = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
          "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
          "norm": "group_norm", "proj_out": "to_out.0", "op": "conv"}
PLACES = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
          "label_emb": "class_embedding", "input_blocks.0.0": "conv_in",
          "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
          "middle_block.2": "mid_block.resnets.1", "out.0": "conv_norm_out", "out.2": "conv_out"}


def to_diffusers(state, blocks):
    """By diffusers' names: a level has `blocks` entries and a resampler down, one more up."""
    places, renamed = dict(PLACES), {}
    entries = {".".join(key.split(".")[:3]) for key in state if "put_blocks." in key}
    for entry in entries - places.keys():
        part, number, layer = entry.split(".")
        level, i = divmod(int(number) - (part == "input_blocks"), blocks + 1)
        kind = "attentions" if f"{entry}.qkv.weight" in state else "resnets"
        within = f"{kind}.{i}"
        if part == "input_blocks" and i == blocks:
            within = "downsamplers.0"
        if part == "output_blocks" and layer != "0" and kind == "resnets":
            within = "upsamplers.0"
        places[entry] = f"{'down' if part == 'input_blocks' else 'up'}_blocks.{level}.{within}"
    for key, value in state.items():
        entry = next(entry for entry in places if key.startswith(entry + "."))
        name, _, kind = key.removeprefix(entry + ".").rpartition(".")
        if name in ("qkv", "proj_out") and kind == "weight":
            value = value.flatten(1)  # a 1x1 convolution is a matrix
        names = ["to_q", "to_k", "to_v"] if name == "qkv" else [LAYERS.get(name, name)]
        for new, part in zip(names, value.chunk(len(names)), strict=True):
            renamed[".".join(filter(None, (places[entry], new, kind)))] = part
    return renamed


def as_pipeline(state, settings):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers_unet(settings)
    unet.load_state_dict(to_diffusers(state, settings["blocks"]))
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40)
    pipe = diffusers.ConsistencyModelPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, generator, levels, labels, n):
    """(n,3,H,W) in [-1, 1], by diffusers alone."""
    return pipe(batch_size=n, class_labels=labels, num_inference_steps=None, timesteps=levels,
                generator=generator, output_type="pt").images * 2 - 1


@pytest.mark.parametrize("name", SETTINGS)
def test_diffusers_draws_the_same_images(name):
    """Its time scale, preconditioning, clipping, and noise between levels are ours (CM Alg. 1)."""
    settings = SETTINGS[name]
    net, size = fill(common.UNet(**settings)).requires_grad_(False).eval(), settings["image_size"]
    pipe, classes = as_pipeline(net.state_dict(), settings), settings["classes"]
    y = torch.arange(4) * 3 % classes if classes else None
    for levels, sigmas in ([0], [80]), ([22, 0], TWO_STEPS):
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]

        def noise(x, generator=generators[0]):
            return torch.randn(x.shape, generator=generator)
        ours = ct.sample(net, sigmas, y, noise, (4, 3, size, size))
        assert 0.1 < ours.std() and (ours.abs() == 1).float().mean() < 0.8
        theirs = drawn(pipe, generators[1], levels, y, 4)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Eight steps of the first network; then six pictures of its checkpoint, in two steps."""
    folder = tmp_path_factory.mktemp("trained")
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "data.npz", images, np.r_[np.arange(15), 999])
    words = "image_size=32 mult=1,2 blocks=2 attention=16 head_channels=8 resblock_updown=true"
    machine = ("--precision", "fp32", "--device", "cpu")
    run_script("--net", "glyphs", *words.split(), *machine, "--dataset", "data.npz", "--lr", 3e-3,
               "--batch-size", 4, "--total-steps", 8, "--ema-decay", 0.5, "--log-every", 0,
               "--sample-every", 0, "--out-dir", "run", cwd=folder, code=0)
    run_script("--ckpt", "run/last.pt", "--sample", 6, "--labels", *LABELS, "--sigmas", *TWO_STEPS,
               "--seed", 4, *machine, "--save", "drawn.npz", cwd=folder, code=0)
    return folder


def test_ema_pt_in_diffusers(trained):
    """Given a generator an image as SeededNoise has them, it draws the bytes that --save wrote."""
    state = torch.load(trained / "run" / "ema.pt", weights_only=True)
    pipe = as_pipeline(state, SETTINGS["test"])
    generators = common.SeededNoise(torch.arange(6), 4).generators
    theirs = drawn(pipe, generators, [22, 0], [*LABELS, *LABELS[:2]], 6)
    ours = np.load(trained / "drawn.npz")["arr_0"].astype(int)
    assert ours.std() > 10 and np.abs(common.to_uint8(theirs).numpy() - ours).max() <= 1


# ---- ADM's evaluator

def stream(path, batch):
    """The images of an .npz as ADM's evaluator takes them: in order, `batch` at a time."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        assert file.read(8) == b"\x93NUMPY\1\0"
        header = ast.literal_eval(file.read(*struct.unpack("<H", file.read(2))).decode())
        assert header["descr"] == "|u1" and header["fortran_order"] is False  # or it cannot stream
        n, *shape = header["shape"]
        for start in range(0, n, batch):
            content = file.read(min(batch, n - start) * math.prod(shape))
            yield np.frombuffer(content, np.uint8).reshape(-1, *shape)
        assert file.read() == b""


def test_samples_are_read_as_adms_evaluator_reads_them(trained):
    batches = list(stream(trained / "drawn.npz", 4))
    assert [batch.shape for batch in batches] == [(4, 32, 32, 3), (2, 32, 32, 3)]
    net, _ = common.load_network(trained / "run" / "last.pt", ("ct",))
    y, noise = torch.tensor([*LABELS, *LABELS[:2]]), common.SeededNoise(torch.arange(6), 4)
    wanted = ct.sample(net, TWO_STEPS, y, noise, (6, 3, 32, 32))
    wanted = (wanted.permute(0, 2, 3, 1).numpy() + 1) * 127.5
    assert np.abs(np.concatenate(batches) - wanted).max() <= 0.51  # the nearest byte
    with np.load(trained / "drawn.npz") as arrays:  # "mu" and "sigma" it takes for statistics
        assert list(arrays) == ["arr_0", "arr_1"] and arrays["arr_1"].tolist() == y.tolist()
        assert arrays["arr_1"].dtype == np.int64


# ---- TensorBoard

@pytest.fixture
def few(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", images, np.array([0, 1, 1, 0]))
    return tmp_path


def assert_shown(out_dir, grids):
    """TensorBoard shows all numbers of log.jsonl, the `grids` {step: file}, and nothing else."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    shown = EventAccumulator(str(out_dir / "tensorboard"), dict(scalars=0, images=0))
    shown.Reload()
    wanted = {}
    for line in (out_dir / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        for key, value in record.items():
            parts = {key: value}
            if isinstance(value, list):
                parts = {f"{key}/{i}": part for i, part in enumerate(value)}
            for tag, number in parts.items():
                if number is not None:
                    wanted.setdefault(tag, []).append((step, np.float32(number)))
    assert {"loss", "grad_norm", "lr", "images_per_s"} <= wanted.keys()
    assert any(tag.startswith("loss_bins/") for tag in wanted)
    tags = shown.Tags()
    assert set(tags["scalars"]) == wanted.keys() and tags["images"] == ["samples"]
    for tag, points in wanted.items():
        assert [(event.step, event.value) for event in shown.Scalars(tag)] == points, tag
    pictures = shown.Images("samples")
    assert [event.step for event in pictures] == sorted(grids)
    for event in pictures:
        picture = np.asarray(Image.open(BytesIO(event.encoded_image_string)))
        saved = np.asarray(Image.open(out_dir / "samples" / grids[event.step]))
        assert np.array_equal(picture, saved)


@needs_tensorboard
def test_a_run_in_tensorboard(few):
    """Twice: what was written before is not shown again. The flag of before says where it went."""
    flags = [*SMALL, "--dataset", "few.npz", "--batch-size", 4, "--log-every", 1, "--sample-every",
             2, "--total-steps", 3, "--out-dir", "run"]
    done = run_script("--tensorboard", cwd=few, code=2)
    assert "did you mean python tests/bench.py tensorboard" in done.stderr
    run_script(*flags, cwd=few, code=0)
    for _ in range(2):
        run_script("tensorboard", "run", script="tests/bench.py", cwd=few, code=0)
        assert_shown(few / "run", {2: "000002.png", 3: "000003.png"})
    done = run_script("tensorboard", "none", script="tests/bench.py", cwd=few, code=2)
    missing = "No such file or directory: none/log.jsonl"
    assert done.stderr == f"bench.py: error: none holds no run: {missing}\n"


# ---- a user's own code

def test_the_readme_shows_the_loss_as_it_stands():
    assert inspect.getsource(ct.loss_fn) in (ROOT / "README.md").read_text()


def test_the_readmes_own_code_runs(tmp_path, monkeypatch):
    """As it stands: it trains a step of a network of its own, and draws with it."""
    readme = (ROOT / "README.md").read_text()
    section = readme.split("\n## Use it in your own code\n")[1].split("\n## ")[0]
    fenced = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    lines = fenced[1].splitlines() if fenced else [
        line[4:] for line in section.splitlines() if line.startswith("    ") or not line]
    assert sum(bool(line) for line in lines) == 10
    (tmp_path / "own.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path("own.py")
    net, x0, loss, images = (names[name] for name in ("net", "x0", "loss", "images"))
    assert isinstance(net, torch.nn.Module) and not isinstance(net, common.UNet)
    assert loss.shape == (len(x0),) and (loss > 0).all()
    for p in net.parameters():
        assert p.grad.abs().sum() > 0 and names["optimizer"].state[p]["step"] == 1
    assert images.shape[1:] == x0.shape[1:] and images.abs().max() <= 1 and images.std() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["own.py"]


def test_importing_the_scripts_changes_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", f"""
import os, random, signal, sys, warnings
import numpy as np, torch, torch.distributed
sys.path.insert(0, {str(ROOT)!r})
def state():
    backend, numbers = torch.backends.cudnn, (signal.SIGINT, signal.SIGTERM)
    return (sys.excepthook, [signal.getsignal(n) for n in numbers], sys.argv[:], dict(os.environ),
            os.listdir(), random.getstate(), np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(), torch.initial_seed(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.is_grad_enabled(), backend.benchmark,
            backend.allow_tf32, torch.distributed.is_initialized(), warnings.filters[:])
before = state()
import ct, cd, ctm, guided_distill
assert state() == before
"""], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
