"""Features: hashing is the same in every process, embeddings come from local safetensors alone."""

import hashlib
import re
import subprocess
import sys

import numpy as np
import pytest

from fastft.compose.router.outcomes import Outcomes
from fastft.compose.router.router import Router
from fastft.compose.router.training.train import TrainSettings, train_router
from fastft.compose.router.vectors.embeddings import embeddings_of
from fastft.compose.router.vectors.features import BLOCK, HashedFeatures, columns_of, grams_of
from fastft.compose.router.vectors.neighbours import Neighbours
from fastft.errors import UserError

QUERIES = [f"what is {a} plus {b}" for a in range(10) for b in range(3)] + [
    f"rhyme on {what}" for what in "sea sun moon rain tree owl snow wind rose hill".split() * 3
]


def char_wb(text):
    """scikit-learn's runs of 2 to 4 characters within words, as a set."""
    from sklearn.feature_extraction.text import CountVectorizer

    return set(CountVectorizer(analyzer="char_wb", ngram_range=(2, 4)).build_analyzer()(text))


@pytest.mark.parametrize("text", ["The cat sat.", "a", "Was kostet\tdas?\n Nichts", "运行中变压器 温度", "x = f(y) 🙂"])
def test_grams_are_words_pairs_of_words_and_characters_within_words(text):
    grams = grams_of(text)
    words = re.findall(r"\w\w+", text.lower())
    split = len(words) + max(len(words) - 1, 0)
    assert [gram for gram, _ in grams[:split]] == [*words, *map(" ".join, zip(words, words[1:]))]
    assert {gram for gram, _ in grams[split:]} == char_wb(text)
    assert all(column < BLOCK for _, column in grams[:split])
    assert all(BLOCK <= column < 2 * BLOCK for _, column in grams[split:])
    assert sorted({column for _, column in grams}) == columns_of(text)[0].tolist()


def test_columns_are_the_same_in_every_process():
    """Python's own hash of a text is not."""
    code = "from fastft.compose.router.vectors.features import columns_of; print(columns_of('Wörter und 变压器')[0].tolist())"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert elsewhere.strip() == str(columns_of("Wörter und 变压器")[0].tolist())


def test_rows_have_length_1_in_each_block_and_an_empty_query_has_none():
    matrix = HashedFeatures().fit(QUERIES).transform([QUERIES[0], ""])
    lengths = [np.sqrt(matrix[0, :BLOCK].power(2).sum()), np.sqrt(matrix[0, BLOCK:].power(2).sum())]
    assert lengths == pytest.approx([1, 1]) and matrix[1].nnz == 0


def test_of_a_long_query_the_beginning_and_the_end_count():
    middle = "m" * 100_000
    assert columns_of(f"begin {middle} end")[0].tolist() == columns_of(f"begin {middle}{middle} end")[0].tolist()
    assert len(columns_of(f"begin {middle} end")[0]) > len(columns_of(middle)[0])


def test_the_nearest_query_is_itself_and_a_foreign_one_is_unlike():
    features = HashedFeatures().fit(QUERIES)
    dense = features.dense(features.transform(QUERIES))
    near = Neighbours.fit(dense, seed=0)
    index, similarity = near.nearest(dense[:5], 1)
    assert similarity[:, 0] == pytest.approx(1, abs=1e-5), "sums with the same words in another order are equal"
    assert (np.array(QUERIES)[index[:, 0]] == QUERIES[:5])[[0, 1, 2, 4]].all()
    foreign = features.dense(features.transform(["def f(x): return x**2", "Ça alors"]))
    assert near.unlike(foreign).all() and near.unlike(dense).mean() < 0.1


# --- Embeddings -------------------------------------------------------------------------------------------------------


def write_tokenizer(directory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted({word for query in QUERIES for word in query.split()})
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[PAD]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return len(vocabulary)


@pytest.fixture
def static(tmp_path):
    from safetensors.numpy import save_file

    directory = tmp_path / "static"
    directory.mkdir()
    table = np.random.default_rng(0).normal(size=(write_tokenizer(directory), 16)).astype(np.float16)
    save_file({"embedding.weight": table}, directory / "model.safetensors")
    return directory


@pytest.fixture
def encoder(tmp_path):
    import torch
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    directory = tmp_path / "encoder"
    directory.mkdir()
    size = write_tokenizer(directory)
    config = BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=300,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), pad_token="[PAD]", unk_token="[UNK]"
    )
    tokenizer.save_pretrained(directory)
    return directory


def outcomes():
    rewards = np.array([[1.0, 0.0]] * 30 + [[0.0, 1.0]] * 30)
    tags = [["sum"]] * 30 + [["poem"]] * 30
    return Outcomes([str(n) for n in range(60)], QUERIES, tags, ["sums", "poems"], rewards)


@pytest.mark.parametrize("kind", ["static", pytest.param("encoder", marks=pytest.mark.slow)])
def test_a_router_on_embeddings_learns_is_saved_without_them_and_finds_them_again(kind, request, tmp_path):
    directory = request.getfixturevalue(kind)
    router = train_router(outcomes(), TrainSettings(encoder=str(directory)))
    router.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    assert loaded.features.kind == kind
    assert loaded.decide("what is 3 plus 1").model == "sums" and loaded.decide("rhyme on moon").model == "poems"
    assert loaded.decide("").model in loaded.candidates
    assert not loaded.features.state()[1], "the model's weights stay where they are"


@pytest.mark.slow
def test_padding_and_order_do_not_change_an_embedding(encoder):
    features = embeddings_of(str(encoder))
    together = features.transform(QUERIES)
    alone = np.concatenate([features.transform([query]) for query in QUERIES[::7]])
    np.testing.assert_allclose(together[::7], alone, atol=1e-5)
    assert np.linalg.norm(together, axis=1) == pytest.approx(1)


def test_the_digest_is_that_of_the_weights_and_the_tokenizer(static):
    """By definition, so that a router that was trained by one Python is read by another one."""
    files = [*sorted(static.glob("*.safetensors")), static / "tokenizer.json"]
    digests = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)
    assert embeddings_of(str(static)).digest == hashlib.sha256(digests).hexdigest()


def test_static_embeddings_are_the_mean_over_tokens(static):
    features = embeddings_of(str(static))
    row = features.transform(["what is moon"])[0]
    ids = features.tokenizer.encode("what is moon").ids
    mean = features.table[ids].astype(np.float32).mean(0)
    np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)


def test_an_encoder_that_has_changed_or_gone_is_named(static, tmp_path):
    from safetensors.numpy import save_file

    train_router(outcomes(), TrainSettings(encoder=str(static)), with_baselines=False).save(tmp_path / "router")
    table = embeddings_of(str(static)).table
    save_file({"embedding.weight": table + 1}, static / "model.safetensors")
    with pytest.raises(UserError, match="other weights than the router was trained with"):
        Router.load(tmp_path / "router")
    static.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is not there"):
        Router.load(tmp_path / "router")


@pytest.mark.slow
def test_what_is_no_encoder_is_one_line_and_pickles_are_not_read(static, encoder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither config\.json .* nor tokenizer\.json"):
        embeddings_of(str(tmp_path / "empty"))
    (static / "model.safetensors").rename(static / "model.bin")
    with pytest.raises(UserError, match="weights of other kinds are not read, because they can run code"):
        embeddings_of(str(static))
    (encoder / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(UserError, match="cannot be loaded as an encoder"):
        embeddings_of(str(encoder))
