"""Released weights load by their names and shapes, OpenAI's and NVIDIA's, and are at once usable;
files that hold code are refused."""
import math
import os
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
from util import SMALL, TINY, VECTORS, assert_mistake, close, last, run_script

SHAPES = VECTORS["shapes"]
SMALL_NVIDIA = dict(image_size=8, base=128, mult=(1, 1), blocks=1, attention=(4,), head_channels=64)
STAND_INS = dict(imagenet64=TINY, lsun256=SMALL_NVIDIA)  # under the names of the released networks
SHRUNK = f"common.NETS.update({STAND_INS})"


def random_weights(shapes, seed=0, cheap=False):
    """Random tensors of these shapes, none zero. `cheap`: a number a row, in memory and on disk."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        columns = (1,) * (len(shape) - 1) if cheap else shape[1:]
        values = torch.randn(shape[0], *columns, generator=generator)
        if len(shape) > 1:
            state[name] = (values / math.prod(shape[1:]) ** 0.5).expand(shape)
        else:
            state[name] = 0.1 * values + name.endswith("weight")
    return state


# ---- OpenAI's files: plain state dicts

@pytest.fixture
def shrunk(monkeypatch):
    for name, settings in STAND_INS.items():
        monkeypatch.setitem(common.NETS, name, settings)


def assert_loads(folder, state, expected, model_args):
    """Saved, it is loaded: in float32, ready to sample or teach with, and knowing its settings."""
    torch.save(state, folder / "weights.pt")
    net, trained = common.load_network(folder / "weights.pt", ("cd", "ct"))
    assert net.state_dict().keys() == expected.keys()
    for name, value in net.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name].float()), name
    assert not any(module.training for module in net.modules())
    assert not any(p.requires_grad for p in net.parameters())
    assert trained == dict(script=None, args={}, model_args=model_args)
    assert (net.time_scale, net.null_y) == (model_args.get("time_scale", 1), None)
    assert net.classes == model_args.get("classes", 0) and not net.cond
    return net


def assert_fits_none(folder, state):
    """Saved, it is refused in one line, without a warning."""
    torch.save(state, folder / "weights.pt")
    with pytest.raises(common.UserError) as error, warnings.catch_warnings(action="error"):
        common.load_network(folder / "weights.pt", ("cd", "ct"))
    assert str(error.value).startswith(f"{folder / 'weights.pt'}: these weights fit none of")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key, labels", [("imagenet64", dict(classes=1000)), ("lsun256", {})])
def test_key_sets_load_strictly(tmp_path, key, labels):
    state = random_weights(SHAPES[key], cheap=True)
    net = assert_loads(tmp_path, state, state, common.NETS[key] | labels)
    assert sum(p.numel() for p in net.parameters()) == VECTORS["param_counts"][key]


@pytest.mark.parametrize("dtype, old", [
    (torch.float32, False), (torch.float16, False), (torch.bfloat16, True)])
def test_weights_become_float32(shrunk, tmp_path, dtype, old):
    """Of any dtype, written by any version of torch."""
    state = random_weights(SHAPES["unet_A_tiny"])
    state = {name: value.to(dtype) for name, value in state.items()}
    if old:
        torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        net, _ = common.load_network(tmp_path / "old.pt", ("cd",))
        assert torch.equal(net.out[2].bias, state["out.2.bias"].float())
    assert_loads(tmp_path, state, state, TINY | dict(classes=10))


def without(state, *words):
    return {name: value for name, value in state.items() if not any(word in name for word in words)}


def renamed(state, old, new):
    return {name.replace(old, new): value for name, value in state.items()}


def squeezed(state):
    return {name: value.squeeze(-1) if ".qkv." in name or ".proj_out." in name else value
            for name, value in state.items()}


WEIGHTS = random_weights(SHAPES["unet_A_tiny"])
WRONG = {
    "missing": without(WEIGHTS, "middle_block.1.qkv.bias"),
    "one more": WEIGHTS | {"input_blocks.3.2.weight": torch.zeros(3)},
    "renamed": renamed(WEIGHTS, "out.2.bias", "out.3.bias"),
    "wrong shape": WEIGHTS | {"time_embed.0.weight": WEIGHTS["time_embed.0.weight"][:, :-1]},
    "one class, no axis": WEIGHTS | {"label_emb.weight": torch.tensor(1.0)},
    "guided-diffusion's Conv1d": squeezed(WEIGHTS),  # ADM's own qkv channels have another order
    "numbered": WEIGHTS | {0: torch.zeros(3)},
    "wrapped": dict(model=WEIGHTS),
    "empty": {},
    "NVIDIA's name": WEIGHTS | {"map_layer0.weight": torch.zeros(3)},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_other_key_sets_are_refused(shrunk, tmp_path, wrong):
    assert_fits_none(tmp_path, WRONG[wrong])


def test_a_list_of_weights_is_refused(tmp_path):
    torch.save(list(WEIGHTS.values()), tmp_path / "weights.pt")
    with pytest.raises(common.UserError, match="weights.pt holds a list, not a checkpoint"):
        common.load_network(tmp_path / "weights.pt", ("cd", "ct"))


# ---- NVIDIA's files: the ADM network under other names, other numbers, written a second time

def nvidia_blocks(settings):
    """Name, widths in and out, resampling and attention of the blocks, in construction's order."""
    base, mult, last = settings["base"], settings["mult"], len(settings["mult"]) - 1
    width, skips, rows = base * mult[0], [base * mult[0]], []

    def block(level, name, c_in, c_out, resample=None, attends=None):
        side = settings["image_size"] // 2**level
        attends = side in settings["attention"] if attends is None else attends
        rows.append((name.format(f"{side}x{side}"), c_in, c_out, resample, attends))

    for level in range(last + 1):
        if level:
            block(level, "enc.{}_down", width, width, "down", False)
            skips.append(width)
        for i in range(settings["blocks"]):
            block(level, f"enc.{{}}_block{i}", width, base * mult[level])
            width = base * mult[level]
            skips.append(width)
    block(last, "dec.{}_in0", width, width, attends=True)
    block(last, "dec.{}_in1", width, width, attends=False)
    for level in range(last, -1, -1):
        if level < last:
            block(level, "dec.{}_up", width, width, "up", False)
        for i in range(settings["blocks"] + 1):
            block(level, f"dec.{{}}_block{i}", width + skips.pop(), base * mult[level])
            width = base * mult[level]
    return rows


def nvidia_shapes(settings, classes=0, augment=0):
    base, side, shapes = settings["base"], settings["image_size"], {}

    def layer(name, *shape, bias=True):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    if augment:
        layer("map_augment", base, augment, bias=False)
    layer("map_layer0", 4 * base, base)
    layer("map_layer1", 4 * base, 4 * base)
    if classes:
        layer("map_label", 4 * base, classes, bias=False)
    layer(f"enc.{side}x{side}_conv", base * settings["mult"][0], 3, 3, 3)
    for name, c_in, c_out, resample, attends in nvidia_blocks(settings):
        layer(f"{name}.norm0", c_in)
        layer(f"{name}.conv0", c_out, c_in, 3, 3)
        layer(f"{name}.affine", 2 * c_out, 4 * base)
        layer(f"{name}.norm1", c_out)
        layer(f"{name}.conv1", c_out, c_out, 3, 3)
        if c_in != c_out:
            layer(f"{name}.skip", c_out, c_in, 1, 1)
        for part in ("conv0", "skip") if resample else ():
            shapes[f"{name}.{part}.resample_filter"] = (1, 1, 2, 2)
        if attends:
            layer(f"{name}.norm2", c_out)
            layer(f"{name}.qkv", 3 * c_out, c_out, 1, 1)
            layer(f"{name}.proj", c_out, c_out, 1, 1)
    layer("out_norm", c_out)
    layer("out_conv", 3, c_out, 3, 3)
    return shapes


def nvidia_weights(settings, classes=0, augment=0, prefix="model.", **more):
    state = random_weights(nvidia_shapes(settings, classes, augment), **more)
    box = torch.full((1, 1, 2, 2), 0.25)
    return {prefix + name: box if "resample" in name else value for name, value in state.items()}


def nvidia_net(state, settings, x, c_noise, y=None):
    """F(x, ln(t)/4, label) of a DhariwalUNet, from its state dict."""
    state = renamed(state, "model.", "")

    def conv(name, h, resample=None):
        if resample:
            kernel = state[f"{name}.resample_filter"].expand(h.shape[1], 1, 2, 2)
            settings = dict(stride=2, groups=h.shape[1])
            h = (F.conv2d(h, kernel, **settings) if resample == "down" else
                 F.conv_transpose2d(h, 4 * kernel, **settings))
        weight = state.get(f"{name}.weight")
        if weight is None:
            return h
        return F.conv2d(h, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name, h):
        groups = min(32, h.shape[1] // 4)
        return F.group_norm(h, groups, state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(name, h):
        return F.linear(h, state[f"{name}.weight"], state.get(f"{name}.bias"))

    half = settings["base"] // 2
    angles = c_noise[:, None] * (1 / 10000) ** (torch.arange(half) / half)
    emb = F.silu(linear("map_layer0", torch.cat([angles.cos(), angles.sin()], 1)))
    emb = linear("map_layer1", emb)
    if y is not None:
        emb = emb + linear("map_label", F.one_hot(y, state["map_label.weight"].shape[1]).float())
    emb = F.silu(emb)

    side = settings["image_size"]
    x = conv(f"enc.{side}x{side}_conv", x)
    skips = [x]
    for name, c_in, c_out, resample, attends in nvidia_blocks(settings):
        if x.shape[1] != c_in:
            x = torch.cat([x, skips.pop()], 1)
        scale, shift = linear(f"{name}.affine", emb)[:, :, None, None].chunk(2, 1)
        h = conv(f"{name}.conv0", F.silu(norm(f"{name}.norm0", x)), resample)
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h) * (scale + 1) + shift))
        x = h + conv(f"{name}.skip", x, resample)
        if attends:
            qkv = conv(f"{name}.qkv", norm(f"{name}.norm2", x))
            q, k, v = qkv.view(len(x), c_out // 64, 64, 3, -1).unbind(3)  # (B,heads,64,HW) each
            w = torch.einsum("bhcq,bhck->bhqk", q, k / 8).softmax(-1)
            h = torch.einsum("bhqk,bhck->bhcq", w, v).reshape(x.shape)
            x = x + conv(f"{name}.proj", h)
        if name.startswith("enc"):
            skips.append(x)
    assert not skips
    return conv("out_conv", F.silu(norm("out_norm", x)))


def nvidia_denoiser(state, settings, y=None):
    """D(x, t) = c_skip x + c_out F(c_in x, ln(t)/4): EDM Table 1 with sigma_data = 0.5."""
    def D(x, t):
        s = t.view(-1, 1, 1, 1)
        root = (s**2 + 0.25).sqrt()
        F_x = nvidia_net(state, settings, x / root, t.log() / 4, y)
        return 0.25 / root**2 * x + 0.5 * s / root * F_x
    return D


NVIDIA = {
    "attention at the coarse level": dict(image_size=16, mult=(1, 2), blocks=1, attention=(8,)),
    "at every other level": dict(image_size=16, mult=(1, 2, 1), blocks=2, attention=(16, 4)),
    "between": dict(image_size=16, base=192, mult=(1, 1, 2), blocks=1, attention=(8,)),
    "in the middle only": dict(image_size=8, mult=(2, 1), blocks=3, attention=()),
    "one level": dict(image_size=8, mult=(1,), blocks=1, attention=(8,)),
}


@pytest.mark.parametrize("classes, augment, prefix", [(10, 0, "model."), (0, 9, "")])
@pytest.mark.parametrize("case", NVIDIA)
@torch.no_grad()
def test_nvidias_network_is_ours(case, classes, augment, prefix):
    settings = dict(base=128) | NVIDIA[case]
    state = nvidia_weights(settings, classes, augment, prefix)
    net = common.UNet(**settings, head_channels=64, classes=classes, time_scale=1e-3).eval()
    net.load_state_dict(common.from_nvidia(state))
    side, generator = settings["image_size"], torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, side, side, generator=generator)
    t, y = torch.tensor([0.01, 1.3, 60.0]), torch.tensor([1, 0, 9]) if classes else None
    expected = nvidia_net(state, settings, x, t.log() / 4, y)
    assert expected.std() > 0.1
    close(net(x, 250 * t.log(), y), expected, 1e-5, 1e-5)
    x = x * t.view(-1, 1, 1, 1)
    close(common.denoise(net, x, t, y), nvidia_denoiser(state, settings, y)(x, t), 1e-5, 1e-5)


@pytest.mark.parametrize("labels", [{}, dict(classes=10)])
def test_nvidias_names_are_recognised(shrunk, tmp_path, labels):
    state = nvidia_weights(SMALL_NVIDIA, **labels)
    settings = SMALL_NVIDIA | dict(time_scale=1e-3) | labels
    assert_loads(tmp_path, state, common.from_nvidia(state), settings)


def test_nvidias_imagenet_model_is_recognised(tmp_path):
    """edm-imagenet-64x64-cond-adm: 295,899,267 parameters in 541 tensors, beside the constants."""
    settings = common.NETS["imagenet64"]
    state = nvidia_weights(settings, 1000, cheap=True)
    parameters = without(state, "resample_filter").values()
    assert len(parameters) == 541 and sum(p.numel() for p in parameters) == 295_899_267
    assert len(state) == 541 + 12
    ours = common.from_nvidia(state)
    assert {name: list(value.shape) for name, value in ours.items()} == SHAPES["imagenet64"]
    net = assert_loads(tmp_path, state, ours, settings | dict(classes=1000, time_scale=1e-3))
    assert torch.equal(net.label_emb.weight, state["model.map_label.weight"].T)
    bias = state["model.dec.8x8_in0.qkv.bias"]  # 768 channels of (head 5, channel 40, v): 12 heads
    assert net.middle_block[1].qkv.bias[2 * 768 + 5 * 64 + 40] == bias[(5 * 64 + 40) * 3 + 2]


NVIDIAS = nvidia_weights(SMALL_NVIDIA, 10)
NOT_NVIDIAS = {
    "missing": without(NVIDIAS, "dec.4x4_in0.qkv.bias"),
    "one more": NVIDIAS | {"model.enc.4x4_block7.conv0.bias": torch.zeros(128)},
    "wrong shape": NVIDIAS | {"model.out_conv.bias": torch.zeros(6)},
    "another part": NVIDIAS | {"model.head.4x4_block0.conv0.bias": torch.zeros(3)},
    "another layer": NVIDIAS | {"model.enc.4x4_down.conv2.weight": torch.zeros(3)},
    "qkv that does not divide": NVIDIAS | {"model.dec.4x4_in0.qkv.bias": torch.zeros(7)},
    "labels without an axis": NVIDIAS | {"model.map_label.weight": torch.tensor(0.0)},
    "decoder from its end": without(NVIDIAS, "_in", "block"),
    "of other make": {name: NVIDIAS[name] for name in NVIDIAS if "map_layer0" in name},
}


@pytest.mark.parametrize("wrong", NOT_NVIDIAS)
def test_what_is_not_nvidias_network_is_refused(shrunk, tmp_path, wrong):
    assert_fits_none(tmp_path, NOT_NVIDIAS[wrong])


@pytest.mark.parametrize("name, changes", [("cifar-small", {}), ("cifar10", dict(base=64))])
def test_nvidias_narrow_networks_are_refused(monkeypatch, tmp_path, name, changes):
    """Same names and shapes, another function: heads of 64 channels, fewer groups below 128."""
    monkeypatch.setitem(common.NETS, name, common.NETS[name] | changes)
    assert_fits_none(tmp_path, nvidia_weights(common.NETS[name]))


# ---- at once usable

class Code:
    """What a file can do when it is unpickled."""
    def __reduce__(self):
        return os.system, ("touch ran_code",)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with both kinds of released weights, labelled data, and all that is refused."""
    folder = tmp_path_factory.mktemp("released")
    teacher = dict(script="cd", args=dict(stage="teacher"), model_args=TINY | dict(classes=10),
                   ema=WEIGHTS)
    student, code = teacher | dict(args=dict(stage="distill")), dict(openai=Code())
    for name, state in dict(
            openai=WEIGHTS, nvidia=NVIDIAS, unconditional=nvidia_weights(SMALL_NVIDIA, prefix=""),
            teacher=teacher, student=student, ct=teacher | dict(script="ct", args={}), code=code,
            module=dict(net=torch.nn.Linear(2, 2))).items():  # the last as in NVIDIA's training
        torch.save(state, folder / f"{name}.pt")
    torch.save(code, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "pickle.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    snapshot = dict(ema=Code(), loss_fn=None, augment_pipe=None, dataset_kwargs={})  # NVIDIA's
    (folder / "snapshot.pkl").write_bytes(pickle.dumps(snapshot))
    data = (folder / "openai.pt").read_bytes()
    (folder / "short.pt").write_bytes(data[:len(data) // 2])
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    for name, labels in dict(ten=[np.arange(20) % 10], three=[np.arange(20) % 3], none=[]).items():
        np.savez(folder / f"{name}.npz", images, *labels)
    Image.fromarray(images[0]).save(folder / "x.png")
    return folder


FLAGS = ["--device", "cpu", "--precision", "fp32"]
DISTIL = [*FLAGS, "--dataset", "ten.npz", "--total-steps", 2, "--batch-size", 4, "--micro-batch", 4,
          "--dist", "l2", "--N", 5, "--workers", 0, "--sample-every", 0, "--save-every", 0]
KINDS = pytest.mark.parametrize("kind", ["openai", "nvidia"])


def run(work, *flags):
    return run_script(*flags, script="cd.py", cwd=work, prelude=SHRUNK, code=0)


def drawn(work, *flags):
    """Two images (2,H,W,3) and what was said."""
    done = run(work, *flags, *FLAGS, "--seed", 5, "--sample", 2, "--save", "drawn.npz")
    return np.load(work / "drawn.npz")["arr_0"].astype(int), done.stdout


def openai_net():
    net = common.UNet(**TINY, classes=10).eval().requires_grad_(False)
    net.load_state_dict(WEIGHTS)
    return net


def x_T(size):
    return 80 * common.SeededNoise(torch.arange(2), 5)(torch.zeros(2, 3, size, size))


def test_sample(work):
    """In one step, by the consistency function of the weights."""
    images, _ = drawn(work, "--ckpt", "openai.pt", "--labels", 1, 7)
    f = common.consistency(openai_net(), x_T(16), torch.full((2,), 80.0), torch.tensor([1, 7]))
    expected = common.to_uint8(f.clamp(-1, 1)).numpy()
    assert np.abs(images - expected).max() <= 1 and expected.std() > 5


def test_edit(work):
    """Two ways to fill a hole."""
    task = ("--edit", "inpaint", "--image", "x.png", "--labels", 1)
    images, _ = drawn(work, "--ckpt", "openai.pt", *task)
    known, hole = np.asarray(Image.open(work / "x.png")).astype(int), np.zeros((16, 16), bool)
    hole[4:12, 4:12] = True
    changes = np.abs(images - known)
    assert changes[:, ~hole].max() <= 1 and changes[:, hole].max() > 50
    assert np.abs(images[0] - images[1])[hole].max() > 0


@KINDS
def test_sample_a_teacher(work, kind):
    """Heun's method on the denoiser that --stage teacher says the weights are."""
    net, y = openai_net(), torch.tensor([1, 7])
    D, size = nvidia_denoiser(NVIDIAS, SMALL_NVIDIA, y), 8
    if kind == "openai":
        D, size = lambda x, t: common.denoise(net, x, t, y), 16
    teacher = ("--ckpt", f"{kind}.pt", "--stage", "teacher", "--labels", 1, 7, "--N", 3)
    images, said = drawn(work, *teacher)
    expected = common.to_uint8(common.heun_sample(D, x_T(size), 3)).numpy()
    assert np.abs(images - expected).max() <= 1 and expected.std() > 5
    assert "5 network call(s) each" in said


@KINDS
def test_distil(work, kind):
    """With a learning rate of 0 all stays what it began as, the teacher, and draws as that did."""
    run(work, "--teacher", f"{kind}.pt", *DISTIL, "--lr", 0, "--mu", 0.9, "--out-dir", kind)
    state, teacher = last(work / kind), WEIGHTS
    settings = TINY
    if kind == "nvidia":
        teacher, settings = common.from_nvidia(NVIDIAS), SMALL_NVIDIA | dict(time_scale=1e-3)
    assert state["step"] == 2 and state["skipped"] == 0
    for key in ("net", "target", "ema"):
        assert state[key].keys() == teacher.keys()
        assert all(torch.equal(state[key][name], teacher[name]) for name in teacher), key
    assert state["model_args"] == settings | dict(classes=10, dropout=0.0, cond=False)
    before, after = (drawn(work, "--ckpt", path)[0] for path in (f"{kind}.pt", f"{kind}/last.pt"))
    assert np.array_equal(before, after)


def test_distil_an_unconditional_teacher(work):
    """Labels of the data are not asked for."""
    run(work, "--teacher", "unconditional.pt", *DISTIL, "--lr", 1e-4, "--out-dir", "run")
    state = last(work / "run")
    teacher = common.from_nvidia(torch.load(work / "unconditional.pt"))
    assert state["model_args"]["classes"] == 0 and state["skipped"] == 0
    assert state["net"].keys() == teacher.keys()
    changes = [(state["net"][name] - value).abs().max() for name, value in teacher.items()]
    assert 0 < max(changes) < 1e-3


# ---- refused

CODE = "is no checkpoint, or holds more than tensors"
REFUSED = [
    *([flag, file, f"{file} {CODE}"] for flag in ("--ckpt", "--teacher")
      for file in ("code.pt", "old.pt", "pickle.pt", "snapshot.pkl", "module.pt")),
    ["--teacher", "nowhere.pt", "nowhere.pt: No such file"],
    ["--teacher", ".", ".: Is a directory"],
    ["--teacher", "short.pt", "short.pt is no checkpoint, or is damaged"],
    ["--teacher", "student.pt", "--teacher student.pt holds a student"],
    ["--teacher", "ct.pt", "ct.pt was written by ct.py"],
    ["--teacher", "openai.pt", "--dataset", "three.npz", "knows 10 classes, and three.npz has 3"],
    ["--teacher", "teacher.pt", "--dataset", "none.npz", "knows 10 classes, and none.npz has 0"],
    ["--teacher", "openai.pt", "--w-max", "4", "--w-max: openai.pt was trained without"],
    ["--teacher", "openai.pt", *SMALL[:5], "--net does not apply with --teacher"],
    ["--teacher", "openai.pt", "--no-class-cond", "--class-cond does not apply with --teacher"],
    ["--teacher", "openai.pt", "--stage", "teacher", "does not apply with --stage teacher"],
    ["--ckpt", "openai.pt", "--stage", "teacher", "--sigmas", "80", "1", "--sigmas does not apply"],
    ["--ckpt", "teacher.pt", "--edit", "denoise", "--image", "x.png", "--labels", "1",
     "--edit does not apply to the teacher in teacher.pt"],
    ["--ckpt", "openai.pt", "--N", "18", "--N does not apply"],
    ["--ckpt", "openai.pt", "--w", "1", "--w 1.0: openai.pt was trained for no guidance"],
    ["--ckpt", "openai.pt", "--labels", "10", "labels 0 to 9"],
    ["--ckpt", "openai.pt", "--edit", "inpaint", "--image", "x.png", "--labels"],
]


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_refused_in_one_line(work, flags):
    *flags, message = flags
    if "--teacher" in flags and "teacher" not in flags:
        flags = [*DISTIL, "--out-dir", "refused", *flags]
    assert_mistake(flags, message, "cd.py", work, prelude=SHRUNK)
    assert not (work / "ran_code").exists()
