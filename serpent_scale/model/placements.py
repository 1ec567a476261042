"""Where compression may sit in a model of a given size: the patterns that experiments compare, of equal parameters."""
from __future__ import annotations

from dataclasses import replace

from serpent_scale.config import ModelConfig


def plain(config: ModelConfig) -> ModelConfig:
    """The model of the same size that is its inner mixer alone."""
    return replace(config, pattern=[config.serpent.inner])


def placements(config: ModelConfig) -> dict[str, ModelConfig]:
    """By name, the plain one, by its mixer's, first. All else of the configuration stays, but d_inner."""
    n, inner = config.n_layers, config.serpent.inner
    quarter = [inner] * (n // 4)
    between = n - 2 * len(quarter)  # layers of the run inside an hourglass
    rates, wide = [1.0, 0.5, 0.25], [0.6, 0.2, 0.2]

    def placed(pattern: list[str], rates: list[float], shares: list[float] = (), depth: int = 1) -> ModelConfig:
        serpent = replace(config.serpent, rates=rates, shares=list(shares), depth=depth, d_inner=None)
        return replace(config, pattern=pattern, serpent=serpent)

    return {
        inner: plain(config),
        "serpent": placed(["serpent"], rates),
        "serpent-half": placed(["serpent"], [0.5]),
        "serpent-wide": placed(["serpent"], rates, wide),
        "alternating": placed([inner, "serpent"], rates),
        "alternating-wide": placed([inner, "serpent"], rates, wide),
        "alternating-half": placed([inner, "serpent"], [0.5]),
        "thirds": placed([inner, inner, "serpent"], rates),
        "runs": placed([inner, "serpent"] * (n // 3) + [inner] * (n % 3), [0.5], depth=2),
        "runs-wide": placed([inner, "serpent"] * (n // 3) + [inner] * (n % 3), rates, wide, 2),
        "hourglass": placed([*quarter, "serpent", *quarter], [0.5], depth=between),
        "hourglass-4": placed([*quarter, "serpent", *quarter], [0.25], depth=between),
        "hourglass-wide": placed([*quarter, "serpent", *quarter], rates, wide, between),
    }
