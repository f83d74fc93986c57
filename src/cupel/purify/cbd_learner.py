"""What CBD trains: stand-ins for triggered images, anchors, and one loss over both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cupel.errors import CupelError
from cupel.folding import folded
from cupel.losses.pulling import EmbeddingScale, cosine_pull, info_nce, pull_distance, spread
from cupel.protocols import Batch, Encoder
from cupel.purify.adversaries import applied, ascend, boosted, joined, linf_search, patch_search, shared_search
from cupel.purify.batch_norm import set_batch_norm
from cupel.seeds import Seed

if TYPE_CHECKING:
    from cupel.purify.cbd import CBD

__all__ = ["COLLAPSED", "CBDLearner"]

COLLAPSED = 0.05
"""Share of the frozen encoder's spread below which a purification has failed (our choice)."""
_CHECK_EVERY = 20  # steps between looks at the spread: each look waits for the device


class CBDLearner:
    """The encoder under L = λ_pull · pull(f(x̃), t(x)) + λ_anchor · pull(f(x), t(x)), with everything in eval mode.

    Args:
        settings: Of the method.
        encoder: The copy that is trained.
        frozen: The encoder as given, or a folded copy of it; its weights need no gradient.
        clean: Its embeddings of the whole data set, float32 `[n, width]`, by row.
        triggers: Masks `[triggers, height, width]` and patterns `[triggers, 3, height, width]`; None = there are none.
        seed: Start of the universal perturbation.
    """

    def __init__(
        self,
        settings: CBD,
        encoder: Encoder,
        frozen: Encoder,
        clean: Tensor,
        triggers: tuple[Tensor, Tensor] | None,
        seed: Seed,
    ) -> None:
        self.settings, self.encoder, self.frozen, self.clean = settings, encoder, frozen, clean
        self.scale = EmbeddingScale.of(clean)
        self.network = folded(encoder)
        device, side = clean.device, encoder.input_size
        self.triggers = None if triggers is None else (triggers[0].to(device), triggers[1].to(device))
        set_batch_norm(encoder.module, settings.batch_norm)
        u = torch.rand(3, side, side, generator=seed.child("universal").torch())
        self.universal = _Universal(((2 * u - 1) * settings.epsilon).to(device))
        self.state: nn.Module = nn.ModuleDict({"encoder": encoder.module, "universal": self.universal})
        self._relative_spread, self._done = torch.ones((), device=device), 0

    def parameters(self) -> list[nn.Parameter]:
        """The weights of the encoder, without BatchNorm's where `batch_norm` is `frozen`."""
        return [p for p in self.encoder.module.parameters() if p.requires_grad]

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """λ_pull · pull + λ_anchor · anchor; one forward pass for stand-ins and anchors."""
        s, n = self.settings, len(batch.inputs)
        x, own = batch.inputs.float().div_(255), self.clean[batch.rows.to(self.clean.device)]
        stand_ins = self.adversaries(x, own, batch.seed)
        anchors, target = self.anchors(batch.inputs, x, own, batch.seed)
        f = self.network(_channels_last(torch.cat([stand_ins, anchors]))).float()
        adversarial, clean = f[:n], f[n:]
        with torch.no_grad():
            now = spread(clean)
            self._relative_spread = now / spread(target)
        if s.anchor == "self":
            target = clean.detach()
            own = target if not s.augmented_anchor else self.network(_channels_last(x)).float().detach()
        pull = pull_distance(s.pull, adversarial, own, self.scale)
        anchor = pull_distance(s.pull, clean, target, self.scale)
        total = s.lambda_pull * pull + s.lambda_anchor * anchor
        return total, {"pull": pull.detach(), "anchor": anchor.detach(), "feature_std": now}

    def anchors(self, raw: Tensor, x: Tensor, own: Tensor, seed: Seed) -> tuple[Tensor, Tensor]:
        """Clean images whose embeddings shall stay, and the frozen encoder's embeddings of them.

        Args:
            raw, x: The images of the batch, uint8 and in [0, 1].
            own: The frozen encoder's embeddings of them.
            seed: Of this step.
        """
        s = self.settings
        if not s.augmented_anchor:
            return x, own
        chosen = torch.cat([raw[1::2], raw.repeat(s.anchor_views, 1, 1, 1)])
        made = s.augment(chosen, seed.child("views").torch(raw.device))
        with torch.no_grad():
            made_target = self.frozen(made).float()
        return torch.cat([x[0::2], made]), torch.cat([own[0::2], made_target])

    def adversaries(self, x: Tensor, target: Tensor, seed: Seed) -> Tensor:
        """Stand-ins for triggered images, one per image of the batch, detached.

        Args:
            x: Images in [0, 1].
            target: The frozen encoder's embeddings of them.
            seed: Of this step.
        """
        s, generator = self.settings, seed.child("adversaries").torch(x.device)
        share = self._shares(len(x))
        at = share["inverted"]
        done, rest = x[:at], x[at:]
        if self.triggers is not None and at:
            masks, patterns = boosted(*self.triggers, at, generator, boost=s.boost, shift=s.shift, dilation=s.dilation)
            done = torch.lerp(done, patterns, masks).clamp(0, 1)
        if not len(rest):
            return done
        rate = s.alpha if s.alpha is not None else 2.5 * s.epsilon / max(1, s.pgd_steps)
        for_universal, for_patch, for_ball = torch.split(rest, [share["universal"], share["patch"], share["pgd-linf"]])
        searches = []
        if len(for_universal):
            searches.append(shared_search(for_universal, self.universal.delta, s.epsilon, rate))
        if len(for_patch):
            searches.append(patch_search(for_patch, s.window, s.window_alpha, s.num_patches, generator))
        if len(for_ball):
            searches.append(linf_search(for_ball, s.epsilon, rate, generator))
        search = joined(searches)
        keys = target if s.keys == "frozen" else self.network(_channels_last(x)).float().detach()
        own = torch.arange(at, len(x), device=x.device)

        def objective(perturbed: Tensor) -> Tensor:
            queries = self.network(_channels_last(perturbed)).float()
            if s.inner == "neg_cos":
                return cosine_pull(queries, keys[own])
            return info_nce(queries, keys, own, s.temperature)

        v = ascend(objective, rest, search, s.pgd_steps)
        if len(for_universal):
            self.universal.delta.copy_(v[0])  # the next step goes on from here
        return torch.cat([done, applied(rest, search, v)])

    def after_step(self) -> None:
        """Look for a collapse now and then."""
        self._done += 1
        if self._done % _CHECK_EVERY == 0:
            self.check_spread()

    def check_spread(self) -> None:
        """Compare the spread of the last step's clean embeddings with the frozen encoder's on the same images.

        Raises:
            CupelError: it is below `COLLAPSED`.
        """
        relative = self._relative_spread.item()
        if relative < COLLAPSED:
            what = f"the embeddings collapse: their spread fell to {relative:.1%} of the given encoder's"
            raise CupelError("cbd", what, "use anchor 'frozen' with a larger lambda_anchor, or a smaller lr")

    def _shares(self, n: int) -> dict[str, int]:
        """How many images of a batch get which stand-in; rounded so that they add up."""
        s, found = self.settings, self.triggers is not None
        counts = dict.fromkeys(("inverted", "universal", "patch", "pgd-linf"), 0)
        if s.mode != "mix":
            return counts | {s.mode: n}
        first, second = round(s.mix[0] * n), round((s.mix[0] + s.mix[1]) * n)
        return counts | {
            "inverted" if found else "universal": first, "patch": second - first, "pgd-linf": n - second
        }  # fmt: skip


class _Universal(nn.Module):
    """The shared perturbation, a buffer so that checkpoints keep it."""

    delta: Tensor

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.register_buffer("delta", delta)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
