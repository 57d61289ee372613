"""Which stages a whole kernel keeps: the variants that ``whole`` measures, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Stages:
    """How often each stage is done: 0, 1, or 2. The loop over key tiles, its barriers and its turns always stay."""

    loads: int = 1  # Q, K and V to shared memory; 0: the products read what lies there, without waiting for it
    products: int = 1  # Q·Kᵀ and P·V; 0: P of one tile serves as the scores of the next
    softmax: int = 1  # rules, online-softmax step, rescale of O; 0: scores are rounded and multiplied as they are
    epilogue: int = 1  # O to global memory

    def work(self, whole: Mapping[str, float]) -> dict[str, float]:
        """A variant's share of a whole call's work (``shapes.work``), the kind that its rate is given in first."""
        counts = {
            "tensor": self.products * whole["tensor"],
            "exp": self.softmax * whole["exp"],
            "sm_in": self.loads * whole["sm_in"],
            "copy": self.loads * whole["in"] + self.epilogue * whole["out"],
        }
        return {kind: amount for kind, amount in counts.items() if amount}


FULL = "everything"
VARIANTS = {
    FULL: Stages(),
    "no loads": Stages(loads=0),
    "no products": Stages(products=0),
    "no softmax": Stages(softmax=0),
    "no epilogue": Stages(epilogue=0),
    "loads only": Stages(products=0, softmax=0, epilogue=0),
    "products only": Stages(loads=0, softmax=0, epilogue=0),
    "softmax only": Stages(loads=0, products=0, epilogue=0),
    "products twice": Stages(products=2),
    "softmax twice": Stages(softmax=2),
}
EPILOGUE_ONLY = Stages(loads=0, products=0, softmax=0)
