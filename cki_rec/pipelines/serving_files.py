"""Files beside an exported model: the encoder of raw rows, ten examples, and a card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cki_rec.checkpoints import Checkpoint
from cki_rec.config import Config, UserError
from cki_rec.data.dataset import EncodedDataset
from cki_rec.data.encoding.encoder import Encoder, as_frame
from cki_rec.data.encoding.examples import example_rows
from cki_rec.data.encoding.frames import encode_frame
from cki_rec.data.encoding.rules import encoder_of, save_encoder
from cki_rec.data.loader import LoadedRows
from cki_rec.data.schema import FeatureSchema
from cki_rec.engine import evaluator
from cki_rec.engine.export import OnBatches
from cki_rec.engine.servable import Servable
from cki_rec.pipelines.loading import data_sets_of, tokens_of

EXAMPLES, CARD = "examples.json", "README.md"
MOST_VALIDATION_ROWS = 100_000
"""Validation rows on which the error of int8 is measured."""
CPU = torch.device("cpu")
CODE = {
    "pt2": (
        "import json, torch",
        "from encoder import Encoder",
        "",
        'encoder = Encoder.load(".")',
        'model = torch.export.load("model.pt2").module()',
        'examples = json.load(open("examples.json"))',
        'inputs = encoder.inputs(examples["rows"])',
        "tensors = {name: torch.tensor(values) for name, values in inputs.items()}",
        'print(model(tensors)["probability"], examples["scores"])',
    ),
    "onnx": (
        "import json, numpy, onnxruntime",
        "from encoder import Encoder",
        "",
        'encoder = Encoder.load(".")',
        'model = onnxruntime.InferenceSession("model.onnx")',
        'examples = json.load(open("examples.json"))',
        'inputs = encoder.inputs(examples["rows"])',
        'types = {"numbers": "float32"}',
        'arrays = {k: numpy.array(v, types.get(k, "int64")) for k, v in inputs.items()}',
        'print(model.run(["probability"], arrays)[0], examples["scores"])',
    ),
}
"""Suffix of a model's file -> a program that scores the examples."""


@dataclass(frozen=True, slots=True)
class ServingFiles:
    """The encoder of raw rows of a model, and examples."""

    encoder: Encoder
    rows: list[dict[str, Any]]
    """Ten raw rows."""
    logits: NDArray[np.float32]
    """Their logits, by the network that was trained."""
    encoded: LoadedRows
    """The rows as ids and numbers."""
    dataset: EncodedDataset

    def write(self, folder: Path, model: str, errors: dict[str, float]) -> None:
        """Write the files into a folder.

        Args:
            folder: An existing folder.
            model: Name of the model's file.
            errors: Of ``int8_errors``.
        """
        save_encoder(self.encoder, folder)
        scores = torch.from_numpy(self.logits).sigmoid().tolist()
        examples = {"rows": self.rows, "logits": self.logits.tolist(), "scores": scores}
        (folder / EXAMPLES).write_text(json.dumps(examples, indent=1, ensure_ascii=False))
        (folder / CARD).write_text(self.card(model, errors))

    def card(self, model: str, errors: dict[str, float]) -> str:
        """Return a description of the folder in Markdown."""
        columns = ", ".join(f"`{name}`" for name in self.encoder.columns)
        lines = [
            "# An exported click-through-rate model",
            "",
            f"`{model}` takes ids and returns logits and click probabilities. `{model}.json`"
            " describes its inputs.",
            "`encoder.py` makes the inputs of raw rows. It needs Python and polars.",
            "",
            "```python",
            *CODE[Path(model).suffix[1:]],
            "```",
            "",
            f"- Raw columns: {columns}.",
            "- Rows are dictionaries or a polars frame. An empty value is `None` or empty text.",
            "- A token that no vocabulary has gets the id of unseen tokens. So does an id outside"
            " of its table.",
            "- Several ids of a cell are a list, or a text with separators.",
        ]
        lines += [
            f"- `{name}` is looked up in `likes.{name}.parquet`, which holds the liked training"
            f" rows. A column `@{name}` with tokens takes its place."
            for name in self.encoder.likes
        ]
        lines += [
            "- `examples.json` holds ten raw rows: eight training rows, an empty row, and a row of"
            " unseen tokens. Its scores are those of the trained network.",
        ]
        if errors:
            lines += ["", "## int8", "", "Embeddings are int8, with one scale per row."]
            lines += [
                f"- The largest error of a score on {rows} is {error:.1e}."
                for rows, error in errors.items()
            ]
        return "\n".join([*lines, ""])


def of_model(config: Config, saved: Checkpoint, home: Path, network: nn.Module) -> ServingFiles:
    """Return the encoder and the examples of a model.

    Raises:
        UserError: Its data sets or its vocabularies are not here.
    """
    datasets = data_sets_of(config, saved, config.run)
    encoder = encoder_of(datasets, saved.schema, tokens_of(saved, home, datasets))
    rows = example_rows(datasets[0], encoder)
    encoded = encode_frame(as_frame(rows), encoder, saved.schema, "examples")
    logits = _logits(network, encoded, saved.schema, np.arange(len(rows)))
    return ServingFiles(encoder, rows, logits, encoded, datasets[0])


def int8_errors(
    network: nn.Module, servable: Servable, files: ServingFiles | None
) -> dict[str, float]:
    """Return the largest error of a click probability by rows: the examples, validation rows."""
    if files is None:
        return {}
    cases: dict[str, tuple[LoadedRows, NDArray[np.int64]]] = {}
    cases["the ten examples"] = files.encoded, np.arange(len(files.rows))
    try:
        valid = np.asarray(files.dataset.rows("valid"))[:MOST_VALIDATION_ROWS]
    except UserError:  # the data set has none
        valid = np.empty(0, np.int64)
    if len(valid) and servable.schema.vocabulary_hashes.items() <= (
        files.dataset.schema.vocabulary_hashes.items()
    ):
        cases[f"{len(valid):,} validation rows"] = files.dataset, valid
    errors = {}
    for title, (rows, places) in cases.items():
        exact, rounded = (
            torch.from_numpy(_logits(module, rows, servable.schema, places)).sigmoid()
            for module in (network, OnBatches(servable))
        )
        errors[title] = float((exact - rounded).abs().max())
    return errors


def _logits(
    module: nn.Module, rows: LoadedRows, schema: FeatureSchema, places: NDArray[np.int64]
) -> NDArray[np.float32]:
    return evaluator.predict(module, rows, schema, places, CPU)
