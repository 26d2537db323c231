"""Seeded random Darknet weights, from which the *_forward.npz golden files were computed.

`conv_layers` is a list of (in_channels, out_channels, kernel_size, batch_normalize) in file order.
The order of random draws must not change, or the golden files become invalid.
"""

import numpy as np


def write_random_weights(path, conv_layers, seed=7):
    """Write a `.weights` file: int32 major 0, minor 1, revision 0, then int32 images seen 0."""
    rng = np.random.default_rng(seed)
    with open(path, "wb") as file:
        np.array([0, 1, 0, 0], dtype="<i4").tofile(file)
        for c_in, c_out, k, batch_normalize in conv_layers:
            (0.1 * rng.standard_normal(c_out)).astype("<f4").tofile(
                file
            )  # bias, or batch-norm shift
            if batch_normalize:
                rng.uniform(0.5, 1.5, c_out).astype("<f4").tofile(file)  # scale
                (0.1 * rng.standard_normal(c_out)).astype("<f4").tofile(file)  # running mean
                rng.uniform(0.5, 1.5, c_out).astype("<f4").tofile(file)  # running variance
            kernel = rng.standard_normal(c_out * c_in * k * k) * np.sqrt(2 / (c_in * k * k))
            kernel.astype("<f4").tofile(file)  # [c_out, c_in, k, k], row-major


def random_image(size, seed=11):
    """float32 [3, size, size] in [0, 1)."""
    return np.random.default_rng(seed).random((3, size, size), dtype=np.float32)
