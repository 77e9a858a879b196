"""mL-BFGS and SLIM-QN: momentum-averaged, damped L-BFGS for deep networks, as torch optimizers.

from mlbfgs import MLBFGS

optimizer = MLBFGS(model.named_parameters(), lr=0.1, weight_decay=2e-4)
"""

from mlbfgs.optimizer import MLBFGS
from mlbfgs.partition import BlockPlan, plan
from mlbfgs.slimqn import SLIMQN
from mlbfgs.variant import Variant

__version__ = "0.1.0"

__all__ = ["MLBFGS", "SLIMQN", "BlockPlan", "Variant", "plan"]
