"""blast-search: make a PyTorch model faster with BLAST matrices, chosen per layer by measurement.

The pipeline, in order:

    layers       find_layers: which weights may be replaced
    space        load_space: which block counts and ranks each may take
    latency      what every candidate costs on this device (Ray Tune workers, or this process)
    calibrate    one pass over data: the Grams of the layers' inputs
    sensitivity  what every candidate costs in quality
    solver       the exact choice per layer; study: Optuna, judged by the true loss
    engine       solve, build, measure, correct, until the measured budget holds
    apply        plan -> model; modelfolder: save and load, bit-exact
    refresh      the same plan on an updated checkpoint, from the old factors
    scratch      or: plan -> untrained model, and the learning rates that train it
    retrain      distillation from the dense model
    report       tables, the front as a picture, what it is worth
"""

from blast_search.space import Candidate, SearchSpace, load_space  # isort: skip
from blast_search.layers import find_layers  # isort: skip
from blast_search.matrix import BlastLinear, blast_matmul  # isort: skip
from blast_search.factors import Factors  # isort: skip
from blast_search.factorize import factorize, factorize_grid, factorize_many  # isort: skip
from blast_search.plan import Plan  # isort: skip
from blast_search.apply import apply  # isort: skip
from blast_search.modelfolder import load, save  # isort: skip
from blast_search.refresh import refresh  # isort: skip
from blast_search.scratch import from_scratch, parameter_groups, uniform_plan  # isort: skip
from blast_search.evaluate import Task, evaluate  # isort: skip
from blast_search.retrain import retrain  # isort: skip
from blast_search.pipeline import Run, search  # isort: skip
from blast_search.version import VERSION  # isort: skip

__version__ = VERSION

__all__ = [
    "BlastLinear",
    "Candidate",
    "Factors",
    "Plan",
    "Run",
    "SearchSpace",
    "Task",
    "apply",
    "blast_matmul",
    "evaluate",
    "factorize",
    "factorize_grid",
    "factorize_many",
    "find_layers",
    "from_scratch",
    "load",
    "load_space",
    "parameter_groups",
    "refresh",
    "retrain",
    "save",
    "search",
    "uniform_plan",
]
