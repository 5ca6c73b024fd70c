"""What other tools read and call: diffusers' pipeline, TensorBoard, ADM's evaluator, and a user's own code."""
import ast
import importlib.util
import json
import math
import os
import runpy
import struct
import subprocess
import sys
import time
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

import common
import ct
from util import ROOT, SMALL, fill, run_script, torchrun

needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
# The network that diffusers' conversion calls `test`. The other two it knows are NETS["imagenet64"] and NETS["lsun256"].
TEST = ["--net", "glyphs", "image_size=32", "base=32", "mult=1,2", "blocks=2", "attention=16", "head_channels=8", "resblock_updown=true",
        "--precision", "fp32", "--device", "cpu"]
LABELS = [0, 5, 999, 3]
TIMES = common.karras_times(40)  # the levels of diffusers' scheduler for distilled models, which counts them from the top: its 22
TWO_STEPS = [80, TIMES[39 - 22].item()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Eight steps of that network, with 1000 labels; then six pictures of its checkpoint, in two steps."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    np.savez(folder / "data.npz", rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8), np.r_[np.arange(15), 999])
    run_script(*TEST, "--dataset", "data.npz", "--batch-size", 4, "--total-steps", 8, "--lr", 3e-3, "--ema-decay", 0.5, "--log-every", 0,
               "--sample-every", 0, "--out-dir", "run", cwd=folder, code=0)
    run_script("--ckpt", "run/last.pt", "--sample", 6, "--labels", *LABELS, "--sigmas", *TWO_STEPS, "--seed", 4, "--precision", "fp32",
               "--device", "cpu", "--save", "drawn.npz", cwd=folder, code=0)
    return folder


# ---- diffusers

def diffusers_unet(settings):
    """diffusers' UNet2DModel of our settings."""
    import diffusers
    names = ["Attn{}Block2D" if settings["image_size"] >> i in settings["attention"] else
             "Resnet{}sampleBlock2D" if settings["resblock_updown"] else "{}Block2D" for i in range(len(settings["mult"]))]
    resample = "resnet" if settings["resblock_updown"] else "conv"
    return diffusers.UNet2DModel(
        sample_size=settings["image_size"], block_out_channels=[settings["base"] * m for m in settings["mult"]],
        layers_per_block=settings["blocks"], attention_head_dim=settings["head_channels"], num_class_embeds=settings["classes"] or None,
        down_block_types=[name.format("Down") for name in names], up_block_types=[name.format("Up") for name in names[::-1]],
        resnet_time_scale_shift="scale_shift" if settings["scale_shift"] else "default", attn_norm_num_groups=32,
        downsample_type=resample, upsample_type=resample)


LAYERS = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
          "skip_connection": "conv_shortcut", "norm": "group_norm", "proj_out": "to_out.0", "op": "conv"}
PLACES = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "label_emb": "class_embedding",
          "input_blocks.0.0": "conv_in", "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
          "middle_block.2": "mid_block.resnets.1", "out.0": "conv_norm_out", "out.2": "conv_out"}


def to_diffusers(state, blocks):
    """Our weights under diffusers' names. A level has `blocks` entries and a resampler on the way down, one more on the way up."""
    places, renamed = dict(PLACES), {}
    for entry in {".".join(key.split(".")[:3]) for key in state if "put_blocks." in key} - places.keys():
        part, number, layer = entry.split(".")
        level, i = divmod(int(number) - (part == "input_blocks"), blocks + 1)
        kind = "attentions" if f"{entry}.qkv.weight" in state else "resnets"
        if part == "input_blocks":
            places[entry] = f"down_blocks.{level}." + ("downsamplers.0" if i == blocks else f"{kind}.{i}")
        else:
            places[entry] = f"up_blocks.{level}." + (f"{kind}.{i}" if layer == "0" or kind == "attentions" else "upsamplers.0")
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
    import diffusers
    unet = diffusers_unet(settings)
    unet.load_state_dict(to_diffusers(state, settings["blocks"]))
    return diffusers.ConsistencyModelPipeline(unet, diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40))


def drawn(pipe, generator, levels, labels, n):
    """(n,3,H,W) in [-1, 1], by diffusers alone."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(batch_size=n, class_labels=labels, num_inference_steps=None, timesteps=levels, generator=generator, output_type="pt").images * 2 - 1


UNETS = {
    "test": dict(image_size=32, base=32, mult=(1, 2), blocks=2, attention=(16,), head_channels=8, classes=1000),
    "like lsun256": dict(image_size=32, base=32, mult=(1, 1, 2), blocks=1, attention=(16, 8), head_channels=32, classes=0, scale_shift=False),
    "glyphs": common.NETS["glyphs"] | dict(classes=10),
}


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_draws_the_same_images(name):
    """One step and two from the same seed: its time scale, preconditioning, clipping and noise between levels are ours (CM Alg. 1)."""
    pytest.importorskip("diffusers")
    settings = dict(scale_shift=True, resblock_updown=True) | UNETS[name]
    net, size = fill(common.UNet(**settings)).requires_grad_(False).eval(), settings["image_size"]
    pipe = as_pipeline(net.state_dict(), settings)
    y = torch.arange(4) * 3 % settings["classes"] if settings["classes"] else None
    for levels, sigmas in ([0], [80]), ([22, 0], TWO_STEPS):
        generator = torch.Generator().manual_seed(0)
        ours = ct.sample(net, sigmas, y, lambda x: torch.randn(x.shape, generator=generator), (4, 3, size, size))  # noqa: B023
        theirs = drawn(pipe, torch.Generator().manual_seed(0), levels, y, 4)
        assert 0.1 < ours.std() and (ours.abs() == 1).float().mean() < 0.8
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


@pytest.fixture(scope="module", params=["by hand", "their script"])
def converted(request, trained, tmp_path_factory):
    """ema.pt as a pipeline: its weights renamed here; or by diffusers' own conversion, which is in its repository, not in the package."""
    diffusers = pytest.importorskip("diffusers")
    by_hand = as_pipeline(torch.load(trained / "run" / "ema.pt", weights_only=True), dict(scale_shift=True, resblock_updown=True) | UNETS["test"])
    if request.param == "by hand":
        return by_hand
    script, folder = os.environ.get("CONVERT_CONSISTENCY_TO_DIFFUSERS"), tmp_path_factory.mktemp("converted")
    if script is None:
        pytest.skip("CONVERT_CONSISTENCY_TO_DIFFUSERS does not name diffusers' scripts/convert_consistency_to_diffusers.py")
    (folder / "ct_test.pt").write_bytes((trained / "run" / "ema.pt").read_bytes())  # it goes by the name
    subprocess.run([sys.executable, "-c", f"import sys, runpy; sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest\n"
                    f"sys.argv[1:] = ['--unet_path', 'ct_test.pt', '--dump_path', 'pipe']; runpy.run_path({script!r}, run_name='__main__')"],
                   cwd=folder, check=True)
    theirs = diffusers.ConsistencyModelPipeline.from_pretrained(folder / "pipe", low_cpu_mem_usage=False)
    theirs_state, by_hand_state = theirs.unet.state_dict(), by_hand.unet.state_dict()
    assert theirs_state.keys() == by_hand_state.keys() and all(torch.equal(value, by_hand_state[key]) for key, value in theirs_state.items())
    return theirs


def test_ema_pt_in_diffusers(trained, converted):
    """The bytes that `--save` wrote are those of the pipeline, given a generator an image as `seeded_noise` has them."""
    keys = [np.random.SeedSequence((common.SAMPLE, 4, i)).generate_state(1, np.uint64)[0] >> 1 for i in range(6)]
    theirs = drawn(converted, [torch.Generator().manual_seed(int(key)) for key in keys], [22, 0], [*LABELS, *LABELS[:2]], 6)
    ours = np.load(trained / "drawn.npz")["arr_0"].astype(int)
    assert ours.std() > 10 and np.abs(common.to_uint8(theirs).numpy() - ours).max() <= 1


# ---- ADM's evaluator

def stream(path, batch):
    """The images of an .npz as ADM's evaluator takes them: from the open archive, in order, `batch` at a time."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        assert file.read(8) == b"\x93NUMPY\1\0"
        header = ast.literal_eval(file.read(*struct.unpack("<H", file.read(2))).decode())
        assert header["descr"] == "|u1" and header["fortran_order"] is False  # otherwise it does not stream
        n, *shape = header["shape"]
        for start in range(0, n, batch):
            yield np.frombuffer(file.read(min(batch, n - start) * math.prod(shape)), np.uint8).reshape(-1, *shape)
        assert file.read() == b""


def test_samples_are_read_as_adms_evaluator_reads_them(trained):
    batches = list(stream(trained / "drawn.npz", 4))
    assert [batch.shape for batch in batches] == [(4, 32, 32, 3), (2, 32, 32, 3)]
    net, _ = common.load_network(trained / "run" / "last.pt", ("ct",))
    y = torch.tensor([*LABELS, *LABELS[:2]])
    wanted = ct.sample(net, TWO_STEPS, y, common.seeded_noise(range(6), 4), (6, 3, 32, 32))
    wanted = (wanted.permute(0, 2, 3, 1).numpy() + 1) * 127.5
    assert np.abs(np.concatenate(batches) - wanted).max() <= 0.51  # the nearest byte
    with np.load(trained / "drawn.npz") as arrays:  # it takes "mu" and "sigma" for statistics, if they are there
        assert list(arrays) == ["arr_0", "arr_1"] and arrays["arr_1"].tolist() == y.tolist() and arrays["arr_1"].dtype == np.int64


# ---- TensorBoard

PLAIN = [*SMALL, "--dataset", "few.npz", "--batch-size", 4, "--micro-batch", 2, "--log-every", 1]


@pytest.fixture
def few(tmp_path):
    np.savez(tmp_path / "few.npz", np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8), np.array([0, 1, 1, 0]))
    return tmp_path


def events(folder):
    """What TensorBoard shows of a folder: {tag: {step: number}}, {tag: {step: picture}}; each step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    shown = EventAccumulator(str(folder), size_guidance=dict(scalars=0, images=0))
    shown.Reload()
    scalars = {tag: [(e.step, e.value) for e in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}
    images = {tag: [(e.step, np.asarray(Image.open(BytesIO(e.encoded_image_string)))) for e in shown.Images(tag)]
              for tag in shown.Tags()["images"]}
    for points in (*scalars.values(), *images.values()):
        assert len(dict(points)) == len(points), [step for step, _ in points]
    return *({tag: dict(points) for tag, points in part.items()} for part in (scalars, images)),


def assert_shown(out_dir, grids):
    """TensorBoard shows every number of log.jsonl and the `grids` of samples/, {step: file}, and nothing else."""
    wanted = {}
    for line in (out_dir / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        for key, value in record.items():
            for tag, number in [(f"{key}/{i}", part) for i, part in enumerate(value)] if isinstance(value, list) else [(key, value)]:
                if number is not None:
                    wanted.setdefault(tag, {})[step] = number
    scalars, images = events(out_dir / "tensorboard")
    assert {"loss", "grad_norm", "lr", "images_per_s"} <= wanted.keys() and any(tag.startswith("loss_bins/") for tag in wanted)
    assert scalars.keys() == wanted.keys()
    for tag, points in wanted.items():
        assert scalars[tag].keys() == points.keys(), tag
        np.testing.assert_allclose([scalars[tag][step] for step in points], list(points.values()), rtol=1e-6)
    assert images.keys() == {"samples"} and images["samples"].keys() == grids.keys()
    for step, name in grids.items():
        assert np.array_equal(images["samples"][step], np.asarray(Image.open(out_dir / "samples" / name)))


@needs_tensorboard
def test_a_killed_run_goes_on_in_tensorboard(tmp_path, monkeypatch):
    """Its events are in the file at once; resumed from step 4, what it wrote after is shown no more. What is not finite is left out."""
    from tensorboard.summary.writer.record_writer import RecordWriter
    write_record = RecordWriter.write  # by a thread of its own, which is late here
    monkeypatch.setattr(RecordWriter, "write", lambda self, data: (time.sleep(0.02), write_record(self, data)))
    (tmp_path / "samples").mkdir()
    rng = np.random.default_rng(0)

    def write(log, step):
        log.write(dict(step=step, loss=rng.random(), loss_bins=[rng.random(), math.nan], grad_norm=math.inf if step == 2 else 1.5, mu=None,
                       lr=1e-3, images_per_s=9))
        if step % 2:
            log.grid(step, [rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)] * 2, 2, "_x" * (step == 3))
    grids = {1: "000001.png", 3: "000003_x.png", 5: "000005.png"}
    log = common.Log(tmp_path / "log.jsonl", 0, tensorboard=True)
    for step in range(1, 7):
        write(log, step)
        assert_shown(tmp_path, {k: name for k, name in grids.items() if k <= step})
    log = common.Log(tmp_path / "log.jsonl", 4, tensorboard=True)
    write(log, 5)
    assert_shown(tmp_path, grids)


SAY_CLOSED = """
from torch.utils.tensorboard import SummaryWriter
close = SummaryWriter.close
SummaryWriter.close = lambda self: (close(self), print("events closed"))
"""


@needs_tensorboard
def test_tensorboard_of_ct(few):
    """Two processes; then the same without the flag, which is free to change; then anew."""
    folder, flags = few / "run" / "tensorboard", [*PLAIN, "--out-dir", "run"]
    run_script(*flags, "--total-steps", 3, "--sample-every", 2, "--tensorboard", launcher=torchrun(2), cwd=few, code=0)
    assert_shown(few / "run", {2: "000002.png", 3: "000003.png"})
    assert len(list(folder.iterdir())) == 1  # rank 0 alone writes
    run_script(*flags, "--total-steps", 3, cwd=few, code=0)
    done = run_script(*flags, "--total-steps", 1, "--overwrite", "--tensorboard", prelude=SAY_CLOSED, cwd=few, code=0)
    assert done.stdout.splitlines()[-1] == "events closed" and len(list(folder.iterdir())) == 1
    assert_shown(few / "run", {1: "000001.png"})


SCRIPTS = {
    "cd.py": (["--teacher-steps", 1, "--total-steps", 2, "--N", 3], {"teacher": {1: "000001.png"}, ".": {2: "000002.png"}}),
    "ctm.py": (["--teacher", "none", "--total-steps", 2], {".": {2: "000002.png"}}),
    "guided_distill.py": (["--teacher", "ideal", "--w-max", 0, "--start-N", 2, "--stage1-steps", 1, "--round-steps", 1, "--last-steps", 1],
                          {".": {1: "000001_stage1.png", 2: "000002_N0001.png"}}),
}


@needs_tensorboard
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_writes_for_tensorboard(few, script):
    flags, folders = SCRIPTS[script]
    run_script(*PLAIN, *flags, "--tensorboard", "--out-dir", "run", script=script, cwd=few, code=0)
    for folder, grids in folders.items():
        assert_shown(few / "run" / folder, grids)


def test_tensorboard_is_missing(tmp_path):
    (tmp_path / "tensorboard.py").write_text("raise ModuleNotFoundError(\"No module named 'tensorboard'\")")
    done = run_script("--tensorboard", "--out-dir", "run", cwd=tmp_path, code=2, env=dict(PYTHONPATH=str(tmp_path)))
    line, = done.stderr.splitlines()
    assert line.startswith("ct.py: error: --tensorboard needs") and "pip install tensorboard" in line
    assert not (tmp_path / "run").exists()


# ---- a user's own code

def test_the_readmes_own_code_runs(tmp_path, monkeypatch):
    """The block of the section, as it stands: it trains a step of a network of its own, and draws with it."""
    section = (ROOT / "README.md").read_text().split("\n## Use it in your own code\n")[1].split("\n## ")[0]
    code = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    ") or not line).strip()
    assert sum(bool(line) for line in code.splitlines()) == 10
    (tmp_path / "own.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path("own.py")
    net, x0, loss, images = (names[name] for name in ("net", "x0", "loss", "images"))
    assert isinstance(net, torch.nn.Module) and not isinstance(net, common.UNet)
    assert loss.shape == (len(x0),) and (loss > 0).all()
    assert all(p.grad.abs().sum() > 0 and names["optimizer"].state[p]["step"] == 1 for p in net.parameters())
    assert images.shape[1:] == x0.shape[1:] and images.abs().max() <= 1 and images.std() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["own.py"]


def test_importing_the_scripts_changes_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", f"""
import os, random, signal, sys, warnings
import numpy as np, torch, torch.distributed
sys.path.insert(0, {str(ROOT)!r})
def state():
    return (sys.excepthook, [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], sys.argv[:], dict(os.environ), os.listdir(),
            random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.initial_seed(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32,
            torch.distributed.is_initialized(), warnings.filters[:])
before = state()
import ct, cd, ctm, guided_distill
assert state() == before
"""], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
