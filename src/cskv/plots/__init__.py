"""Results and result files to figures."""

from cskv.plots.heatmap import plot_needles, plot_ranks
from cskv.plots.losses import plot_losses, plot_training
from cskv.plots.pareto import plot_accuracy, plot_agreement, plot_divergence, plot_perplexity
from cskv.plots.series import method_looks, plot_positions
from cskv.plots.spectra import plot_spectra
from cskv.plots.style import COLOURS, MARKERS, STYLE

__all__ = [
    "COLOURS",
    "MARKERS",
    "STYLE",
    "method_looks",
    "plot_accuracy",
    "plot_agreement",
    "plot_divergence",
    "plot_losses",
    "plot_needles",
    "plot_perplexity",
    "plot_positions",
    "plot_ranks",
    "plot_spectra",
    "plot_training",
]
