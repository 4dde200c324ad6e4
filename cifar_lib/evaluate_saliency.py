"""Which part of a picture a prediction hangs on."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_lib.augment import normalize
from cifar_lib.models import evaluation_mode

SMALLEST_MAP = 4  # pixels; a later map says nothing about where


def hires_cam(model: nn.Module, images: Tensor, *, mean: Tensor, std: Tensor) -> Tensor:
    """Maps where the evidence for the predicted class lies (HiResCAM): activation times gradient.

    The feature maps are the last ones of at least `SMALLEST_MAP` pixels a side, whatever module
    of the network makes them. At 32 pixels they are coarse, but gradients of single pixels are
    speckle. Grad-CAM, which averages a channel's gradient over its map, shows nothing on most
    pictures where the network ends in a maximum: few places have a gradient, of either sign.

    Args:
        model: maps (N, 3, H, W) to (N, K); its mode is as before afterwards.
        images: uint8 (N, 3, H, W), 0..255; a few.
        mean: float (3,), of the training images, over 0..1.
        std: float (3,), likewise.

    Returns:
        float32 (N, H, W) on the CPU, 0..1; the largest value of each image is 1, or all are 0
        where nothing speaks for the class.

    Source: Draelos and Carin, HiResCAM, arXiv 2011.08891, section 3; after Grad-CAM, 1610.02391.
    """
    device, last = next(model.parameters()).device, {}

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if output.ndim == 4 and min(output.shape[-2:]) >= SMALLEST_MAP:
            last["maps"] = output

    x = normalize(images.to(device), mean.to(device), std.to(device), torch.float32, False)
    hooks = [module.register_forward_hook(keep) for module in model.modules()]
    try:
        with evaluation_mode(model), torch.enable_grad():
            score = model(x.requires_grad_()).amax(dim=1).sum()
    finally:
        for hook in hooks:
            hook.remove()
    (gradient,) = torch.autograd.grad(score, last["maps"])
    evidence = (gradient * last["maps"].detach()).sum(dim=1, keepdim=True).relu()
    evidence = F.interpolate(evidence, size=images.shape[-2:], mode="bilinear").squeeze(1)
    return (evidence / evidence.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)).cpu()
