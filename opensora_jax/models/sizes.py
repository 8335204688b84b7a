"""The sizes that an autoencoder takes, and what its latent measures: the same rule for all of them."""


def latent_size(height: int, width: int, stride: int) -> tuple[int, int]:
    """Returns (height, width) of the latent of frames.

    Raises: ValueError for sizes that the autoencoder cannot give back, naming the nearest that it can.
    """
    if min(height, width) < 1 or height % stride or width % stride:
        near = f"{max(1, round(height / stride)) * stride}x{max(1, round(width / stride)) * stride}"
        raise ValueError(
            f"The autoencoder takes heights and widths divisible by {stride}: got {height}x{width}: use {near}."
        )
    return height // stride, width // stride
