"""Own predictions: what same-page merging would do with pages, once settled.

Must not know: live merging, the command line, or how pages were read.
"""

from pagefold.plan.prediction import PageState, Prediction, ProcessPrediction, predict
from pagefold.plan.table import PageTable

__all__ = ["PageState", "PageTable", "Prediction", "ProcessPrediction", "predict"]
