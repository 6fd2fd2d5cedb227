"""Networks: ``forward(batch) -> logit_B``, without loss, optimizer or files.

A network is a module with ``sparse``, its ``FieldEmbeddings``, and ``interact``, which maps their
output to logits. Optional declarations are ``reads`` (``models.comparison``) and the traits of
``merging.traits``. A network may split ``interact(emb)`` into ``score(emb, encode(emb))``, where
``encode`` reads histories only; then candidates of one history share its states.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from cki_rec.config import Model, UserError, nearest
from cki_rec.data.schema import FeatureSchema
from cki_rec.models.dcn import DCN, DCNv2
from cki_rec.models.deepfm import DeepFM
from cki_rec.models.din import DIN
from cki_rec.models.dlrm import DLRM
from cki_rec.models.final_mlp import FinalMLP
from cki_rec.models.gru4rec import GRU4Rec
from cki_rec.models.sasrec import SASRec
from cki_rec.models.shallow import DNN, FM, LR, WideDeep
from cki_rec.plugins import loaded_class

MODELS: dict[str, Callable[[FeatureSchema, Model, torch.device | None], nn.Module]] = {
    "lr": LR,
    "fm": FM,
    "dnn": DNN,
    "wide_deep": WideDeep,
    "deepfm": DeepFM,
    "dcn": DCN,
    "dcnv2": DCNv2,
    "din": DIN,
    "final_mlp": FinalMLP,
    "dlrm": DLRM,
    "sasrec": SASRec,
    "gru4rec": GRU4Rec,
}
"""Model classes by their name in ``conf/model``."""


def model_schema(schema: FeatureSchema, model: Model) -> FeatureSchema:
    """Return the schema with only the features that ``model`` reads."""
    return schema if model.histories else schema.without_histories()


def build_model(
    schema: FeatureSchema, model: Model, device: torch.device | None = None
) -> nn.Module:
    """Return a network with tables on ``device`` (``meta`` before sharding).

    Raises:
        UserError: There is no model of that name, or its class is code that the configuration
            has not named.
    """
    return network_class(model)(model_schema(schema, model), model, device)


def network_class(model: Model) -> Callable[..., nn.Module]:
    """Return the class of a network.

    Raises:
        UserError: See ``build_model``.
    """
    if model.module is not None:
        if (own := loaded_class(model.module)) is None:
            raise UserError(
                f"model.module={model.module}: a model has this network, whose code is not part of"
                " cki_rec; to run that code, add this option to the command"
            )
        return own  # type: ignore[no-any-return]
    if model.name not in MODELS:
        hint = nearest(model.name, MODELS)
        raise UserError(f"model.name={model.name}: {hint}one of {', '.join(MODELS)}")
    return MODELS[model.name]
