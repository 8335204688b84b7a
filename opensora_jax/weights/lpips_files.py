"""LPIPS as it is published: torchvision's VGG16 in one file, the weights of the five distances in another.

A folder with both, `vgg16-397923af.pth` and `vgg.pth` under their own names, reads like one file of weights.
"""

from pathlib import Path
from typing import Any

from opensora_jax.config.errors import UserError
from opensora_jax.models.lpips import PLACES
from opensora_jax.weights.files import open_checkpoint

LINEAR, VGG = "vgg.pth", "vgg16*.pth"


def is_lpips(path: Path) -> bool:
    """Returns whether a path is a folder with the weights of the distances."""
    return (path / LINEAR).is_file()


def open_lpips(folder: Path) -> dict[str, Any]:
    """Returns published key -> tensor of both files, under the names of the complete model.

    Raises: UserError without exactly one file of VGG16.
    """
    found = sorted(folder.glob(VGG))
    if len(found) != 1:
        raise UserError(
            f"{folder} has {LINEAR} and {len(found)} files {VGG}; put torchvision's vgg16-397923af.pth beside it"
        )
    network, joined = open_checkpoint(found[0]), dict(open_checkpoint(folder / LINEAR))
    convs = [(slice_, place) for slice_, places in enumerate(PLACES, start=1) for place in places]
    joined |= {
        f"net.slice{slice_}.{place}.{leaf}": network[f"features.{place}.{leaf}"]
        for slice_, place in convs
        for leaf in ("weight", "bias")
        if f"features.{place}.{leaf}" in network
    }
    return joined
