"""Setting weights to zero for good while training goes on with the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Prunable:
    """Mixin of guides whose sites have a mask ``kept``: the weights that it names are 0, without noise, KL or gradient.

    :ivar clip_log_alpha: weights with log alpha at or above it are 0 in a training pass, as in the code of Molchanov et
        al. 2017, who take 3; None (the default) for none. A weight that is out gets no gradient and so stays out; at
        log alpha = 3 its KL is below 0.03 and would only push it further.
    """

    clip_log_alpha: float | None = None

    def _mask(self, part: Any) -> Tensor | None:
        """What is kept in a training pass: what is not pruned and not clipped."""
        kept: Tensor | None = part.kept
        if self.clip_log_alpha is None:
            return kept
        with torch.no_grad():
            below: Tensor = 2 * (part.log_scale - part.loc.abs().log()) < self.clip_log_alpha
            return below if kept is None else below & kept

    def prune(self, threshold: float = 3.0) -> dict[str, Tensor]:
        """Set the weights with log alpha >= ``threshold`` to zero for good, and go on with the survivors.

        What was pruned before stays pruned, so that calls with a falling threshold anneal it. :meth:`unprune` takes it
        all back. Priors of this package leave pruned weights out; one of torch's (Normal, Laplace) goes on to count
        its density at 0 for each, a constant while its parameters are fixed. ``HierarchicalNormal`` learns a scale.

        :returns: the masks, True for the weights that are kept, by site.
        :raises TypeError: for a threshold that is not a number.
        :raises ValueError: for a threshold that is nan.
        :raises RuntimeError: before the guide has parameters.
        """
        if isinstance(threshold, Mapping):
            raise TypeError("prune: the threshold is one number; one by site: guide.keep(masks(guide, {site: 2.0}))")
        if threshold != threshold:
            raise ValueError("prune: the threshold is nan; weights with log alpha >= threshold are pruned")
        return self.keep({name: q.log_alpha < threshold for name, q in self._prunable().items()})

    @torch.no_grad()
    def keep(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Prune every weight whose mask is False, on top of what is pruned; returns the masks by site.

        :param masks: site name -> boolean tensor of the shape of the site.
        :raises ValueError: for unknown sites and masks of another type or shape.
        """
        names = self._prunable().keys()
        for name, mask in masks.items():
            if name not in names:
                raise ValueError(f"keep: '{name}' is no site that can be pruned; these are {sorted(names)}")
            part = self._site(name)
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != part.loc.shape:
                what = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(
                    f"keep: the mask of '{name}' is {what}; it must be a tensor, torch.bool of shape "
                    f"{tuple(part.loc.shape)}"
                )
        for name, mask in masks.items():
            part = self._site(name)
            with torch.inference_mode(False):  # or training could not go on with the mask
                mask = mask.to(part.loc.device)
                part.kept = mask.clone() if part.kept is None else part.kept & mask
        kept = {name: self._site(name).kept for name in names}
        return {name: mask for name, mask in kept.items() if mask is not None}

    def unprune(self) -> None:
        """Give the pruned weights back, with the parameters that they had."""
        for name in self._prunable():
            self._site(name).kept = None

    def _prunable(self) -> dict[str, Any]:
        return {name: q for name, q in self.posteriors().items() if hasattr(self._site(name), "kept")}

    def posteriors(self) -> dict[str, Any]:
        """The posterior of every site that can be pruned, and of others."""
        raise NotImplementedError

    def _site(self, name: str) -> Any:
        raise NotImplementedError
