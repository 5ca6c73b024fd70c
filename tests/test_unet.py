"""The network against the reference implementation: names, shapes, values, dropout, dtypes."""
import copy
import math

import pytest
import torch

import common
from util import TINY, VECTORS, chirp, close, fill, gauss, gradient, img, tf32


def reference_net(**changes):
    return fill(common.UNet(**(TINY | dict(classes=10) | changes))).eval()


def reference_call(net, *cond):
    y = torch.tensor([1, 7]) if net.classes else None
    with torch.no_grad():
        return net(img((2, 3, 16, 16)), torch.tensor([-100.0, 250.0]), y, *cond)


def kinds(net, kind):
    return [module for module in net.modules() if isinstance(module, kind)]


def test_net_A_entry_by_entry():
    net, seen = reference_net(), {}
    for name in VECTORS["unet_A"]["activations"]:
        def keep(module, args, out, name=name):
            seen[name] = out
        net.get_submodule(name).register_forward_hook(keep)
    out = reference_call(net)
    for name, first8 in VECTORS["unet_A"]["activations"].items():
        close(seen[name].flatten()[:8], first8, 1e-5, 5e-6)
    close(out, VECTORS["unet_A"]["out"], 1e-5, 5e-6)


@pytest.mark.parametrize("key, changes", [("unet_B", dict(classes=0, scale_shift=False)),
                                          ("unet_C", dict(resblock_updown=False))])
def test_nets_B_and_C(key, changes):
    net = reference_net(**changes)
    assert sum(p.numel() for p in net.parameters()) == VECTORS[key]["n_params"]
    close(reference_call(net).flatten()[::16], VECTORS[key]["out_every_16"], 1e-5, 5e-6)


@pytest.mark.parametrize("key, settings", [("unet_A_tiny", TINY | dict(classes=10)),
                                           ("imagenet64", dict(classes=1000)), ("lsun256", {})])
def test_released_names_and_shapes(key, settings):
    with torch.device("meta"):
        net = common.UNet(**common.NETS.get(key, {}) | settings)
    shapes = {name: list(p.shape) for name, p in net.state_dict().items()}
    assert list(shapes.items()) == list(VECTORS["shapes"][key].items())  # in the files' order, too
    if key in VECTORS["param_counts"]:
        assert sum(p.numel() for p in net.parameters()) == VECTORS["param_counts"][key]


def test_sinusoidal_embedding():
    table = VECTORS["embedding"]
    t = torch.tensor([0, 1, *(250 * math.log(sigma) for sigma in (0.5, 0.002, 80)), 999])
    close(t, table["t"])
    # At |t| of 1000 a float32 angle is known to 6e-5
    close(common.sinusoidal_embedding(t, 8), sum(table["dim8"], []), 1e-5, 1e-4)
    close(common.sinusoidal_embedding(t, 7), sum(table["dim7"], []), 1e-5, 1e-4)
    wide = common.sinusoidal_embedding(t, 192)
    few = torch.cat([wide[:, :4], wide[:, 96:100]], 1)
    close(few, sum(table["dim192_first4_cos_and_first4_sin"], []), 1e-5, 1e-4)


def test_time_scale_of_older_checkpoints():
    """Students of NVIDIA's weights, whose c_noise is ln(t)/4, a thousandth of ours."""
    c_noise = torch.tensor([-100.0, 250.0])
    nets = [fill(common.UNet(**TINY, time_scale=scale)).eval() for scale in (1.0, 1e-3)]
    a, b = (net(img((2, 3, 16, 16)), c) for net, c in zip(nets, (c_noise * 1e-3, c_noise)))
    assert torch.equal(a, b)


class FusedOnly(torch.Tensor):
    """Says it is on another device, to take the code path of accelerators on the CPU."""
    @property
    def device(self):
        return torch.device("cuda")


@pytest.mark.parametrize("kind", [torch.Tensor, FusedOnly])
def test_attention_channel_order(kind):
    """q of all heads, then k, then v: on the CPU's path and in scaled_dot_product_attention."""
    block = common.AttentionBlock(64, 32)
    qkv = torch.tensor(chirp(2 * 192 * 9, 2.0), dtype=torch.float32).reshape(2, 192, 3, 3)
    block.norm, block.proj_out = torch.nn.Identity(), torch.nn.Identity()
    block.qkv.forward = lambda x: qkv.as_subclass(kind)
    h = block(torch.zeros(2, 64, 3, 3).as_subclass(kind)).as_subclass(torch.Tensor)
    close(h.flatten()[::8], VECTORS["attention"], 1e-5, 1e-6)


def test_gradient_of_qkv_is_channels_last():
    """Otherwise cuDNN copies it, once for the weight's gradient and once for the input's."""
    net = fill(common.UNet(**TINY)).to(memory_format=torch.channels_last)
    seen = []
    for block in kinds(net, common.AttentionBlock):
        def keep(module, args, out):
            out.register_hook(seen.append)
        block.qkv.register_forward_hook(keep)
    net(img((2, 3, 16, 16)), torch.tensor([-100.0, 250.0])).square().sum().backward()
    assert seen
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in seen)


def test_norm_is_float32_inside():
    norm, x = common.GroupNorm32(64), (1000 + torch.randn(2, 64, 8, 8)).bfloat16()
    h = x.double().view(2, 32, -1)
    deviation = (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    expected = ((h - h.mean(-1, True)) / deviation).view(x.shape)
    for path in (x, x.as_subclass(FusedOnly)):
        out = norm(path).as_subclass(torch.Tensor)
        assert out.dtype == torch.bfloat16
        close(out, expected, 0.01, 0.01)


def test_zero_initialised_layers():
    """A new net answers 0, and its residual and attention blocks pass their input on."""
    torch.manual_seed(0)
    net = common.UNet(**TINY)
    assert not net(gauss((2, 3, 16, 16), 1), torch.zeros(2)).any()
    for block, shape in ((net.input_blocks[1], (2, 32, 16, 16)), (net.middle_block, (2, 64, 8, 8))):
        h = torch.randn(shape)
        assert torch.equal(block(h, torch.randn(2, 128), None, None), h)


def test_cond_changes_nothing_at_first():
    torch.manual_seed(0)
    plain, more = reference_net(), common.UNet(**TINY, classes=10, cond=True).eval()
    missing, unexpected = more.load_state_dict(plain.state_dict(), strict=False)
    news = [name.startswith("time_embed_s.") or ".emb_layers_s." in name for name in missing]
    assert not unexpected and all(news) and len(news) == 4 + 2 * len(kinds(more, common.ResBlock))
    for s in (0.0, 3.0):
        assert torch.equal(reference_call(more, torch.full((2,), s)), reference_call(plain))
    fill(more)
    a, b = (reference_call(more, torch.full((2,), s)) for s in (0.0, 3.0))
    assert (a - b).abs().max() > 0.01
    net = fill(common.UNet(**TINY, cond=True))
    net(torch.randn(2, 3, 16, 16), torch.zeros(2), None, torch.ones(2)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in net.named_parameters() if "_s." in name)


def test_bfloat16_stays_close_and_keeps_float32_outside():
    net, half = reference_net(), reference_net()
    half.dtype, seen = torch.bfloat16, {}
    outside = ("time_embed", "input_blocks.1.0.emb_layers", "out")
    inside = ("input_blocks.1", "middle_block")
    for name in outside + inside:
        def keep(module, args, out, name=name):
            seen[name] = out.dtype
        half.get_submodule(name).register_forward_hook(keep)
    error = (reference_call(net) - reference_call(half)).abs().max()
    assert 0 < error < 0.15  # the reference in float16, 8 times as precise, is 0.018 off
    assert {seen[name] for name in outside} == {torch.float32}
    assert {seen[name] for name in inside} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in half.parameters())


@pytest.mark.parametrize("settings", [
    dict(image_size=8, mult=(1,), attention=()),
    dict(image_size=24, mult=(1, 2, 1), attention=(6, 24)),
    dict(image_size=16, base=96, mult=(1,), attention=(16,), channels=1),
    dict(image_size=48, mult=(1, 1, 1, 1, 1), blocks=2, attention=(12,))])
def test_other_sizes(settings):
    settings = TINY | settings
    side = settings["image_size"]
    x = torch.randn(2, settings.get("channels", 3), side, side)
    net = fill(common.UNet(**settings))
    assert net(x, torch.zeros(2)).shape == x.shape
    attentive = len(settings["attention"]) * (2 * settings["blocks"] + 1)
    assert len(kinds(net, common.AttentionBlock)) == 1 + attentive


@pytest.mark.parametrize("settings", [
    dict(image_size=4), dict(image_size=20, mult=(1, 1, 1, 1)), dict(base=40), dict(null=True),
    dict(base=96, head_channels=64), dict(dropout_size=7)])
def test_sizes_that_do_not_fit(settings):
    with pytest.raises(ValueError):
        common.UNet(**(TINY | settings))


def test_dropout_sits_before_the_last_convolution_and_sleeps_in_eval():
    """What a mask keeps is divided by 1 - p, as torch's dropout does; the rest is 0."""
    torch.manual_seed(0)
    net, inputs = fill(common.UNet(**TINY, dropout=0.4)), []
    for block in kinds(net, common.ResBlock):
        block.out_layers[3].register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    x, t = img((2, 3, 16, 16)), torch.zeros(2)
    masks = net.draw_masks(2)
    net(x, t, masks=masks)
    dropped = inputs[:]
    inputs.clear()
    with pytest.raises(AssertionError, match="dropout masks"):
        net(x, t)
    net.eval()
    assert net.draw_masks(2) is None and common.UNet(**TINY).draw_masks(2) is None
    net(x, t)
    assert len(dropped) == len(inputs) == len(masks) == len(kinds(net, common.ResBlock))
    close(dropped[0], inputs[0] * masks[0] / 0.6)  # later ones see what this one dropped
    for h, mask in zip(dropped, masks):
        assert h.shape == mask.shape and (h[~mask] == 0).all() and (h[mask] != 0).any()
        assert (mask ^ (h != 0)).float().mean() < 1e-3  # SiLU itself is hardly ever 0


def test_masks_are_independent():
    """Of images, units, blocks and draws: two agree where chance has it, 0.7^2 + 0.3^2 = 0.58."""
    torch.manual_seed(0)
    net = common.UNet(**TINY, dropout=0.3)
    masks, others = net.draw_masks(4), net.draw_masks(4)
    pairs = [(masks[0][0], masks[0][1]), (masks[0], masks[-1]), (masks[0], others[0]),
             (masks[0][:, :16], masks[0][:, 16:]), (masks[0][:, :, :8], masks[0][:, :, 8:])]
    for a, b in pairs:
        n = a.numel()
        assert abs((a == b).double().mean() - 0.58) < 4 * 0.5 / n**0.5
    for mask in masks + others:
        assert abs(mask.double().mean() - 0.7) < 4 * 0.46 / mask.numel() ** 0.5


MAPS = [16, 8, 8, 8, 8, 8, 8, 16, 16, 16]  # of TINY's blocks, each halved or doubled one included


@pytest.mark.parametrize("size", [0, 8, 15, 16, 64])
def test_dropout_of_small_maps_only(size):
    """Of 8 pixels in a net with maps of 16 and 8; the masks are drawn in the blocks' order."""
    net = fill(common.UNet(**TINY, dropout=0.4, dropout_size=size))
    torch.manual_seed(0)
    masks = net.draw_masks(2)
    torch.manual_seed(0)
    drops = [pixels <= (size or 16) for pixels in MAPS]
    widths = [block.shape[0] for block in kinds(net, common.ResBlock)]
    for mask, pixels, width, small in zip(masks, MAPS, widths, drops, strict=True):
        if small:
            assert torch.equal(mask, torch.rand(2, width, pixels, pixels) >= 0.4)
        else:
            assert mask is None
    inputs = []
    for block in kinds(net, common.ResBlock):
        block.out_layers[3].register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    x, t = img((2, 3, 16, 16)), torch.zeros(2)
    out = net(x, t, masks=masks)
    zeros = [(h == 0).float().mean() > 0.3 for h in inputs]
    assert zeros == drops
    whole = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.equal(whole(x, t, masks=masks), out)


@pytest.mark.parametrize("more", [dict(), dict(resblock_updown=False), dict(dropout=0.3),
                                  dict(dropout=0.3, dropout_size=8)])
def test_gradient_checkpointing_changes_no_gradient(more):
    """And keeps less: no activation inside a block is there when the backward pass begins."""
    nets = [fill(common.UNet(**TINY, **more)) for _ in range(2)]
    x, t, kept = img((2, 3, 16, 16)), torch.tensor([0.1, 3.0]), []
    torch.manual_seed(0)
    masks = nets[0].draw_masks(2)
    for net, checkpointing in zip(nets, (False, True)):
        net.checkpointing = checkpointing
        bytes_of = {}

        def pack(value):
            bytes_of[value.data_ptr()] = value.numel() * value.element_size()
            return value
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            loss = net(x, t, masks=masks).square().sum()
        kept.append(sum(bytes_of.values()))
        loss.backward()
    assert torch.equal(gradient(nets[0]), gradient(nets[1])) and gradient(nets[0]).norm() > 0
    assert kept[1] < 0.6 * kept[0], kept


def test_ema_update():
    torch.manual_seed(0)
    net = common.UNet(**TINY)
    average = copy.deepcopy(net)
    before = [p.detach().clone().double() for p in average.parameters()]
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p))
    common.ema_update(average, net, 0.9)
    for old, new, now in zip(before, net.parameters(), average.parameters()):
        close(now.detach(), 0.9 * old + 0.1 * new.detach().double(), 1e-6, 1e-7)
    common.ema_update(average, net, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), net.parameters()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_flat_gradients_are_the_gradients(layout):
    nets = [fill(common.UNet(**TINY)) for _ in range(2)]
    nets[0].to(memory_format=layout)
    gradients = common.flatten_gradients(nets[0])
    x = img((2, 3, 16, 16)).contiguous(memory_format=layout)
    for net in nets:
        net(x, torch.zeros(2)).square().mean().backward()
    for p, q in zip(*(net.parameters() for net in nets)):
        assert p.grad.stride() == p.stride()
        assert p.grad.untyped_storage().data_ptr() == gradients.untyped_storage().data_ptr()
        close(p.grad, q.grad, 1e-4, 1e-6)
    squares = [q.grad.double().square().sum() for q in nets[1].parameters()]
    close(gradients.double().norm(), sum(squares).sqrt(), 1e-5)
    assert len(gradients) == sum(p.numel() for p in nets[0].parameters())


# ---- LPIPS

def reference_lpips(monkeypatch, pool):
    for name in ("normal_", "kaiming_normal_", "kaiming_uniform_"):  # of 138 million weights
        monkeypatch.setattr(torch.nn.init, name, lambda weight, *more, **options: weight)
    lpips = common.LPIPS(pretrained=False)
    parts = list(lpips.model.net.children())
    state = {}
    for i, layer in enumerate(layer for part in parts for layer in part):
        if isinstance(layer, torch.nn.Conv2d):
            state |= {f"{i}.weight": layer.weight, f"{i}.bias": layer.bias}

    class Names:  # fill() by the reference's names
        state_dict = staticmethod(lambda: state)

        @staticmethod
        def load_state_dict(new):
            for name, p in state.items():
                p.data.copy_(new[name])
    fill(Names)
    for j, lin in enumerate(lpips.model.lins):
        weight = lin.model[-1].weight.data
        weight.copy_(torch.tensor(abs(chirp(weight.numel(), j))).view_as(weight))
    for part in parts if pool == "max" else ():
        for name, layer in part.named_children():
            if isinstance(layer, torch.nn.AvgPool2d):
                setattr(part, name, torch.nn.MaxPool2d(2))
    return lpips


@pytest.fixture(scope="module")
def lpips_nets():
    pytest.importorskip("lpips")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return {pool: reference_lpips(monkeypatch, pool) for pool in ("average", "max")}


def test_lpips_vectors(lpips_nets):
    x, y = img((2, 3, 32, 32), 0.1, 0.9), img((2, 3, 32, 32), 1.3, 0.7)
    average, largest = lpips_nets["average"], lpips_nets["max"]
    close(average(x, y), VECTORS["lpips"]["avgpool_after_bilinear_224"], 1e-4)
    close(average.model(x, y), VECTORS["lpips"]["avgpool"], 1e-4)
    close(largest.model(x, y), VECTORS["lpips"]["maxpool"], 1e-4)


def test_lpips_keeps_large_images_as_they_are(lpips_nets, monkeypatch):
    sizes = []

    def forward(x, y):
        sizes.extend([x.shape[2:], y.shape[2:]])
        return torch.zeros(len(x), 1, 1, 1)
    monkeypatch.setattr(lpips_nets["average"].model, "forward", forward)
    for side in (256, 64):
        lpips_nets["average"](*torch.zeros(2, 3, 3, side, side))
    assert sizes == [(256, 256)] * 2 + [(224, 224)] * 2


def test_lpips_in_tf32(lpips_nets):
    """Distances agree to 1e-3, and gradients point the same way; of two images that hardly differ
    (by 1%, distance 6e-4) to 3e-3."""
    torch.manual_seed(0)
    distance, x = lpips_nets["average"], img((2, 3, 32, 32), 0.3, 0.8)
    far = torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    y = (x + far * torch.randn_like(x)).clamp(-1, 1).requires_grad_()
    exact = distance(x, y)
    exact_gradient, = torch.autograd.grad(exact.sum(), y)
    with tf32():
        rounded = distance(x, y)
        rounded_gradient, = torch.autograd.grad(rounded.sum(), y)
    errors = (rounded / exact - 1).abs()
    assert 0 < errors[0] < 1e-3 and errors[1] < 3e-3, errors
    cosines = torch.cosine_similarity(exact_gradient.flatten(1), rounded_gradient.flatten(1))
    assert cosines.min() > 0.9999, cosines


def test_lpips_gradient_reaches_the_image_only(lpips_nets):
    x = img((1, 3, 32, 32), 0.1).requires_grad_()
    lpips_nets["average"](x, img((1, 3, 32, 32), 1.3)).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in lpips_nets["average"].parameters())
