"""Model definitions written by others, with small sizes and example inputs.

Each entry builds a module with random initial weights. Packages are imported when an entry is
built, so an entry needs its own package only. Ids are longs below ``IDS``; B rows, T places.
"""

from __future__ import annotations

import sys
import types
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

ROWS, IDS, LENGTH = 8, 20, 6
Built = tuple[nn.Module, Any]
"""A module and inputs of one call, in the form that ``cki_rec.find_symmetries`` takes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One public model definition."""

    name: str
    package: str
    """As on the registry."""
    kind: str
    """``recommender``, ``tabular``, ``language`` or ``vision``."""
    build: Callable[[], Built]


class Method(nn.Module):
    """A module called by another method than ``forward``."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *args: Any) -> Any:
        """Return the result of the method."""
        return getattr(self.model, self.method)(*args)


def ids(*shape: int, low: int = 1, high: int = IDS) -> Tensor:
    """Return random ids."""
    return torch.randint(low, high, shape)


# --- torchrec -------------------------------------------------------------------------------


def _torchrec() -> tuple[Any, tuple[Tensor, Any]]:
    """Return an embedding collection of three fields, and dense and sparse inputs."""
    modules, sparse = (
        import_module(f"torchrec.{part}") for part in ("modules", "sparse.jagged_tensor")
    )
    configs, collections = (
        import_module(f"{modules.__name__}.{part}")
        for part in ("embedding_configs", "embedding_modules")
    )
    fields = ["user", "item", "genre"]
    tables = [
        configs.EmbeddingBagConfig(
            name=name, embedding_dim=8, num_embeddings=IDS, feature_names=[name]
        )
        for name in fields
    ]
    lengths = torch.tensor([1] * 2 * ROWS + [2] * ROWS)
    jagged = sparse.KeyedJaggedTensor(fields, ids(int(lengths.sum())), lengths=lengths)
    bags = collections.EmbeddingBagCollection(tables=tables, device=torch.device("cpu"))
    return bags, (torch.randn(ROWS, 4), jagged)


def torchrec_dlrm() -> Built:
    """Return DLRM."""
    bags, inputs = _torchrec()
    module = import_module("torchrec.models.dlrm").DLRM(bags, 4, [16, 8], [16, 8, 1])
    return module, inputs


def torchrec_dlrm_dcn() -> Built:
    """Return DLRM with a low-rank cross network."""
    bags, inputs = _torchrec()
    module = import_module("torchrec.models.dlrm").DLRM_DCN(bags, 4, [16, 8], [16, 8, 1], 2, 4)
    return module, inputs


def torchrec_deepfm() -> Built:
    """Return DeepFM."""
    bags, inputs = _torchrec()
    return import_module("torchrec.models.deepfm").SimpleDeepFMNN(4, bags, 16, 6), inputs


# --- deepctr-torch --------------------------------------------------------------------------


def _deepctr() -> tuple[Any, Any]:
    """Return the package's inputs and models, without the question for its latest version."""
    module = types.ModuleType("deepctr_torch.utils")
    module.check_version = lambda _: None  # type: ignore[attr-defined]
    sys.modules["deepctr_torch.utils"] = module
    return import_module("deepctr_torch.inputs"), import_module("deepctr_torch.models")


def _deepctr_columns(inputs: Any) -> tuple[list[Any], Tensor]:
    names = ["user", "item", "genre"]
    columns = [inputs.SparseFeat(name, IDS, embedding_dim=8) for name in names]
    rows = torch.cat([ids(ROWS, 3).float(), torch.rand(ROWS, 1)], 1)
    return [*columns, inputs.DenseFeat("age", 1)], rows


def deepctr_deepfm() -> Built:
    """Return DeepFM."""
    inputs, models = _deepctr()
    columns, rows = _deepctr_columns(inputs)
    return models.DeepFM(
        columns, columns, dnn_hidden_units=(16, 8), init_std=0.1, seed=torch.initial_seed()
    ), rows


def deepctr_xdeepfm() -> Built:
    """Return xDeepFM."""
    inputs, models = _deepctr()
    columns, rows = _deepctr_columns(inputs)
    return (
        models.xDeepFM(
            columns,
            columns,
            dnn_hidden_units=(16, 8),
            cin_layer_size=(8, 6),
            init_std=0.1,
            seed=torch.initial_seed(),
        ),
        rows,
    )


def deepctr_autoint() -> Built:
    """Return AutoInt."""
    inputs, models = _deepctr()
    columns, rows = _deepctr_columns(inputs)
    module = models.AutoInt(
        columns,
        columns,
        att_layer_num=2,
        dnn_hidden_units=(16, 8),
        init_std=0.1,
        seed=torch.initial_seed(),
    )
    return module, rows


def deepctr_din() -> Built:
    """Return DIN."""
    inputs, models = _deepctr()
    item = inputs.SparseFeat("hist_item", IDS, embedding_dim=8, embedding_name="item")
    columns = [
        inputs.SparseFeat("user", IDS, embedding_dim=8),
        inputs.SparseFeat("item", IDS, embedding_dim=8),
        inputs.VarLenSparseFeat(item, LENGTH, length_name="length"),
    ]
    rows = torch.cat([ids(ROWS, 2 + LENGTH), ids(ROWS, 1, high=LENGTH)], 1).float()
    module = models.DIN(
        columns,
        ["item"],
        dnn_hidden_units=(16, 8),
        att_hidden_size=(12, 6),
        att_activation="relu",
        init_std=0.1,
        seed=torch.initial_seed(),
    )
    return module, rows


# --- recbole --------------------------------------------------------------------------------


class _Counts:
    """The part of a recbole data set that its models read."""

    def num(self, field: str) -> int:
        """Return the number of ids of a field."""
        return IDS


def _recbole(name: str, kind: str, **options: Any) -> nn.Module:
    config: dict[str, Any] = defaultdict(lambda: None)
    config |= {"USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "NEG_PREFIX": "neg_"}
    config |= {"LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "length", "device": "cpu"}
    config |= {"MAX_ITEM_LIST_LENGTH": LENGTH, "LABEL_FIELD": "label", "dropout_prob": 0.0}
    model: nn.Module = getattr(import_module(f"recbole.model.{kind}_recommender"), name)(
        config | options, _Counts()
    )
    return model


def recbole_neumf() -> Built:
    """Return NeuMF."""
    module = _recbole(
        "NeuMF",
        "general",
        mf_embedding_size=8,
        mlp_embedding_size=8,
        mlp_hidden_size=[16, 8],
        mf_train=True,
        mlp_train=True,
    )
    return module, (ids(ROWS), ids(ROWS))


def recbole_bpr() -> Built:
    """Return matrix factorization."""
    model = _recbole("BPR", "general", embedding_size=8)
    return Method(model, "full_sort_predict"), ({"user": ids(ROWS)},)


def recbole_gru4rec() -> Built:
    """Return GRU4Rec."""
    model = _recbole(
        "GRU4Rec", "sequential", embedding_size=8, hidden_size=12, num_layers=1, loss_type="CE"
    )
    histories = {"item_list": ids(ROWS, LENGTH), "length": ids(ROWS, high=LENGTH)}
    return Method(model, "full_sort_predict"), (histories,)


def recbole_sasrec() -> Built:
    """Return SASRec."""
    model = _recbole(
        "SASRec",
        "sequential",
        n_layers=2,
        n_heads=2,
        hidden_size=8,
        inner_size=16,
        hidden_dropout_prob=0.0,
        attn_dropout_prob=0.0,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        initializer_range=0.1,
        loss_type="CE",
    )
    histories = {"item_list": ids(ROWS, LENGTH), "length": ids(ROWS, high=LENGTH)}
    return Method(model, "full_sort_predict"), (histories,)


# --- torch-rechub ---------------------------------------------------------------------------


def _rechub(group: str) -> tuple[Any, Any]:
    return (
        import_module("torch_rechub.basic.features"),
        import_module(f"torch_rechub.models.{group}"),
    )


def rechub_din() -> Built:
    """Return DIN with Dice."""
    features, models = _rechub("ranking")
    module = models.DIN(
        features=[features.SparseFeature("user", IDS, 8)],
        history_features=[
            features.SequenceFeature("history", IDS, 8, pooling="concat", shared_with="item")
        ],
        target_features=[features.SparseFeature("item", IDS, 8)],
        mlp_params={"dims": [16, 8]},
        attention_mlp_params={"dims": [12, 6]},
    )
    return module, ({"user": ids(ROWS), "item": ids(ROWS), "history": ids(ROWS, LENGTH)},)


def rechub_mmoe() -> Built:
    """Return MMoE with three experts and two tasks."""
    features, models = _rechub("multi_task")
    fields = [features.SparseFeature(name, IDS, 8) for name in ("user", "item")]
    module = models.MMOE(
        [*fields, features.DenseFeature("age")],
        ["classification"] * 2,
        3,
        {"dims": [16, 8]},
        [{"dims": [6]}] * 2,
    )
    return module, ({"user": ids(ROWS), "item": ids(ROWS), "age": torch.rand(ROWS)},)


def rechub_dssm() -> Built:
    """Return two towers with a cosine."""
    features, models = _rechub("matching")
    user, item = (
        [features.SparseFeature(f"{side}_{name}", IDS, 8) for name in ("id", "group")]
        for side in ("user", "item")
    )
    module = models.DSSM(user, item, {"dims": [16, 8]}, {"dims": [16, 8]})
    return module, ({field.name: ids(ROWS) for field in user + item},)


# --- tabular --------------------------------------------------------------------------------


def tab_transformer() -> Built:
    """Return TabTransformer."""
    module = import_module("tab_transformer_pytorch").TabTransformer(
        categories=(IDS, IDS),
        num_continuous=3,
        dim=8,
        depth=1,
        heads=2,
        dim_head=4,
        mlp_act=nn.ReLU(),
    )
    return module, (ids(ROWS, 2), torch.randn(ROWS, 3))


def rtdl_ft_transformer() -> Built:
    """Return FT-Transformer."""
    module = import_module("rtdl_revisiting_models").FTTransformer(
        n_cont_features=3,
        cat_cardinalities=[IDS, IDS],
        d_out=1,
        n_blocks=2,
        d_block=8,
        attention_n_heads=2,
        attention_dropout=0.0,
        ffn_d_hidden=12,
        ffn_d_hidden_multiplier=None,
        ffn_dropout=0.0,
        residual_dropout=0.0,
    )
    return module, (torch.randn(ROWS, 3), ids(ROWS, 2))


def rtdl_resnet() -> Built:
    """Return the residual network for tables."""
    module = import_module("rtdl_revisiting_models").ResNet(
        d_in=5,
        d_out=1,
        n_blocks=2,
        d_block=12,
        d_hidden=16,
        d_hidden_multiplier=None,
        dropout1=0.0,
        dropout2=0.0,
    )
    return module, torch.randn(ROWS, 5)


def tabm() -> Built:
    """Return TabM with four networks in one."""
    module = import_module("tabm").TabM.make(
        n_num_features=3, cat_cardinalities=[5, 5], d_out=1, n_blocks=2, d_block=16, k=4
    )
    return module, (torch.randn(ROWS, 3), ids(ROWS, 2, high=5))


def tabnet() -> Built:
    """Return TabNet."""
    module = import_module("pytorch_tabnet.tab_network").TabNet(
        5,
        1,
        n_d=4,
        n_a=4,
        n_steps=2,
        cat_idxs=[0],
        cat_dims=[IDS],
        cat_emb_dim=[3],
        group_attention_matrix=torch.eye(5),
    )
    return module, torch.cat([ids(ROWS, 1).float(), torch.randn(ROWS, 4)], 1)


# --- language and vision --------------------------------------------------------------------


def bert() -> Built:
    """Return BERT with a tied output layer."""
    transformers = import_module("transformers")
    config = transformers.BertConfig(
        vocab_size=IDS,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=LENGTH,
    )
    inputs = {"input_ids": ids(2, LENGTH), "attention_mask": torch.ones(2, LENGTH).long()}
    return transformers.BertForMaskedLM(config), inputs


def gpt2() -> Built:
    """Return GPT-2 with a tied output layer."""
    transformers = import_module("transformers")
    config = transformers.GPT2Config(
        vocab_size=IDS, n_positions=LENGTH, n_embd=8, n_layer=2, n_head=2, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids(2, LENGTH)}


def llama() -> Built:
    """Return Llama with rotary positions and grouped queries."""
    transformers = import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=IDS,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": ids(2, LENGTH)}


def x_transformers() -> Built:
    """Return a decoder."""
    package = import_module("x_transformers")
    layers = package.Decoder(dim=8, depth=2, heads=2, attn_dim_head=4)
    module = package.TransformerWrapper(num_tokens=IDS, max_seq_len=LENGTH, attn_layers=layers)
    return module, ids(2, LENGTH)


def resnet() -> Built:
    """Return a residual network for images."""
    transformers = import_module("transformers")
    config = transformers.ResNetConfig(
        num_channels=3,
        embedding_size=6,
        hidden_sizes=[8, 10],
        depths=[1, 1],
        layer_type="basic",
        num_labels=4,
    )
    return transformers.ResNetForImageClassification(config), torch.randn(2, 3, 16, 16)


def vit() -> Built:
    """Return a vision transformer."""
    transformers = import_module("transformers")
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        num_labels=4,
    )
    return transformers.ViTForImageClassification(config), torch.randn(2, 3, 8, 8)


ENTRIES = (
    Entry("DLRM", "torchrec", "recommender", torchrec_dlrm),
    Entry("DLRM_DCN", "torchrec", "recommender", torchrec_dlrm_dcn),
    Entry("SimpleDeepFMNN", "torchrec", "recommender", torchrec_deepfm),
    Entry("DeepFM", "deepctr-torch", "recommender", deepctr_deepfm),
    Entry("xDeepFM", "deepctr-torch", "recommender", deepctr_xdeepfm),
    Entry("AutoInt", "deepctr-torch", "recommender", deepctr_autoint),
    Entry("DIN", "deepctr-torch", "recommender", deepctr_din),
    Entry("NeuMF", "recbole", "recommender", recbole_neumf),
    Entry("BPR", "recbole", "recommender", recbole_bpr),
    Entry("GRU4Rec", "recbole", "recommender", recbole_gru4rec),
    Entry("SASRec", "recbole", "recommender", recbole_sasrec),
    Entry("DIN with Dice", "torch-rechub", "recommender", rechub_din),
    Entry("MMoE", "torch-rechub", "recommender", rechub_mmoe),
    Entry("DSSM", "torch-rechub", "recommender", rechub_dssm),
    Entry("TabTransformer", "tab-transformer-pytorch", "tabular", tab_transformer),
    Entry("FT-Transformer", "rtdl-revisiting-models", "tabular", rtdl_ft_transformer),
    Entry("ResNet for tables", "rtdl-revisiting-models", "tabular", rtdl_resnet),
    Entry("TabM", "tabm", "tabular", tabm),
    Entry("TabNet", "pytorch-tabnet", "tabular", tabnet),
    Entry("BERT", "transformers", "language", bert),
    Entry("GPT-2", "transformers", "language", gpt2),
    Entry("Llama", "transformers", "language", llama),
    Entry("Decoder", "x-transformers", "language", x_transformers),
    Entry("ResNet", "transformers", "vision", resnet),
    Entry("ViT", "transformers", "vision", vit),
)
"""All entries; names are unique."""
