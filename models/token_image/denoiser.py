"""The network with what it knows of tokens: their codes, their frequencies, and how much information noise leaves.

denoiser(x, t, valid)        what training compares: the clean image, or logits of tokens
denoiser.clean(output)       the clean image in either case

With self-conditioning the network also sees an estimate of the clean image: what it said before, or black. In training
half of the samples see one, made by a pass without gradient. Sampling hands on that of the call before.
Chen, Zhang and Hinton, "Analog Bits" (2023).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from trunkline.models.token_image.config import TokenImageModel
from trunkline.models.token_image.encodings import Encoding
from trunkline.models.token_image.information import POINTS, Curve, log_posterior
from trunkline.models.token_image.network import JiT
from trunkline.models.token_image.noise import alpha_of, time_of

_LEAST_NOISE = 2.0**-20
"""Less is taken for so much where a pixel's noise divides."""


class Denoiser(nn.Module):
    """Of images of `size` x `size` tokens.

    frequencies: [V], of the training data's tokens, which sum to 1; curve: what noise leaves of them, with the schedule
        "information"; without these, they come with the weights
    """

    codes: Tensor
    log_frequencies: Tensor
    curve: Tensor
    _no_split_modules: ClassVar[list[str]] = JiT._no_split_modules

    def __init__(
        self, model: TokenImageModel, size: int, encoding: Encoding, frequencies: Tensor | None = None,
        curve: Curve | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.schedule, self.encoding = model.noise, encoding
        self.prior, self.gives_logits = model.prior == "unigram", model.loss == "cross_entropy"
        self.self_conditioning = model.self_conditioning
        vocab_size = encoding.vocab_size
        codes = encoding.encode(torch.arange(vocab_size))
        self.register_buffer("codes", codes, persistent=False)
        logs = torch.zeros(vocab_size) if frequencies is None else frequencies.log()
        self.register_buffer("log_frequencies", logs)
        self.register_buffer("curve", torch.zeros(2, POINTS))
        if curve is not None:
            self.curve.copy_(torch.stack([curve.snr, curve.share]))
        self.jit = JiT(
            model.shape, size, encoding.channels * (1 + self.self_conditioning) + vocab_size * self.prior,
            vocab_size if self.gives_logits else encoding.channels,
            block=model.block, stem=model.stem, condition=model.condition, wide_output=not self.gives_logits,
        )  # fmt: skip
        if self.prior:
            self._start_with_frequencies()

    def _start_with_frequencies(self) -> None:
        """At first the logits are those of the frequencies. What a patch says is of unit size for each of its parts."""
        nn.init.zeros_(self.jit.output.weight)
        channels, pixels = self.encoding.channels, math.prod(self.jit.patch)
        with torch.no_grad():
            parts = self.jit.patches.weight.unflatten(1, (pixels, -1))
            parts[..., :channels].normal_(std=(pixels * channels) ** -0.5)
            parts[..., channels : channels + self.encoding.vocab_size].normal_(std=pixels**-0.5)

    def alpha(self, t: Tensor) -> Tensor:
        """fp32, the share of the image at times t."""
        return alpha_of(t, self.schedule, self._curve)

    def known(self) -> tuple[Tensor, Curve]:
        """The tokens' frequencies, fp32 [V], and the curve, as the network was trained with them."""
        return self.log_frequencies.exp(), Curve(*self.curve)

    def time(self, alpha: Tensor) -> Tensor:
        """The time, fp32, at which the share of the image is alpha."""
        return time_of(alpha, self.schedule, self._curve)

    @property
    def _curve(self) -> Curve | None:
        return Curve(*self.curve) if self.schedule == "information" else None

    def forward(
        self, x: Tensor, t: Tensor, valid: Tensor, condition: Tensor | None = None,
        condition_valid: Tensor | None = None, previous: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The clean image [B, S, S, C], or where the loss is the cross entropy logits [B, S, S, V]. See JiT.forward.

        previous: an estimate of the clean image, [B, S, S, C], with self-conditioning; None for none
        """
        seen, log_prior = [x], None
        if self.prior:
            alpha = self.alpha(t).clamp(max=1 - _LEAST_NOISE)[:, None, None]
            log_prior = self.log_prior(x, alpha)
            scaled = x / (alpha.square() + (1 - alpha).square()).sqrt()[..., None]
            seen = [scaled, log_prior.exp()]
        if self.self_conditioning:
            seen.append(torch.zeros_like(x) if previous is None else previous.to(x.dtype) * valid[..., None])
        if condition is not None:
            condition = self._of_clean(condition)
        output: Tensor = self.jit(torch.cat(seen, -1), t, valid, condition, condition_valid)
        return output if log_prior is None else log_prior + output

    def _of_clean(self, x: Tensor) -> Tensor:
        """What is seen of pixels without noise: their token and the estimate are certain."""
        parts = [x] + [self.one_hot(x)] * self.prior + [x] * self.self_conditioning
        return torch.cat(parts, -1)

    def log_prior(self, x: Tensor, alpha: Tensor) -> Tensor:
        """log P(token | its noisy pixel alone), fp32 [B, S, S, V], of x [B, S, S, C] and alpha, broadcastable."""
        snr = (alpha / (1 - alpha)).square()
        z = x / (1 - alpha)[..., None]
        return log_posterior(z, snr, self.codes, self.log_frequencies, self.encoding.precision)

    def one_hot(self, x: Tensor) -> Tensor:
        """Of clean pixels."""
        return nn.functional.one_hot(self.encoding.decode(x), self.encoding.vocab_size).to(x.dtype)

    def clean(self, output: Tensor) -> Tensor:
        """The clean image, [B, S, S, C], that an output of `forward` stands for."""
        return output.float().softmax(-1) @ self.codes if self.gives_logits else output
