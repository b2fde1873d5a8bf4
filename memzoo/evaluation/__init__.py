"""Scores of language models on recall and long contexts, through lm-eval.

`evaluate` runs suites of tasks (`memzoo.data.tasks`) on models and appends every finished cell to a store that a later run goes on with;
`evaluate_niah` scores one model on one needle task and gives a dict. `import memzoo.evaluation` is cheap: lm-eval and matplotlib are
imported when something runs.
"""

from ..data.tasks import SUITES
from .common import load_model, parse_length, quiet
from .needles import evaluate_niah, heat_map, save_results
from .papers import PAPERS, evaluate_papers
from .run import Progress, evaluate
from .store import Store, wilson

__all__ = [
    "PAPERS",
    "SUITES",
    "Progress",
    "Store",
    "evaluate",
    "evaluate_niah",
    "evaluate_papers",
    "heat_map",
    "load_model",
    "parse_length",
    "quiet",
    "save_results",
    "wilson",
]
