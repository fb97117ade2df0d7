"""Sparse variational dropout for Pyro: priors, guides, pruning and export of Bayesian networks."""

from importlib import import_module
from typing import TYPE_CHECKING

from pyro_vdo import kl as _kl  # noqa: F401  registers the divergences
from pyro_vdo._version import __version__ as __version__
from pyro_vdo.batches import TensorBatches
from pyro_vdo.compiler import use_compiled
from pyro_vdo.compression.compact import compact_module
from pyro_vdo.compression.dependency import ExportError
from pyro_vdo.compression.storage import ExportFileError, load, read_header, save
from pyro_vdo.export import export, predict_three_ways, prune_module, reestimate_batch_norm
from pyro_vdo.families.correlated import CorrelatedNormal
from pyro_vdo.families.correlated_guide import AutoCorrelatedNormal
from pyro_vdo.families.dropout import BinaryDropout, GaussianDropout, alpha_of_rate, fast_dropout, rate_of_alpha
from pyro_vdo.families.gaussian_dropout import AutoGaussianDropout
from pyro_vdo.families.hierarchical import HierarchicalNormal, ScaledNormal
from pyro_vdo.families.multiplicative import GaussianDropoutNormal
from pyro_vdo.families.noise import UndrawnNoise, scale_units
from pyro_vdo.families.scale_mixtures import Horseshoe, ScaleMixtureNormal
from pyro_vdo.families.structured import TruncatedLogNormal, TruncatedLogUniform
from pyro_vdo.families.units import (
    UnitNoise,
    add_unit_noise,
    fold_unit_noise,
    unit_masks,
    unit_posteriors,
    unit_scales,
    unit_signal_to_noise,
)
from pyro_vdo.guides import AutoFactorizedNormal
from pyro_vdo.handlers import local_reparameterization, scale_kl
from pyro_vdo.initial import init_to_pretrained
from pyro_vdo.local_reparam import sample_linear
from pyro_vdo.loop.checkpoint import CheckpointError, read_checkpoint
from pyro_vdo.loop.history import EarlyStop, History
from pyro_vdo.loop.joint_optim import JointOptim
from pyro_vdo.loop.memory import release_pretrained
from pyro_vdo.loop.objective import NumericalError
from pyro_vdo.loop.run import Run
from pyro_vdo.modules import to_bayesian
from pyro_vdo.numerics.draws import sample_normal
from pyro_vdo.posteriors import FactorizedNormal
from pyro_vdo.predictive import LocalPredictive
from pyro_vdo.priors import EmpiricalBayesNormal, ImproperPriorError, LogUniform
from pyro_vdo.relevance import SparsityTable, dropout_rate, log_alpha, masks, signal_to_noise, sparsity
from pyro_vdo.rules import convolution as _rules_conv  # noqa: F401  registers rules
from pyro_vdo.rules import embedding as _rules_embedding  # noqa: F401  registers rules
from pyro_vdo.rules import views as _rules_views  # noqa: F401  registers rules
from pyro_vdo.schedules import cosine_decay, kl_warmup, linear_decay, piecewise_linear
from pyro_vdo.site_posterior import SitePosterior, register_posterior
from pyro_vdo.training import fit
from pyro_vdo.variables import ReuseError, ReuseWarning
from pyro_vdo.weights import GaussianWeight, register_rule

# ArviZ and matplotlib take seconds to import and touch the user's settings: they wait until they are asked for.
_LAZY = {
    "diagnostics": "pyro_vdo.diagnostics",
    "from_pyro_svi": "pyro_vdo.io_arviz",
    "plots": "pyro_vdo.plots",
    "summary": "pyro_vdo.reports.weight_table",
}

__all__ = [
    "AutoCorrelatedNormal",
    "AutoFactorizedNormal",
    "AutoGaussianDropout",
    "BinaryDropout",
    "CheckpointError",
    "CorrelatedNormal",
    "EarlyStop",
    "EmpiricalBayesNormal",
    "ExportError",
    "ExportFileError",
    "FactorizedNormal",
    "GaussianDropout",
    "GaussianDropoutNormal",
    "GaussianWeight",
    "HierarchicalNormal",
    "History",
    "Horseshoe",
    "ImproperPriorError",
    "JointOptim",
    "LocalPredictive",
    "LogUniform",
    "NumericalError",
    "ReuseError",
    "ReuseWarning",
    "Run",
    "ScaleMixtureNormal",
    "ScaledNormal",
    "SitePosterior",
    "SparsityTable",
    "TensorBatches",
    "TruncatedLogNormal",
    "TruncatedLogUniform",
    "UndrawnNoise",
    "UnitNoise",
    "add_unit_noise",
    "alpha_of_rate",
    "compact_module",
    "cosine_decay",
    "diagnostics",
    "dropout_rate",
    "export",
    "fast_dropout",
    "fit",
    "fold_unit_noise",
    "from_pyro_svi",
    "init_to_pretrained",
    "kl_warmup",
    "linear_decay",
    "load",
    "local_reparameterization",
    "log_alpha",
    "masks",
    "piecewise_linear",
    "plots",
    "predict_three_ways",
    "prune_module",
    "rate_of_alpha",
    "read_checkpoint",
    "read_header",
    "reestimate_batch_norm",
    "register_posterior",
    "register_rule",
    "release_pretrained",
    "sample_linear",
    "sample_normal",
    "save",
    "scale_kl",
    "scale_units",
    "signal_to_noise",
    "sparsity",
    "summary",
    "to_bayesian",
    "unit_masks",
    "unit_posteriors",
    "unit_scales",
    "unit_signal_to_noise",
    "use_compiled",
]


if TYPE_CHECKING:  # type checkers take every name for an object where they see __getattr__
    from pyro_vdo import diagnostics, plots
    from pyro_vdo.io_arviz import from_pyro_svi
    from pyro_vdo.reports.weight_table import summary
else:

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(_LAZY[name])
        return module if _LAZY[name] == f"{__name__}.{name}" else getattr(module, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
