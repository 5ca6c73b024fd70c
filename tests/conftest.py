"""Makes the scripts importable, and lpips too where torchvision was built for another torch.

Under xdist the files that take longest go first, so that its processes end together.
"""
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
torch.set_num_threads(1)  # two wait for each other for ages where the machine is busy

try:
    import torchvision  # noqa: F401
except RuntimeError:  # a CUDA build beside torch's CPU build misses its operators: declare them
    torchvision_ops = torch.library.Library("torchvision", "DEF")
    torchvision_ops.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torchvision_ops.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    import torchvision  # noqa: F401
except ImportError:
    pass

LONG = ("scripts", "guided_scripts", "ctm_scripts", "ctm", "gpu", "eval", "ect", "cd_scripts",
        "bench")


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist's own order is by the number of tests


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))
