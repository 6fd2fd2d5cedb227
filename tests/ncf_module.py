"""The network and the rows of two strangers' checkpoints: ``test_foreign.py`` merges these."""

import importlib.util
import os
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "experiments" / "ncf" / "run.py"
spec = importlib.util.spec_from_file_location("ncf_run", SCRIPT)
ncf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ncf)
network = ncf.MLP


def rows():
    data = Path(os.environ["CKI_REC_DATA"])
    test = ncf.read_test(data / "ml1m_ncf_checkpoints")
    rated = ncf.without(ncf.read_ratings(data / "ml-1m.zip"), test)
    return [tuple(batch.t()) for batch in ncf.samples(rated, 1)["rated"].split(ncf.BATCH)]
