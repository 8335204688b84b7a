"""Local encoders and the prompts that go through them, end to end on tiny folders."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.config.errors import UserError
from opensora_jax.inference import local_encoders
from opensora_jax.inference.local_encoders import write_local_encoders
from opensora_jax.inference.prompt import (
    TextEncoderConfig,
    TextEncoders,
    Tokenizer,
    Tokenizers,
    encoders_identity,
    load_encoder,
)
from opensora_jax.parallel.mesh import MeshConfig, make_mesh
from opensora_jax.weights.files import open_checkpoint

LENGTH = 13
CAPTIONS = [f"a {color} {shape}" for color in ("red", "blue", "Grün") for shape in ("circle", "square", "日本")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_local_encoders(tmp_path_factory.mktemp("demo") / "text", CAPTIONS, seed=3, text_length=LENGTH)


def sections(folder, length):
    return (TextEncoderConfig(str(folder / kind), length) for kind in ("t5", "clip"))


def load(folder, length=LENGTH, dtype=jnp.float32):
    return TextEncoders.load(*sections(folder, length), dtype)


def identity(folder, length=LENGTH, dtype=jnp.float32):
    return encoders_identity(*sections(folder, length), dtype)


@pytest.fixture(scope="module")
def encoders(folder):
    return load(folder)


def test_pooled_vectors_of_the_captions_are_standardised(encoders):
    _, pooled = encoders.encode(CAPTIONS)
    np.testing.assert_allclose(np.mean(pooled, axis=0), 0, atol=1e-4)
    bounded = np.abs(encoders.encode([""])[1][0]) > 0.99 * local_encoders.FARTHEST_NULL
    deviation = np.std(pooled, axis=0)
    np.testing.assert_allclose(deviation[~bounded], 1, atol=1e-4)
    assert (deviation[bounded] < 1.001).all()


def test_the_empty_text_is_no_extreme_outlier(encoders):
    assert np.abs(encoders.encode([""])[1]).max() <= local_encoders.FARTHEST_NULL + 1e-3


def test_captions_and_unseen_texts_of_any_script_all_differ(encoders):
    texts = [*CAPTIONS, "", "a", "circle red a", "a cat 🎉", "ÄÖ", "\x00", "word " * 40]
    tokens, pooled = encoders.encode(texts)
    assert tokens.shape == (len(texts), LENGTH, 64)
    assert pooled.shape == (len(texts), 64)
    assert np.isfinite(tokens).all()
    assert np.isfinite(pooled).all()
    for values in (tokens.reshape(len(texts), -1), pooled):
        assert len(np.unique(np.round(values, 3), axis=0)) == len(texts)


def test_a_text_encodes_the_same_alone_and_among_others(encoders):
    together = encoders.encode(CAPTIONS)
    for i in (0, 8):
        for alone, all_of_them in zip(encoders.encode([CAPTIONS[i]]), together, strict=True):
            np.testing.assert_allclose(alone[0], all_of_them[i], atol=1e-4)


def test_ids_are_cut_and_padded_as_in_the_published_tokenizers(encoders):
    for encoder, pad, start in ((encoders.t5, 0, []), (encoders.clip, 1, [0])):
        short, long = encoder.tokenizer(["a red", "red " * 40])
        words = encoder.tokenizer.model("a red", add_special_tokens=False)["input_ids"]
        assert short.tolist() == start + words + [1] + [pad] * (LENGTH - len(start) - len(words) - 1)
        assert long[-1] == 1
        assert (long[1:-1] > 1).all()


def test_pooled_vectors_do_not_depend_on_the_padding(encoders, folder):
    shorter = load_encoder("clip", TextEncoderConfig(str(folder / "clip"), 7), jnp.float32)
    np.testing.assert_allclose(shorter.encode(["a red circle"], 1), encoders.encode(["a red circle"])[1], atol=1e-4)


def test_bfloat16_is_near_float32_and_returned_as_float32(encoders, folder):
    for low, high in zip(load(folder, dtype=jnp.bfloat16).encode(CAPTIONS), encoders.encode(CAPTIONS), strict=True):
        assert low.dtype == jnp.float32
        assert np.abs(low - high).max() < 0.3


def test_the_same_captions_in_any_order_give_the_same_encoders(folder, tmp_path):
    again = write_local_encoders(tmp_path / "t", CAPTIONS[::-1] + CAPTIONS[:3], seed=3, text_length=LENGTH)
    for kind in ("t5", "clip"):
        for name in ("tokenizer.json", "config.json", "model.safetensors"):
            assert (again / kind / name).read_bytes() == (folder / kind / name).read_bytes()
    assert identity(again) == identity(folder)


def test_identity_changes_with_weights_length_dtype_and_tokenizer(folder, tmp_path):
    identities = {identity(folder), identity(folder, LENGTH - 1), identity(folder, dtype=jnp.bfloat16)}
    other = write_local_encoders(tmp_path / "other", CAPTIONS, seed=4, text_length=LENGTH)
    identities.add(identity(other))
    shutil.copytree(folder, tmp_path / "copy")
    assert identity(tmp_path / "copy") in identities
    with (tmp_path / "copy" / "t5" / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    identities.add(identity(tmp_path / "copy"))
    assert len(identities) == 5


def test_a_finished_folder_is_reused_and_other_captions_replace_it(tmp_path):
    folder = tmp_path / "text"
    write_local_encoders(folder, CAPTIONS[:3], seed=0, text_length=5)
    before = (folder / "manifest.json").stat().st_ino
    write_local_encoders(folder, CAPTIONS[:3], seed=0, text_length=5)
    assert (folder / "manifest.json").stat().st_ino == before
    (tmp_path / "text.tmp").mkdir()  # what a killed run leaves
    write_local_encoders(folder, CAPTIONS[:2], seed=0, text_length=5)
    assert (folder / "manifest.json").stat().st_ino != before
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize("captions", [[""], ["one"], ["word " * 30]])
def test_a_single_caption_still_gives_finite_encoders(tmp_path, captions):
    folder = write_local_encoders(tmp_path / "text", captions, seed=0, text_length=5)
    tokens, pooled = load(folder, 5).encode(["", *captions, "something else"])
    assert np.isfinite(tokens).all()
    assert np.isfinite(pooled).all()
    assert np.abs(pooled).max() < 100


def test_a_folder_with_other_files_is_not_overwritten(tmp_path):
    for name in ("manifest.json", "precious.txt"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="empty or new folder"):
        write_local_encoders(tmp_path, CAPTIONS, seed=0, text_length=5)


@pytest.mark.parametrize(("captions", "length", "message"), [([], 5, "got none"), (["a"], 2, "at least 3")])
def test_nothing_to_learn_from_is_refused(tmp_path, captions, length, message):
    with pytest.raises(UserError, match=message):
        write_local_encoders(tmp_path / "text", captions, seed=0, text_length=length)


def test_the_error_for_a_missing_folder_says_what_to_download(tmp_path):
    for kind, published in (("t5", "google/t5-v1_1-xxl"), ("clip", "openai/clip-vit-large-patch14")):
        with pytest.raises(UserError, match=f"{published}.*opensora_jax.dataset text"):
            load_encoder(kind, TextEncoderConfig(str(tmp_path / "none"), 7), jnp.float32)


def test_more_tokens_than_clip_has_positions_are_refused(folder):
    with pytest.raises(UserError, match=f"at most {LENGTH}"):
        load_encoder("clip", TextEncoderConfig(str(folder / "clip"), LENGTH + 1), jnp.float32)


def test_a_folder_without_tokenizer_is_refused(folder, tmp_path):
    shutil.copytree(folder / "clip", tmp_path / "clip")
    for path in (tmp_path / "clip").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        load_encoder("clip", TextEncoderConfig(str(tmp_path / "clip"), 7), jnp.float32)


@pytest.mark.parametrize("kind", ["t5", "clip"])
@pytest.mark.parametrize("half", ["vocab.json", "merges.txt"])
def test_a_tokenizer_without_its_vocabulary_is_refused_before_weights_are_read(folder, tmp_path, kind, half):
    config = json.loads((folder / kind / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    (tmp_path / half).write_text("{}")
    with pytest.raises(UserError, match=r"no tokenizer .*\(it lacks tokenizer\.json, or spiece\.model, or vocab"):
        load_encoder(kind, TextEncoderConfig(str(tmp_path), 7), jnp.float32)


def test_weights_carry_the_published_names(folder):
    assert "text_model.encoder.layers.1.self_attn.q_proj.weight" in open_checkpoint(folder / "clip")
    assert "encoder.block.1.layer.1.DenseReluDense.wi_0.weight" in open_checkpoint(folder / "t5")
    assert json.loads((folder / "clip" / "config.json").read_text())["vocab_size"] > 256


def test_texts_encode_the_same_on_a_mesh(folder, encoders):
    t5, clip = (TextEncoderConfig(str(folder / kind), LENGTH) for kind in ("t5", "clip"))
    split = TextEncoders.load(t5, clip, jnp.float32, make_mesh(MeshConfig(2, 2, 1, 2)))
    assert not split.t5.params["shared"]["table"].get_value().is_fully_replicated
    for ours, expected in zip(split.encode(CAPTIONS[:2]), encoders.encode(CAPTIONS[:2]), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_a_loader_tokenizes_in_threads_what_the_encoders_read(folder, encoders):
    tokenizers = Tokenizers(*map(Tokenizer.load, sections(folder, LENGTH)))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(tokenizers, CAPTIONS * 20))
    for name, encoder in (("t5_ids", encoders.t5), ("clip_ids", encoders.clip)):
        np.testing.assert_array_equal(np.stack([ids[name] for ids in found]), encoder.tokenizer(CAPTIONS * 20))
