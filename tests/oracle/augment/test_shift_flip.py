"""Shifts and flips: every view is a window of the padded image, and all of them come up equally often."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cupel.augment import ShiftFlip


def raw(n: int, side: int = 6) -> torch.Tensor:
    return torch.randint(1, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def windows(image: torch.Tensor, padding: int) -> dict[tuple[int, int, int], torch.Tensor]:
    padded, side = F.pad(image, [padding] * 4), image.shape[-1]
    found = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            window = padded[:, top : top + side, left : left + side].float()
            found[0, top, left], found[1, top, left] = window, window.flip(2)
    return found


def test_views_are_windows_of_the_padded_image_or_their_mirror_images():
    images, counts = raw(600), torch.zeros(2, 3, 3)
    views = (ShiftFlip(padding=1)(images, torch.Generator().manual_seed(0)) * 255).round()
    for image, view in zip(images, views, strict=True):
        same = [key for key, window in windows(image, 1).items() if torch.equal(window, view)]
        assert len(same) == 1
        counts[same[0]] += 1
    # 600 draws of 18 equally likely ones: 33 each, standard deviation 5.6
    assert float(counts.min()) > 33 - 4.5 * 5.6
    assert float(counts.max()) < 33 + 4.5 * 5.6


def test_nothing_happens_without_padding_and_flip():
    images = raw(5)
    views = ShiftFlip(padding=0, flip=0.0)(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(views, images / 255)
    assert views.is_contiguous(memory_format=torch.channels_last)
    flipped = ShiftFlip(padding=0, flip=1.0)(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(flipped, images.flip(3) / 255)
